# SPDX-License-Identifier: Apache-2.0
"""Two teachers on the whole stack: each moves as it should, and a run that stops goes on with the same bits of both."""

import shutil

import pytest
import torch

from tests.stack.conftest import metrics, shards
from tests.stack.replay import in_prompt_order, replay

pytestmark = pytest.mark.slow

STEPS = 2
TEACHERS = (
    "opd.teachers={large: {weights: external, path: '%s', rows: [3], context: {kind: same},"
    " divergence: {kind: jsd, beta: 0.5}}, past: {weights: ema, rate: 0.3, rows: [1, 2, 4, 5], weight: 0.5}}"
)


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """A run of two steps, and one that lost its second step and went on, on the same rollouts."""
    base = tmp_path_factory.mktemp("teachers")
    whole, resumed, dump = base / "whole", base / "resumed", base / "dump"
    settings = [*replay(dump, STEPS), "opd.teacher_key=difficulty", TEACHERS % (train.world / "tinymath" / "large")]
    train(whole, *settings)
    in_prompt_order(dump)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"global_step_{STEPS}")
    (resumed / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1")
    return whole, resumed, train(resumed, *settings)


def test_both_teach_and_only_the_one_that_moves_is_saved(runs):
    last = metrics(runs[0])[-1]
    for name in ("large", "past"):
        assert last[f"teacher/{name}/divergence"] > 0 and 0 < last[f"teacher/{name}/token_share"] < 1
    assert last["teacher/past/version"] == 1 and last["teacher/large/version"] == 0
    folder = runs[0] / "checkpoints" / f"global_step_{STEPS}" / "teachers"
    assert [path.name for path in folder.iterdir()] == ["past"]


@pytest.mark.parametrize("part", ["actor", "teachers/past"])
def test_a_resumed_run_ends_with_the_same_bits(runs, part):
    whole, resumed, said = runs
    assert "teacher past version 1 (age 0 steps)" in " ".join(said.split())
    for ours, theirs in zip(shards(resumed, STEPS, part), shards(whole, STEPS, part), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_repeats_the_metrics(runs):
    names = ("opd/loss", "opd/grad_norm", "teacher/large/divergence", "teacher/past/divergence", "teacher/past/version")
    ours, theirs = (metrics(run)[-1] for run in (runs[1], runs[0]))
    assert [ours[name] for name in names] == [theirs[name] for name in names]


def test_the_teacher_that_moved_is_a_model(runs, monkeypatch):
    from transformers import AutoModelForCausalLM

    from opd_ext.checkpoints.export import export
    from opd_ext.checkpoints.layout import CheckpointError

    with pytest.raises(CheckpointError, match="name one of large, past"):
        export(runs[0], teacher=True)
    with pytest.raises(CheckpointError, match="which does not change"):
        export(runs[0], teacher="large")
    weights = dict(AutoModelForCausalLM.from_pretrained(export(runs[0], teacher="past")).named_parameters())
    for name, saved in shards(runs[0], STEPS, "teachers/past")[0].items():
        if name in weights:
            torch.testing.assert_close(weights[name].detach(), saved.to(weights[name].dtype))
