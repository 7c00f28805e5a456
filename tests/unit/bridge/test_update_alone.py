# SPDX-License-Identifier: Apache-2.0
"""A step without a teacher: what verl's own update is told, by verl's own trainer, and what becomes of its metrics."""

import functools
from types import SimpleNamespace

import pytest
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils import tensordict_utils as tu

from opd_ext.bridge import update
from opd_ext.config.checks import check
from opd_ext.config.compose import compose_config
from opd_ext.config.old_policy import old_log_probs, updates

ACTOR = "actor_rollout_ref.actor"
KEPT = 1.25  # nats: what the update has kept, as `old_policy.report` has verl reduce it


def updated(monkeypatch, *overrides):
    """What the workers were told, and the metrics of the step; a stand-in for the workers alone."""
    config = compose_config(["recipe=trace/qwen3_8b", *overrides])
    opd, told, metrics = check(config), {}, {"rollout/samples": 8, "rollout/tokens_mean": 100.0}
    old = old_log_probs(config, opd, updates(config))

    def update_actor(batch):
        told.update(batch.extra_info)
        numbers = dict.fromkeys(("loss", "grad_norm", "lr", "mfu", *(f"perf/{name}" for name in update._MEMORY)), [0.5])
        if batch.extra_info["calculate_entropy"]:
            numbers["entropy_loss"] = [2.0]
        return tu.get_tensordict({}, {"metrics": numbers})

    trainer = SimpleNamespace(
        config=config, distillation_config=None, actor_rollout_wg=SimpleNamespace(update_actor=update_actor)
    )
    trainer._update_actor = functools.partial(PPOTrainer._update_actor, trainer)
    monkeypatch.setattr(update.old_policy, "report", lambda *_: metrics.update({"actor/entropy": KEPT}))
    batch = SimpleNamespace(extra_info={})
    update.alone(trainer, batch, metrics, old)
    assert config.actor_rollout_ref.actor.calculate_entropy == ("calculate_entropy=false" not in " ".join(overrides))
    return told, metrics


def test_an_entropy_that_is_a_metric_alone_is_taken_from_what_the_update_keeps(monkeypatch):
    told, metrics = updated(monkeypatch)
    assert told["calculate_entropy"] is False
    assert metrics["actor/entropy"] == metrics["actor/entropy_loss"] == metrics["opd/student_entropy"] == KEPT


@pytest.mark.parametrize(
    "overrides",
    [(f"{ACTOR}.entropy_coeff=1e-3",), (f"{ACTOR}.ppo_mini_batch_size=16",)],
    ids=["a bonus", "several steps, of which each has another policy"],
)
def test_entropies_that_the_loss_or_a_later_step_needs_are_verls(monkeypatch, overrides):
    told, metrics = updated(monkeypatch, *overrides)
    assert told["calculate_entropy"] is True
    assert metrics["actor/entropy_loss"] == 2.0


def test_nobody_makes_a_metric_that_is_not_asked_for(monkeypatch):
    told, metrics = updated(monkeypatch, f"{ACTOR}.calculate_entropy=false")
    assert told["calculate_entropy"] is False and "actor/entropy_loss" not in metrics
