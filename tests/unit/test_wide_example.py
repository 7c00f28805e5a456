# SPDX-License-Identifier: Apache-2.0
"""examples/wide: what it names, what it asks `opd train` for, and that a configuration of it passes our checks."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from opd_ext.config import checks
from opd_ext.config.compose import compose_config

FOLDER = Path(__file__).parents[2] / "examples" / "wide"
SCRIPT = FOLDER / "run.sh"
NAMES = re.search(r"^ALL=\((.*)\)$", SCRIPT.read_text(), re.MULTILINE)[1].split()
# What each is about, in the words of the configuration: (key, its value on a CPU, on a node).
ABOUT = {
    "async": ("trainer.v1.trainer_mode", "opd_one_step_off", "opd_one_step_off"),
    "separate": ("trainer.v1.trainer_mode", "opd_separate", "opd_separate"),
    "sequence_parallel": ("actor_rollout_ref.actor.ulysses_sequence_parallel_size", 2, 4),
    "horizon": ("opd.horizon.stop", True, True),
    "served_teacher": ("opd.teacher.backend", "vllm", "vllm"),
    "likeliest": ("distillation.distillation_loss.topk", 8, 64),
    "lora": ("actor_rollout_ref.model.lora_rank", 16, 64),
}


@pytest.fixture
def asked(tmp_path):
    """What `opd` is called with by the script."""
    recorder = tmp_path / "opd"
    recorder.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >>"${0%/*}/said"\n')
    recorder.chmod(0o755)

    def ask(*words, **variables):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
        run = subprocess.run([SCRIPT, *words], env=environment | variables, capture_output=True, text=True)
        return run, (tmp_path / "said").read_text().splitlines() if (tmp_path / "said").exists() else []

    return ask


@pytest.mark.parametrize("node", ["", "1"], ids=["cpu", "node"])
@pytest.mark.parametrize("name", NAMES)
def test_what_it_asks_for_is_what_it_is_about_and_passes_our_checks(asked, monkeypatch, name, node):
    run, (command, *words) = asked(name, "opd.seed=7", "--dry-run", NODE=node)
    assert (run.returncode, command, words.pop()) == (0, "train", "--dry-run"), run.stderr
    config = compose_config(words)
    checks.check(config)
    key, *values = ABOUT[name]
    found = config
    for part in key.split("."):
        found = found[part]
    assert found == values[bool(node)] and config.opd.seed == 7
    assert config.opd.run_dir.endswith(f"out/{name}")


def test_the_names_are_those_of_its_guide_and_another_is_refused(asked):
    assert NAMES == list(ABOUT) == re.findall(r"^\| `(\w+)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    run, said = asked("fast", "--dry-run")
    assert run.returncode == 2 and said == []
    assert f"there is no fast: choose one of {' '.join(NAMES)}" in run.stderr
    assert "NODE=1 needs the name of one" in asked(NODE="1")[0].stderr
