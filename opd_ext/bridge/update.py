# SPDX-License-Identifier: Apache-2.0
"""The update of a step as the trainer asks its workers for it, and what it makes of their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transfer_queue import KVBatchMeta
from verl.utils.metric import reduce_metrics

from opd_ext.bridge import likeliest, old_policy, teacher_server
from opd_ext.bridge.teachers import LESSON, READ, STUDENT_SPANS, TEACHER_SPANS
from opd_ext.config.old_policy import Source
from opd_ext.objective.metrics import means

if TYPE_CHECKING:
    from opd_ext.bridge.trainer import OPDTrainer

# What the workers read of a rollout; everything else stays in the queue.
_FIELDS = ["input_ids", "position_ids", "prompts", "responses", "loss_mask", "has_teacher"]

_MEMORY = ("max_memory_allocated_gb", "max_memory_reserved_gb", "cpu_memory_used_gb")


def alone(trainer: OPDTrainer, batch: KVBatchMeta, metrics: dict, old: Source) -> KVBatchMeta:
    """A step without a teacher: verl's own, with the names of its metrics added to ours."""
    with old_policy.without_whole_entropies(trainer.config, old):
        batch = trainer._update_actor(batch, metrics)
    if old == "update":
        old_policy.report(trainer, batch, metrics)
        if trainer.config.actor_rollout_ref.actor.calculate_entropy:  # of its only step, so of the same policy
            metrics.setdefault("actor/entropy_loss", metrics["actor/entropy"])
    for name in ("loss", "grad_norm", "lr"):
        metrics[f"opd/{name}"] = metrics[f"actor/{name}"]
    if "actor/entropy" in metrics:  # verl does not compute it where the sampler's log-probs are the old ones
        # verl reduces entropy as it reduces the loss; a sum over tokens is no entropy of a token.
        summed = trainer.config.actor_rollout_ref.actor.loss_agg_mode == "token-sum"
        tokens = metrics["rollout/samples"] * metrics["rollout/tokens_mean"] if summed else 1.0
        metrics["opd/student_entropy"] = metrics["actor/entropy"] / tokens
    for name in _MEMORY:
        metrics[f"memory/{name}"] = metrics.pop(f"actor/perf/{name}")
    return batch


def with_teacher(
    trainer: OPDTrainer, batch: KVBatchMeta, metrics: dict, weight: float, gate: float, old: Source
) -> KVBatchMeta:
    """A step with one: the workers' own update, by the loss of the run.

    Args:
        metrics: gets what every rank counted, as means over all tokens.
        weight, gate: of the distillation term, and of the policy term on spans, in this step.
    """
    actor, rollout = trainer.config.actor_rollout_ref.actor, trainer.config.actor_rollout_ref.rollout
    mini_batch_size = actor.ppo_mini_batch_size * rollout.n
    spans = [STUDENT_SPANS, TEACHER_SPANS] if trainer.foreign else [READ] if trainer.opd.told_in_turns else []
    batch.fields = [*_FIELDS]
    if trainer.opd.asks:
        batch.fields += ["teacher_input_ids", LESSON, *spans]
    if "server" in trainer.opd.backends:
        batch.fields += [likeliest.LOG_PROBS, *([likeliest.IDS] if trainer.opd.served_topk is not None else [])]
    if rollout.calculate_log_probs:
        batch.fields.append("rollout_log_probs")
    if old in ("pass", "sampler"):
        batch.fields.append("old_log_probs")
    if trainer.opd.credit.annotates:
        batch.fields.append("span_label")
    if trainer.opd.policy.present:
        correction = trainer.config.algorithm.rollout_correction
        weighted = correction and correction.rollout_is is not None and old == "pass"
        batch.fields += ["response_mask", "advantages", *(["rollout_is_weights"] if weighted else [])]
    batch.extra_info.update(
        {
            "opd_distillation_weight": weight,
            "opd_gate": gate,
            "calculate_entropy": actor.calculate_entropy or actor.entropy_coeff != 0.0,
            "global_batch_size": mini_batch_size,
            "mini_batch_size": mini_batch_size,
            "epochs": 1,
            "seed": actor.data_loader_seed,
            "dataloader_kwargs": {"shuffle": False},
            "temperature": rollout.temperature,
        }
    )
    output = reduce_metrics(trainer.actor_rollout_wg.update_actor(batch)["metrics"])
    if trainer.teacher_servers:
        metrics.update(teacher_server.traffic(trainer.actor_rollout_wg.count_served()))
    batch.fields = None
    if old == "update":
        old_policy.report(trainer, batch, metrics)
    said = {name: float(value) for name, value in means(output).items()}
    metrics.update({name if name.startswith("teacher/") else f"opd/{name}": said[name] for name in said})
    metrics.update({name: float(value) for name, value in output.items() if name.startswith("actor/")})
    if "opd/teacher_entropy" in metrics:  # absent if no token of the batch is distilled
        metrics["opd/entropy_diff"] = metrics["opd/distilled_student_entropy"] - metrics["opd/teacher_entropy"]
    metrics["opd/scale"] = weight
    metrics["opd/response_tokens"] = float(output["student_entropy:count"] * _dp_size(trainer))
    for name in ("loss", "grad_norm", "lr"):
        metrics[f"opd/{name}"] = float(output[name])
    for name in _MEMORY:
        metrics[f"memory/{name}"] = float(output[f"perf/{name}"])
    return batch


def _dp_size(trainer: OPDTrainer) -> int:
    return max(trainer.actor_rollout_wg._dispatch_info["actor"]) + 1
