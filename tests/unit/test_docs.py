# SPDX-License-Identifier: Apache-2.0
"""What the architecture page names is there: files, hooks of ours and of verl, contracts of seams."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "opd_ext"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
VERL = Path(importlib.util.find_spec("verl").origin).parent

# Where each class stands whose members the page names.
CLASSES = {
    "OPDTrainer": PACKAGE / "bridge" / "trainer.py",
    "OPDEngine": PACKAGE / "bridge" / "engine.py",
    "OPDWorker": PACKAGE / "bridge" / "worker.py",
    "OPDAgentLoopWorker": PACKAGE / "bridge" / "agent_loop.py",
    "OPDTaskRunner": PACKAGE / "bridge" / "runner.py",
    "Objective": PACKAGE / "objective" / "objective.py",
    "TeacherConfig": PACKAGE / "teacher" / "config.py",
    "PPOTrainer": VERL / "trainer" / "ppo" / "v1" / "trainer_base.py",
    "PPOTrainerSync": VERL / "trainer" / "ppo" / "v1" / "trainer_sync.py",
    "TaskRunnerV1": VERL / "trainer" / "main_ppo.py",
    "ReplayBuffer": VERL / "trainer" / "ppo" / "v1" / "replay_buffer.py",
    "TrainingWorker": VERL / "workers" / "engine_workers.py",
    "FSDPEngine": VERL / "workers" / "engine" / "fsdp" / "transformer_impl.py",
    "BaseEngine": VERL / "workers" / "engine" / "base.py",
}
MORE = [
    VERL / "trainer" / "ppo" / "v1" / "agent_loop_tq.py",
    VERL / "experimental" / "agent_loop" / "agent_loop.py",
]
# Files of a run, which no checkout has.
OF_A_RUN = ("checkpoints/global_step", "checkpoints/latest", "export/", "generations/")


def _named(pattern: str) -> list[str]:
    return sorted(set(re.findall(pattern, PAGE)))


def _paths() -> list[str]:
    """Names with a slash and nothing but path characters, in backticks; in code blocks those that end like a file."""
    paths = _named(r"`([\w.-]+/[\w./-]*)`") + _named(r"(?<![\w/<.])([a-z]+/[\w/]+\.(?:py|yaml|sh|md))\b")
    return sorted({path for path in paths if not path.startswith(OF_A_RUN)})


def test_the_page_names_many_files():
    assert len(_paths()) > 60


@pytest.mark.parametrize("path", _paths())
def test_a_file_that_the_page_names_exists(path):
    assert any((folder / path).exists() for folder in (ROOT, PACKAGE, ROOT / "docs")), (
        f"docs/architecture.md names {path}"
    )


@pytest.mark.parametrize("name", [name for name in _named(r"\b(\w+\.\w+)\b") if name.split(".")[0] in CLASSES])
def test_a_member_that_the_page_names_exists(name):
    kind, _, member = name.partition(".")
    text = CLASSES[kind].read_text()
    assert re.search(rf"\b(def {member}\b|self\.{member}\b|{member}:)", text), f"docs/architecture.md names {name}"


@pytest.mark.parametrize("hook", _named(r"(?<![\w.<-])(_[a-z]\w+[a-z]|on_\w+[a-z])\b"))
def test_a_hook_that_the_page_names_exists(hook):
    text = "".join(path.read_text() for path in [*CLASSES.values(), *(PACKAGE / "bridge").glob("*.py"), *MORE])
    assert re.search(rf"(def |group\.){hook}\b", text), f"docs/architecture.md names {hook}"


def test_the_seam_table_and_the_contracts_name_each_other():
    """Read from the source: the contracts themselves import verl and vLLM."""
    table = PAGE.partition("## 5. Seams")[2].partition("## 6.")[0]
    told = set(re.findall(r"`([\w.]+-\w+)`", table))
    held = set()
    for path in sorted((ROOT / "tests" / "unit" / "bridge" / "contract").glob("of_*.py")):
        for where, name in re.findall(r'@seam\(\s*"([^"]+)".*?\n\)?\s*def (\w+)\(', path.read_text(), re.DOTALL):
            held.add(f"{where.rpartition('/')[2].removesuffix('.py')}-{name}")
    assert len(held) > 80
    assert held - told == set(), "contracts that the page does not name"
    assert told - held == set(), "contracts that the page names and nobody holds"


@pytest.mark.parametrize("preset", sorted((PACKAGE / "config" / "method").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_table_of_methods_says_what_the_presets_say(preset):
    opd = yaml.safe_load(preset.read_text())["opd"]
    title = preset.stem.replace("_", "-").upper().replace("EXOPD", "ExOPD")
    (row,) = [line.split("|")[2:7] for line in PAGE.splitlines() if line.startswith(f"| {title} |")]
    choices = [
        ("teacher", "weights"),
        ("context", "kind"),
        ("divergence", "kind"),
        ("credit", "kind"),
        ("policy", "loss"),
    ]
    for cell, (place, key) in zip(row, choices, strict=True):
        chosen = (opd.get(place) or {}).get(key)
        if chosen is not None and not (place == "credit" and opd.get("divergence") is None):
            assert chosen.replace("_kl", " KL") in cell, f"{title}: the preset says {place}={chosen}"
        elif place != "divergence":  # one divergence per span class has no kind of its own
            assert cell.strip() == "-", f"{title}: the preset says no {place}"


def test_every_room_is_on_the_page():
    rooms = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
    missing = [room for room in rooms if f"{room}/" not in PAGE]
    assert rooms and not missing


def test_the_readmes_row_of_the_pages_links_every_one():
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `docs/` |")]
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages - set(re.findall(r"\((docs/\w+\.md)\)", row)) == set()


def test_no_command_of_a_page_needs_a_variable_that_is_unset_by_default():
    """Without OPD_HOME a command with its bare name would look in the root folder."""
    pages = [
        ROOT / "README.md",
        *(path for top in ("docs", "recipes", "examples") for path in (ROOT / top).rglob("*.md")),
    ]
    commands = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
    said = [line.partition(" #")[0] for block in commands for line in block.splitlines()]
    assert len(said) > 100
    assert [line for line in said if re.search(r"\$(OPD_HOME|\{OPD_HOME\})", line)] == []
