# SPDX-License-Identifier: Apache-2.0
"""The rules of the house: which room may know which, how files are written, how long a file may be."""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import opd_ext

PACKAGE = Path(opd_ext.__file__).parent
PLACES = ("teacher", "context", "divergence", "credit", "policy")
FRAMEWORKS = ("verl", "vllm", "transfer_queue")
# What pure rooms do not import, so that a divergence costs a user torch and nothing else.
NOT_PURE = (*FRAMEWORKS, "ray", "hydra", "omegaconf", "transformers", "tensordict", "pandas")
# `plugin.py` is where verl enters: its path is an entry point, its content belongs to the bridge.
DOORSTEPS = {"plugin": "bridge"}
# Longer than 400 lines, each for a reason.
LONG = {
    "bridge/warm_python.py": "one protocol between a server, its children and Ray, which does not come apart",
    "report/metrics/table.py": "the one table of metrics, to be searched rather than read",
}


# `moved.py` names old and new modules in strings and imports none of them before it is asked.
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "moved.py"]


def _module(path: Path) -> str:
    return ".".join(("opd_ext", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {_module(path) for path in sorted(PACKAGE.rglob("*.py"))}


def _room(module: str) -> str:
    name = (module.split(".") + [""])[1]
    return DOORSTEPS.get(name, name)


@cache
def _targets(path: Path) -> frozenset[str]:
    """Modules of ours that a file imports or names in a string, and top-level names of others that it imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            both = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in both}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if named := re.fullmatch(r"(?:pkg://)?(opd_ext(?:\.\w+)+)(?::\w+)?", node.value):
                found.add(_longest_module(named[1]))
    return frozenset(found)


def _longest_module(name: str) -> str:
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


@cache
def _arrows() -> dict[tuple[str, str], str]:
    """(room, room) -> a file that draws the arrow; ground-floor files are rooms of one file."""
    arrows = {}
    for path in FILES:
        own = _room(_module(path))
        for target in _targets(path):
            if target.startswith("opd_ext.") and _room(target) != own:
                arrows[own, _room(target)] = str(path.relative_to(PACKAGE))
    return arrows


def test_no_place_knows_another():
    crossing = {arrow: file for arrow, file in _arrows().items() if set(arrow) <= set(PLACES)}
    assert not crossing, f"a place must not know another; compose them in objective/ or config/: {crossing}"


def test_only_the_bridge_knows_verl_and_vllm():
    outside = {
        str(path.relative_to(PACKAGE)): target
        for path in FILES
        for target in _targets(path)
        if target.split(".")[0] in FRAMEWORKS and _room(_module(path)) != "bridge"
    }
    assert not outside, f"an upgrade of verl or vLLM must touch bridge/ alone: {outside}"


def test_nobody_below_knows_the_miniature_world():
    knowing = {source for source, target in _arrows() if target == "tinymath"}
    assert knowing <= {"cli"}, f"the world comes in through opd.world_lib and graders' paths: {knowing}"


def test_no_two_rooms_know_each_other_around_any_corner():
    reached = {
        room: {target for source, target in _arrows() if source == room} for arrow in _arrows() for room in arrow
    }
    for _ in reached:
        for room, known in reached.items():
            reached[room] = known | {further for target in known for further in reached[target]}
    circles = [room for room, known in reached.items() if room in known]
    assert not circles, f"rooms in a circle, module strings included: {circles}; {_arrows()}"


@pytest.mark.parametrize("room", ["objective", *PLACES])
def test_a_pure_room_stands_alone(room):
    """Imported alone, in a new process: it is complete, and it has brought no framework along."""
    code = f"import sys, opd_ext.{room}; print(*sorted({set(NOT_PURE)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr + done.stdout


@pytest.mark.parametrize(
    "module", ["config.checks", "pipelines.command", "report.methods", "sampling.worker", "tokens.finetuning",
               "tinymath.build", "rewards.math_dual", "data.math", "diffusion.masking", "train", "cli", "doctor"]
)  # fmt: skip
def test_a_room_can_be_entered_first(module):
    """No room works only because another one was imported before it; none of these needs verl to be looked at."""
    code = f"import sys, opd_ext.{module}; print('verl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr + done.stdout


def test_the_package_itself_and_the_plugin_are_light():
    """verl, Ray and vLLM load both in every process."""
    code = "import sys, opd_ext.plugin; print(*sorted({'torch', 'verl', 'ray', 'numpy'} & set(sys.modules)))"
    environment = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}  # on a GPU node
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr + done.stdout


@pytest.mark.parametrize(
    ("call", "home"),
    [
        (r"\bos\.(replace|rename)\(", "files.py"),  # a file that is written whole
        (r"\.apply_chat_template\(", "context/sequence.py"),  # messages that become tokens
        (r"\.digest\(\)\[:", "seeds.py"),  # the seed of a request
        (r"\bConsole\(", "terminal.py"),  # a console that takes no name for markup
        (r"cut_off_end: bool", "files.py"),  # lines of JSON
    ],
)
def test_what_must_be_done_alike_is_done_in_one_place(call, home):
    found = [str(path.relative_to(PACKAGE)) for path in FILES if re.search(call, path.read_text())]
    assert found == [home]


def test_lines_end_with_a_line_feed():
    """``str.splitlines`` also cuts at U+2028 and U+0085, which responses, and JSON that holds them, have inside."""
    found = [str(path.relative_to(PACKAGE)) for path in FILES if ".splitlines(" in path.read_text()]
    assert not found, f'use split("\\n"), or opd_ext.files.read_jsonl: {found}'


def test_a_file_is_as_long_as_one_story():
    long = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if len(p.read_text().splitlines()) > 400}
    assert long == set(LONG), "above 400 lines without a reason, or with one that is no longer needed"


def test_a_span_label_is_defined_once():
    """`1` and `2` mean nothing to a reader: only spans.py says which is which."""
    guessed = {
        str(path.relative_to(PACKAGE)): line.strip()
        for path in FILES
        for line in path.read_text().splitlines()
        if re.search(r"span_label\w* *== *[12]\b", line)
    }
    assert not guessed
