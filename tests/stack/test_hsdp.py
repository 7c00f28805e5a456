# SPDX-License-Identifier: Apache-2.0
"""Two replicas of two shards (HSDP), as `scale=cluster` lays out nodes, against one rank on the same rollouts."""

import pytest
import torch
from typer.testing import CliRunner

from opd_ext.cli import app
from tests.stack.conftest import metrics, shards
from tests.stack.replay import in_prompt_order, replay

HSDP = ["trainer.n_gpus_per_node=4"]
HSDP += [f"actor_rollout_ref.{part}.fsdp_config.fsdp_size=2" for part in ("actor", "ref")]

pytestmark = pytest.mark.slow  # four ranks and four rollout servers on two cores


def whole(ranks: list[dict], sizes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Weights of the shards of all ranks, without the rows that FSDP pads."""
    return {name: torch.cat([rank[name] for rank in ranks])[: size[0]] for name, size in sizes.items()}


def test_replicas_train_as_one_rank_does_and_go_on_where_they_were_cut(train, tmp_path):
    one, four = tmp_path / "one", tmp_path / "four"
    settings = [*replay(tmp_path / "dump", 2), "opd.teacher.interval=1"]
    train(one, *settings)
    in_prompt_order(tmp_path / "dump")
    train(four, *settings, *HSDP)
    for alone, spread in zip(metrics(one), metrics(four), strict=True):
        for name in ("opd/loss", "opd/divergence", "opd/grad_norm", "opd/student_entropy"):
            # fp32 sums in another order; the second step starts from weights that Adam has moved by their signs
            assert spread[name] == pytest.approx(alone[name], rel=1e-4), name
    sizes = {name: value.shape for name, value in shards(one, 2, "actor")[0].items()}
    for part in ("actor", "teacher"):
        found = shards(four, 2, part)
        assert len(found) == 2, "of two replicas the first one writes"
        expected = shards(one, 2, part)[0]
        gaps = torch.cat([(value - expected[name]).abs().flatten() for name, value in whole(found, sizes).items()])
        # A step is 3e-4; where a gradient is all rounding its sign is, too, so that a few weights may go another way.
        assert gaps.median() < 1e-6 and (gaps > 1e-5).float().mean() < 0.01
    refreshed, trained = (whole(shards(four, 2, part), sizes) for part in ("teacher", "actor"))
    assert all(torch.equal(refreshed[name], trained[name]) for name in trained)

    said = train(four, "opd.teacher.interval=1", "trainer.total_training_steps=3", *HSDP)
    assert "global_step_2" in said and [line["step"] for line in metrics(four)] == [1, 2, 3]
    answer = CliRunner().invoke(app, ["export", str(four), "--out", str(tmp_path / "model")])
    assert answer.exit_code == 0, answer.output
