# SPDX-License-Identifier: Apache-2.0
"""The reference pages: up to date, complete, and true about who reads a setting."""

import re
import subprocess
import sys

import pytest

from opd_ext.pipelines.settings import TrainConfig
from opd_ext.reference import fields
from opd_ext.reference.__main__ import FOLDER, PAGES
from opd_ext.reference.readers import Package, package
from opd_ext.reference.settings_page import CHECKED_ONLY, pipeline_sections, trainer_sections

SECTIONS = [*trainer_sections(), *(section for part in pipeline_sections().values() for section in part)]
KEYS = [key for section in SECTIONS for key in section.keys]


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_what_the_sources_say_now(name):
    written = (FOLDER / name).read_text(encoding="utf-8")
    assert written == PAGES[name](), f"run python -m opd_ext.reference: docs/reference/{name} is out of date"
    assert max(map(len, written.splitlines())) <= 110, "readable in a terminal"


def test_making_the_pages_needs_no_framework():
    """They are made where documentation is built, without a GPU, Ray or a model."""
    heavy = "{'verl', 'vllm', 'ray', 'transformers'} & set(sys.modules)"
    code = f"import sys, opd_ext.reference.__main__ as m; [page() for page in m.PAGES.values()]; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_every_key_says_what_it_means():
    silent = [key.path for key in KEYS if not key.meaning]
    assert not silent, f"give the field a comment on its line: {silent}"


def test_every_key_is_read_by_more_than_its_check():
    """A setting that nobody reads is a promise that is not kept."""
    unread = {key.path for key in KEYS if key.section is None and not key.readers}
    assert unread == set(CHECKED_ONLY)
    for key in KEYS:
        if key.path in unread:
            assert package().checkers(key.kind, key.name), f"{key.path} is not even checked"


@pytest.mark.parametrize(
    "key, reader",
    [
        ("opd.credit.rollout_cap", "objective/objective.py"),  # handed on to the objective by the schema
        ("opd.teacher.interval", "bridge/worker.py"),  # through a property that builds the teacher
        ("opd.divergence.ratio_clip", "objective/objective.py"),  # through a tuple
        ("opd.credit.annotator.cache_dir", "credit/annotate/models.py"),  # through an attribute of a base class
        ("opd.policy.loss", "config/method/"),  # by YAML alone
        ("train.lr", "bridge/finetune.py"),  # from JSON, in another process
        ("vllm.dtype", "sampling/jobs.py"),  # by getattr
    ],
)
def test_a_key_is_followed_to_where_it_acts(key, reader):
    (found,) = (entry for entry in KEYS if entry.path == key)
    assert reader in found.readers


def test_an_access_to_another_class_is_no_reader(tmp_path):
    (tmp_path / "config.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass TrainConfig:\n    lr: float = 1.0\n    steps: int = 2\n    ranks: int = 1\n"
        "    def check(self):\n        assert self.ranks > 0\n"
    )
    (tmp_path / "use.py").write_text(
        "from opd_ext.config import TrainConfig\n"
        "def run(config: TrainConfig, other):\n    return config.lr + other.steps\n"
    )
    found = Package(tmp_path)
    key = "config.py:TrainConfig"
    assert found._reads.files[key, "lr"] == {"use.py"}
    assert not found._reads.files[key, "steps"], "`other` may be anything"
    assert not found._reads.files[key, "ranks"] and found._reads.checks[key, "ranks"] == {"config.py"}


def test_the_comments_of_opd_yaml_are_those_of_the_dataclasses():
    """Both are read by users; the dataclass is where a meaning is written first."""
    text = (fields.PACKAGE / "config" / "opd.yaml").read_text(encoding="utf-8")
    section = re.search(r"^opd:\n((?:  .*\n)+)", text, re.MULTILINE)[1]
    said, prefix = {}, "opd."
    for indent, name, rest in re.findall(r"^( +)(\w+):(.*)$", section, re.MULTILINE):
        prefix = f"{prefix.split('.')[0]}." if len(indent) == 2 else prefix
        if " #" in rest:
            said[prefix + name] = rest.partition(" #")[2].strip()
        elif not rest.strip():
            prefix += f"{name}."
    meanings = {key.path: key.meaning.rstrip(".") for key in KEYS}
    assert len(said) >= 15
    for path, comment in said.items():
        assert comment.lower() == meanings[path].lower(), path


def test_a_meaning_may_stand_on_the_line_or_below_it():
    assert fields.meanings(TrainConfig)["lr"].startswith("learning rate")
    (key,) = (entry for entry in KEYS if entry.path == "opd.denominator")
    assert "distilled (those with a teacher)" in key.meaning


@pytest.mark.parametrize("title", ["opd.teacher", "opd.context", "opd.divergence", "opd.credit", "opd.policy"])
def test_every_registered_choice_is_on_the_page(title):
    from opd_ext.reference import settings_page

    part = settings_page.page().partition(f"\n## `{title}`\n")[2].partition("\n## ")[0]
    _, names, get, _ = settings_page._REGISTRIES[title]
    ours = [name for name in names() if get(name).__module__.startswith("opd_ext.")]
    for name in ours:
        if not name.startswith("topk_"):  # chosen by support
            assert f"- `{name}` (`" in part, f"{title} has no {name}"
