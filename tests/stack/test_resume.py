# SPDX-License-Identifier: Apache-2.0
"""A killed run goes on where it stopped: on the same rollouts it ends with the same bits as an undisturbed one."""

import pytest
import torch

from tests.stack.conftest import metrics, shards
from tests.stack.replay import in_prompt_order, interrupted, replay

STEPS = 4


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    base = tmp_path_factory.mktemp("resume")
    undisturbed, killed, dump = base / "undisturbed", base / "killed", base / "dump"
    settings = [*replay(dump, STEPS), "opd.teacher.interval=2"]
    train(undisturbed, *settings)
    in_prompt_order(dump)
    interrupted(train, killed, settings, step=2)
    (killed / "checkpoints" / ".incomplete_global_step_3").mkdir(exist_ok=True)  # as a kill inside a save leaves it
    output = train(killed, *settings)
    return undisturbed, killed, output


def test_a_resumed_run_says_what_it_resumed(runs):
    assert "global_step_2" in runs[2] and "teacher version 2 (age 0 steps)" in " ".join(runs[2].split())


@pytest.mark.parametrize("part", ["actor", "teacher"])
def test_a_resumed_run_ends_with_the_same_bits(runs, part):
    undisturbed, killed, _ = runs
    for ours, theirs in zip(shards(killed, STEPS, part), shards(undisturbed, STEPS, part), strict=True):
        assert ours.keys() == theirs.keys()
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not different, different


def test_a_resumed_run_repeats_the_metrics(runs):
    undisturbed, killed, _ = runs
    names = ("opd/loss", "opd/grad_norm", "teacher/version", "rollout/tokens_mean")
    by_step = {line["step"]: line for line in metrics(undisturbed)}
    for line in metrics(killed):
        assert [line[name] for name in names] == [by_step[line["step"]][name] for name in names]
    assert [line["step"] for line in metrics(killed)][-2:] == [3, 4]


def test_an_interrupted_save_leaves_no_trace(runs):
    assert not list((runs[1] / "checkpoints").glob(".incomplete*"))
