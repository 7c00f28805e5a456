# SPDX-License-Identifier: Apache-2.0
"""Wrong configurations, data sets, models and graders: each is one sentence, before anything is started."""

import json
import os
import subprocess
import sys

import pytest

from .conftest import World
from .wrong_files import DATA, GRADERS, MODELS
from .wrong_settings import MACHINE, VALUES, WORDS
from .wrong_teachers import TEACHERS

# Wrong for what a model's tokenizer makes of them, or for what verl alone can say.
AFTER_VERL = (
    "an optimiser misspelt",
    "advantages that verl has not",
    "a manager that is not there",
    "prompts that are all too long",
    "teacher prompts that leave no room for a response",
    "solutions to show, but none there",
)
CASES = [*VALUES, *WORDS, *DATA, *MODELS, *TEACHERS, *GRADERS, *MACHINE]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_input_is_one_sentence_before_anything_is_started(case, world, start, monkeypatch, request):
    if case not in WORDS:  # what Hydra itself would say of those must be heard
        request.getfixturevalue("presets_composed_once")
    monkeypatch.syspath_prepend(world.folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = case.words(world) if callable(case.words) else case.words
    status, said, started, _ = start(*words)
    assert (status, started) == (2, []), said
    refusal = [line for line in said.splitlines() if line.startswith("opd train: ")]
    assert len(refusal) == 1 and said.rstrip().endswith(refusal[0]), said
    assert all(words in refusal[0] for words in case.says), refusal[0]
    assert "Traceback" not in said and refusal[0].endswith((".", "?"))


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_what_is_wrong_with_keys_data_grader_and_machine_is_said_before_verl_is_imported(_right, tmp_path, every):
    """Which takes seconds; a test within this process cannot see it, since verl is there already."""
    first = [case for case in [*VALUES, *DATA, *GRADERS, *MACHINE] if case.name not in AFTER_VERL]
    assert len(first) > 100
    first = first[::every]
    worlds = [World(tmp_path / str(i)) for i in range(len(first))]  # cases call their files alike
    words = [case.words(w) if callable(case.words) else case.words for case, w in zip(first, worlds, strict=True)]
    lines = [(str(w.folder), [*_right, *each]) for w, each in zip(worlds, words, strict=True)]
    code = (
        "import contextlib, io, json, sys\nfrom opd_ext.train import main\n"
        "for folder, words in json.load(sys.stdin):\n"
        "    sys.path.insert(0, folder)\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said:\n"
        "        status = main(words)\n"
        "    print(json.dumps([status, 'verl' in sys.modules, said.getvalue()]))\n"
        "    if 'verl' in sys.modules: break"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(lines), capture_output=True, text=True, env=environment
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done
    for case, (status, imported, said) in zip(first, found, strict=False):
        assert status == 2 and all(words in said for words in case.says), f"{case.name}: {said}"
        assert not imported, f"{case.name} was refused after verl was imported"
    assert len(found) == len(first)


def test_sixty_cases_and_more():
    assert len({case.name for case in CASES}) == len(CASES) >= 60
