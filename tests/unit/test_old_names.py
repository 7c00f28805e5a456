# SPDX-License-Identifier: Apache-2.0
"""Names of release 0.1 still work; each goes with release 0.3, and says so."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opd_ext.moved import MOVED

ROOT = Path(__file__).parents[2]
OLD = {
    "objective.divergence": "reverse_kl forward_kl jsd topk_divergence register_divergence sampled_kl",
    "objective.head": "chunked_divergence divergence_head",
    "objective.credit": "position_weights importance_clip register_credit CreditInputs",
    "objective.schedule": "teacher_version trace_schedule",
    "objective.policy": "clipped_surrogate sampled_advantage span_gate prompt_mean_scale self_distilled_advantage",
    "objective.loss": "Objective MicroBatch Branch Surrogate Terms means",
    "objective.objective": "token_weights",
    "offline.t3s": "keep_mask random_keep pick_bottleneck",
    "offline.ssd": "truncated_distribution",
    "teacher.annotate": "parse segment align register_annotator Annotator AnnotatorConfig build_annotator",
    "teacher.annotate.parse": "parse",
    "teacher.annotate.segments": "segment",
    "data.tinymath.problems": "draw_question",
    "bridge.rollouts": "write_jsonl drop_lines_after",
    "teacher.base": "TeacherContext register_context",
    "teacher.context": "TeacherContext register_context build_context render build_teacher_sequence SameContext",
    "teacher.feedback": "FeedbackContext",
    "teacher.prompts": "instruction teacher_prompt ERROR_TYPES STEP_TYPES",
    "rewards.tinymath": "compute_score",
    "config.schema": "ConfigError load OPDConfig",
    "train": "compose_config main run",
}


@pytest.mark.parametrize("module", OLD)
@pytest.mark.filterwarnings("ignore:.* has moved to")
def test_an_old_name_is_the_new_object(module):
    found = importlib.import_module(f"opd_ext.{module}")
    for name in OLD[module].split():
        thing = getattr(found, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):  # of registries, methods and tables come along too
            assert getattr(importlib.import_module(thing.__module__), name) is thing


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_warns_says_where_to_and_when_it_goes(old):
    for name in [name for name in sys.modules if name == old]:
        del sys.modules[name]
    with pytest.warns(DeprecationWarning, match=rf"{old} has moved to {MOVED[old][0]}; the old name goes with .* 0\.3"):
        found = importlib.import_module(old)
    assert MOVED[old][0] in found.__doc__


@pytest.mark.filterwarnings("ignore:.* has moved to")
def test_a_module_below_an_old_package_takes_no_function_of_its_name_away():
    below, package = (importlib.import_module(f"opd_ext.teacher.annotate{name}") for name in (".parse", ""))
    assert package.parse is below.parse and callable(package.parse)


def test_a_name_that_never_was_is_no_old_one():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("opd_ext.teacher.annotate.nobody")
    with pytest.raises(AttributeError, match="rollouts.* has no attribute 'nobody'"):
        vars(importlib.import_module("opd_ext.bridge.rollouts"))["__getattr__"]("nobody")


def test_nothing_of_ours_uses_an_old_name():
    pattern = re.compile(rf"\b({'|'.join(re.escape(old) for old in MOVED)})\b(?!/)")
    allowed = {"opd_ext/moved.py", "tests/unit/test_old_names.py"}
    allowed |= {"tests/unit/pipelines/test_stages.py", "CHANGELOG.md"}
    files = [path for kind in ("py", "yaml", "sh", "md", "toml") for path in ROOT.rglob(f"*.{kind}")]
    using = {
        str(path.relative_to(ROOT)): found[0]
        for path in files
        if ".venv" not in path.parts and (found := pattern.search(path.read_text()))
    }
    assert set(using) <= allowed, using


def test_a_run_of_release_0_1_finds_its_grader():
    """verl imports `pkg://` graders by name, in processes of its own; run folders and scripts name the old one."""
    code = (
        "from verl.utils.import_utils import load_extern_object as load;"
        "print(load('pkg://opd_ext.rewards.tinymath', 'compute_score').__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["opd_ext.tinymath.grader"], done.stderr
