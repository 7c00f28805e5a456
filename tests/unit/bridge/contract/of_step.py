# SPDX-License-Identifier: Apache-2.0
"""Contracts of what verl's trainer does within a step: balance, old log-probs, advantages, update, metrics."""

import math
import time
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.protocol import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.trainer.ppo.v1.utils import MetricsAggregator, compute_advantage_for_multi_trajectories
from verl.utils import tensordict_utils as tu
from verl.utils.debug import marked_timer
from verl.utils.metric import reduce_metrics
from verl.utils.metric.utils import Metric
from verl.utils.torch_functional import entropy_from_logits

from opd_ext.ratios import importance_clip

from .seams import bare, says, seam

TRAINER = "verl.trainer.ppo.v1.trainer_base:PPOTrainer."
KEYS = ["p0_0_0", "p0_1_0", "p1_0_0", "p1_1_0"]


def _put(queue, keys: list[str], fields: dict, **tags: list) -> KVBatchMeta:
    """A batch whose rows are in the queue."""
    rows = [{name: values[i] for name, values in tags.items()} for i in range(len(keys))]
    queue.kv_batch_put(keys=keys, partition_id="train", fields=tu.get_tensordict(fields), tags=rows)
    return KVBatchMeta(partition_id="train", keys=keys, tags=rows)


def _get(queue, keys: list[str], name: str) -> list[list]:
    found = queue.kv_batch_get(keys=keys, partition_id="train", select_fields=[name])[name]
    return [row.tolist() for row in found.unbind()]


@seam(
    "bridge/teacher_inputs.py",
    covers="OPDTrainer._balance_batch",
    pins={
        f"{TRAINER}_balance_batch": "self batch metrics logging_prefix= keep_minibatch=",
        "verl.trainer.ppo.padding_utils:upsample_batch_to_divisible_size": "batch batch_multiple eos_token_id",
    },
)
def padding(config, queue, jagged):
    """Rows that fill a batch up are tagged ``is_padding``: a zero mask, one response token, a copied teacher input."""
    ids = [[7, 8, 9], [7, 8, 9, 9], [7, 9]]
    fields = {"input_ids": jagged(ids), "position_ids": jagged([list(range(len(row))) for row in ids])}
    fields |= {"prompts": jagged([[7, 8], [7, 8], [7]]), "responses": jagged([[9], [9, 9], [9]])}
    ones = jagged([[1], [1, 1], [1]])
    fields |= {"loss_mask": ones, "response_mask": ones.clone(), "teacher_input_ids": jagged([[5, 9], [5, 9, 9], [9]])}
    fields |= {"has_teacher": torch.tensor([True, True, True])}
    batch = _put(queue, KEYS[:3], fields, seq_len=[5, 7, 3])
    config.actor_rollout_ref.actor.ppo_mini_batch_size, config.actor_rollout_ref.rollout.n = 2, 1
    trainer = bare(PPOTrainerSync, config=config, use_critic=False, global_steps=1)
    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": [0, 1]})
    trainer.tokenizer = SimpleNamespace(eos_token_id=2)
    metrics = {}
    batch = trainer._balance_batch(batch, metrics)
    (key,) = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if tag.get("is_padding")]
    assert sorted(set(batch.keys) - {key}) == KEYS[:3] and len(batch.keys) == 4
    assert _get(queue, [key], "loss_mask") == [[0]] and _get(queue, [key], "responses") == [[2]]
    assert _get(queue, [key], "teacher_input_ids") == [[5, 9]], "of the first row: it does not fit, and is taken away"
    assert metrics, "how well the ranks are balanced"


@seam(
    "bridge/update.py",
    covers="_dispatch_info",
    pins={"verl.single_controller.base.worker_group:WorkerGroup.__init__": None},
)
def dispatch():
    """A worker group's ``_dispatch_info`` is a dict by mesh, of the data-parallel rank of each worker."""
    # The group starts Ray actors. `_balance_batch`, which every step calls first, fills the entry in.
    says("verl.single_controller.base.worker_group:WorkerGroup.__init__", "self._dispatch_info = {}")
    says(f"{TRAINER}_balance_batch", "worker_group._dispatch_info[role] = dp_rank_mapping", "max(dp_rank_mapping) + 1")


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer._compute_old_log_prob",
    pins={f"{TRAINER}_compute_old_log_prob": "self batch metrics"},
)
def old_log_probs(config, queue, jagged):
    """``old_log_probs`` arrive like the responses: token t of a prompt of n tokens from position n + t - 1."""
    fields = {"response_mask": jagged([[1, 1], [1]]), "prompts": jagged([[1], [2, 3]])}
    fields |= {"responses": jagged([[4, 5], [6]]), "rollout_log_probs": jagged([[-3.0, -4.0], [-5.0]], torch.float32)}
    batch = _put(queue, KEYS[:2], fields, seq_len=[3, 3])
    whole = jagged([[-0.1, -0.2, 0.0], [-0.3, -0.4, 0.0]], torch.float32)

    def compute_log_prob(batch):
        outputs = tu.get_tensordict({"log_probs": whole, "entropy": -whole})
        queue.kv_batch_put(keys=batch.keys, partition_id="train", fields=outputs)
        return batch

    config.actor_rollout_ref.rollout.calculate_log_probs = False
    trainer = bare(PPOTrainerSync, config=config, actor_rollout_wg=Mock(compute_log_prob=compute_log_prob))
    metrics = {}
    returned = trainer._compute_old_log_prob(batch, metrics)
    found = _get(queue, KEYS[:2], "old_log_probs")
    assert found == [pytest.approx([-0.1, -0.2]), pytest.approx([-0.4])]
    assert returned.keys == KEYS[:2] and metrics["actor/entropy"] > 0
    config.algorithm.rollout_correction = {"bypass_mode": True}
    assert trainer._compute_old_log_prob(batch, {}).keys == KEYS[:2]
    assert _get(queue, KEYS[:2], "old_log_probs") == [[-3.0, -4.0], [-5.0]], "the sampler's own"


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer._compute_ref_log_prob",
    pins={f"{TRAINER}_compute_ref_log_prob": "self batch metrics"},
)
def reference(config, queue, jagged):
    """The reference's ``ref_log_prob`` comes from ``compute_ref_log_prob`` of the worker that holds it."""
    fields = {"response_mask": jagged([[1, 1]]), "log_probs": jagged([[-0.1, -0.2, 0.0]], torch.float32)}
    batch = _put(queue, KEYS[:1], fields, seq_len=[3])
    workers = Mock(compute_ref_log_prob=lambda batch: batch)
    bare(PPOTrainerSync, config=config, ref_in_actor=False, ref_policy_wg=workers)._compute_ref_log_prob(batch, {})
    assert _get(queue, KEYS[:1], "ref_log_prob") == [pytest.approx([-0.1, -0.2])]


@seam(
    "bridge/advantages.py",
    covers="OPDTrainer._compute_advantage",
    pins={f"{TRAINER}_compute_advantage": "self batch metrics"},
)
def advantages(config, queue, jagged):
    """``advantages`` are put into the queue like the responses, one value per row; the group is the prompt's name."""
    scores = [[0.0, 1.0], [0.0, 0.0], [1.0], [1.0]]
    masks = jagged([[1] * len(row) for row in scores])
    fields = {"response_mask": masks, "rm_scores": jagged(scores, torch.float32), "uid": ["p0", "p0", "p1", "p1"]}
    batch = _put(queue, KEYS, fields, seq_len=[3] * 4)
    config.algorithm.adv_estimator, config.actor_rollout_ref.rollout.n = "grpo", 2
    returned = bare(PPOTrainerSync, config=config)._compute_advantage(batch, {})
    (better, same), (worse, _), even, _ = _get(queue, KEYS, "advantages")
    assert better == same == -worse > 0 and even == [0.0]
    assert returned.keys == KEYS


@seam(
    "bridge/recorded_policy.py",
    pins={
        "verl.trainer.ppo.v1.utils:compute_advantage_for_multi_trajectories": "data batch_keys adv_estimator gamma= "
        "lam= num_repeat= norm_adv_by_std_in_grpo= config=",
        "verl.protocol:DataProto": None,
    },
)
def advantages_without_a_queue(config, queue, jagged):
    """What ``_compute_advantage`` leaves in the queue is a function of masks, rewards, names of rows and prompts."""
    scores = [[0.0, 1.0], [0.0, 0.0], [1.0], [1.0]]
    rewards = jagged(scores, torch.float32)
    mask = jagged([[1] * len(row) for row in scores])
    fields = {"response_mask": mask, "rm_scores": rewards, "uid": ["p0", "p0", "p1", "p1"]}
    config.algorithm.adv_estimator, config.actor_rollout_ref.rollout.n = "grpo", 2
    bare(PPOTrainerSync, config=config)._compute_advantage(_put(queue, KEYS, fields, seq_len=[3] * 4), {})
    padded = {"response_mask": mask.to_padded_tensor(0), "token_level_rewards": rewards.to_padded_tensor(0.0)}
    names = {"uid": np.array(fields["uid"], dtype=object)}
    found = compute_advantage_for_multi_trajectories(
        DataProto(TensorDict(padded, batch_size=4), names), KEYS, "grpo", num_repeat=2, config=config.algorithm
    )
    rows = [row[: len(score)].tolist() for row, score in zip(found.batch["advantages"], scores, strict=True)]
    assert rows == _get(queue, KEYS, "advantages")


@seam(
    "bridge/old_policy.py",
    covers="config.algorithm.rollout_correction _compute_old_log_prob",
    pins={
        "verl.trainer.ppo.rollout_corr_helper:compute_rollout_correction_and_add_to_batch": "batch rollout_corr_config",
        "verl.protocol:DataProto": None,
        "verl.utils.torch_functional:entropy_from_logits": "logits",
    },
)
def current_policy(config, queue, jagged):
    """Advantages without a correction ask for no old log-probs; a token's weight is their capped ratio, masked."""
    masks, floats = jagged([[1, 1], [1, 0]]), torch.float32
    sampled = jagged([[-1.0, -2.0], [-3.0, -1.0]], floats)
    fields = {"response_mask": masks, "rm_scores": jagged([[0.0, 1.0], [0.0, 0.0]], floats), "uid": ["p0", "p0"]}
    batch = _put(queue, KEYS[:2], fields | {"rollout_log_probs": sampled}, seq_len=[3] * 2)
    config.algorithm.adv_estimator, config.algorithm.rollout_correction = "grpo", None
    bare(PPOTrainerSync, config=config)._compute_advantage(batch, {})
    assert _get(queue, KEYS[:2], "advantages")[0][1] > 0

    old, theirs = torch.tensor([[-1.0, -0.5], [-4.0, -9.0]]), sampled.to_padded_tensor(0.0)
    rows = {"old_log_probs": old, "rollout_log_probs": theirs, "response_mask": masks.to_padded_tensor(0)}
    correction = {"rollout_is": "token", "rollout_is_threshold": 2.0}
    found, metrics = compute_rollout_correction_and_add_to_batch(DataProto.from_dict(rows), correction)
    ours = importance_clip(old, theirs, 2.0) * rows["response_mask"]
    assert torch.equal(found.batch["rollout_is_weights"], ours) and ours.max() == 2.0
    assert metrics and all(name.startswith("rollout_corr/") for name in metrics)
    assert entropy_from_logits(torch.zeros(1, 4)).item() == pytest.approx(math.log(4))


@seam(
    "bridge/update.py",
    covers="_update_actor",
    pins={f"{TRAINER}_update_actor": "self batch metrics"},
)
def update(config):
    """The worker's metrics get ``actor/`` before their names, memory's too, and the sizes of a step go to it."""
    named = {"loss": [0.5], "grad_norm": [2.0], "lr": [0.1], "mfu": [0.0]}
    named |= {f"perf/{name}_gb": [1.0] for name in ("max_memory_allocated", "max_memory_reserved", "cpu_memory_used")}
    workers = Mock(update_actor=Mock(return_value=tu.get_tensordict({}, {"metrics": named})))
    config.actor_rollout_ref.actor.ppo_mini_batch_size, config.actor_rollout_ref.rollout.n = 4, 2
    batch, metrics = KVBatchMeta(keys=["a"], tags=[{}], partition_id="train"), {}
    bare(PPOTrainerSync, config=config, actor_rollout_wg=workers)._update_actor(batch, metrics)
    assert {f"actor/{name}": value[0] for name, value in named.items() if name != "mfu"}.items() <= metrics.items()
    told = workers.update_actor.call_args.args[0].extra_info
    assert told["global_batch_size"] == told["mini_batch_size"] == 8 and told["epochs"] == 1
    assert {"calculate_entropy", "seed", "dataloader_kwargs", "temperature"} <= told.keys()


@seam("bridge/old_policy.py", covers="actor.calculate_entropy", pins={f"{TRAINER}_update_actor": "self batch metrics"})
def asked_for_entropies(config):
    """The update is told to compute entropies by a switch that the trainer reads at every step, or for a bonus."""
    numbers = {"metrics": {"loss": [0.5], "mfu": [0.0]}}
    workers = Mock(update_actor=Mock(return_value=tu.get_tensordict({}, numbers)))
    trainer, actor = bare(PPOTrainerSync, config=config, actor_rollout_wg=workers), config.actor_rollout_ref.actor
    told = []
    for switch, bonus in ((True, 0.0), (False, 0.0), (False, 0.1)):
        actor.calculate_entropy, actor.entropy_coeff = switch, bonus
        trainer._update_actor(KVBatchMeta(keys=["a"], tags=[{}], partition_id="train"), {})
        told.append(workers.update_actor.call_args.args[0].extra_info["calculate_entropy"])
    assert told == [True, False, True]


@seam(
    "bridge/update.py",
    pins={"verl.utils.metric:reduce_metrics": "metrics", "verl.utils.metric.utils:Metric": "aggregation value="},
)
def sums():
    """A ``sum`` metric adds over micro-batches and averages over ranks; lists average over mini-batches."""
    ranks = [Metric("sum", 1.0), Metric("sum", torch.tensor(5.0))]
    for metric in ranks:
        metric.append(2.0)
    assert Metric.aggregate_dp(ranks) == 5.0  # (1 + 2 + 5 + 2) / 2: the trainer multiplies counts by the ranks
    assert reduce_metrics({"entropy:count": [2.0, 4.0], "perf/max_memory_allocated_gb": [1.0, 3.0]}) == {
        "entropy:count": 3.0,
        "perf/max_memory_allocated_gb": 3.0,
    }


@seam("bridge/trainer.py", pins={"verl.trainer.ppo.v1.utils:MetricsAggregator.add_step_metrics": None})
def aggregation():
    """A step's numbers reach the log as they are: one local update per step, so a mean over one."""
    aggregator = MetricsAggregator()
    ours = {"opd/loss": 0.5, "opd/lr": 1e-3, "rollout/tokens_max": 7.0, "val/pass_at_2": 0.25, "opd/skipped": 0.0}
    aggregator.add_step_metrics(ours, sample_count=4)
    assert ours.items() <= aggregator.get_aggregated_metrics().items()


@seam("bridge/trainer.py", pins={"verl.utils.debug:marked_timer": None})
def timer():
    """The seconds of a block are in the dict under the block's name."""
    seconds: dict[str, float] = {}
    with marked_timer("gen", seconds, color="red"):
        time.sleep(0.02)
    assert 0.02 <= seconds["gen"] < 20  # milliseconds would be 20 and more
