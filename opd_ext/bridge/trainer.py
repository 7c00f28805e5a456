# SPDX-License-Identifier: Apache-2.0
"""The on-policy distillation trainer: verl's with a teacher beside, or in place of, advantages.

One step: sample rollouts, build the teacher's sequences, compute advantages if there is a policy term, update the
student, refresh the teacher on schedule, save, sync the weights to vLLM. Everything that verl does around it
(placement, data loading, generation, rewards, weight sync) is inherited, and a step without a teacher is verl's own.

When rollouts are sampled says one of verl's trainers, a second base: :class:`SyncTrainer`, `bridge/one_step_off.py`.
"""

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.debug import marked_timer

from opd_ext import files, recorded
from opd_ext.bridge import (
    datasets,
    discovery,
    evaluation,
    failures,
    old_policy,
    rollouts,
    saving,
    schedule,
    selftest,
    teacher_server,
    update,
)
from opd_ext.bridge.advantages import weigh_advantages
from opd_ext.bridge.console import ALARM, RunLog
from opd_ext.bridge.inputs import tool_schemas
from opd_ext.bridge.liveness import Liveness, guarded, impatient, processes
from opd_ext.bridge.teacher_inputs import (
    neutralise_padding,
    plan_teacher_inputs,
    put_teacher_inputs,
    without_rows,
)
from opd_ext.bridge.watch import Watch
from opd_ext.bridge.worker import OPDWorker
from opd_ext.checkpoints.layout import TrainerState
from opd_ext.config import schema
from opd_ext.config.checks import external_models
from opd_ext.config.old_policy import Source, old_log_probs, updates
from opd_ext.config.teachers import adapter_weights, model_weights, trains_adapter, whose
from opd_ext.seeds import Copies
from opd_ext.teacher.vocabulary import check_same_ids
from opd_ext.tokens.ends import stop_ids


class OPDTrainer(PPOTrainer):
    """See the module's docstring; a subclass adds the trainer of verl's that says when to sample.

    Its settings are ``config.opd``.
    """

    verl_mode: str
    """verl's own name of the second base, by which its code branches."""

    def __init__(self, config: DictConfig):
        self.opd = schema.load(config.opd)
        self.run_dir = Path(self.opd.run_dir)
        self.tested = False  # see opd_ext.bridge.selftest
        self._names = (0, 0, Copies())  # step, prompts named in it, which of them are equal
        # verl branches on this string: queue, replay buffer and resume must behave as with the trainer of its own.
        mode, config.trainer.v1.trainer_mode = config.trainer.v1.trainer_mode, self.verl_mode
        self.models, self.adapters = model_weights(self.opd, config), adapter_weights(self.opd, config)
        with open_dict(config):  # by which the workers build them
            config.actor_rollout_ref.teacher_paths = {name: v.opd.teacher.path for name, v in self.models.items()}
            config.actor_rollout_ref.teacher_adapters = {n: v.opd.teacher.kind.moves for n, v in self.adapters.items()}
        self.full_steps = 0  # in a row, whose pairs were all too long
        super().__init__(config)
        self.state = TrainerState(
            method=self.opd.method,
            context=schedule.contexts(self.opd),
            teacher_weights={view.name: view.weights for view in self.opd.views if view.name and view.weights},
            grader=str(config.reward.custom_reward_function.path),
            trainer_mode=mode,
        )

    # ------------------------------------------------------------------ set-up

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        for key, path in external_models(self.opd, foreign=False).items():
            check_same_ids(self.tokenizer, path, key)
        self.stops = stop_ids(self.config.actor_rollout_ref.model.path, self.tokenizer)
        self.desks = schedule.desks(self.opd, self.tokenizer, self.stops)
        self.foreign = any(desk.foreign is not None for desk in self.desks)
        self.tools = tool_schemas(self.config)

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        counted, self.filtered = datasets.counts(self.train_dataset, self.val_dataset, self.config.data)
        datasets.complete(self.train_dataset, self.val_dataset)
        self.total_training_steps = datasets.settle_steps(self.config, self.train_dataset, self.total_training_steps)
        self.log = RunLog(self.run_dir, self.total_training_steps)
        self.protocol = evaluation.protocol(self)
        self.log.say(f"{counted}; loading the models and starting vLLM")
        if self.filtered >= ALARM:
            self.log.note("ALARM, lost: prompts that were dropped", "bold red")

    def _build_replay_buffer(self) -> ReplayBuffer:
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = self.opd.rollout.poll_interval
        return buffer

    def _init_resource_pool_mgr(self) -> None:
        """Place our worker where verl places its own, with a reference engine if a teacher is a model of its own.

        verl's reference policy of a LoRA student is the student without its adapter, and needs none.
        """
        super()._init_resource_pool_mgr()
        needs_ref = self.models or (self.use_reference_policy and not trains_adapter(self.config))
        role = Role.ActorRolloutRef if needs_ref else Role.ActorRollout
        self.role_worker_mapping = {role: ray.remote(OPDWorker)}
        self.mapping.pop(Role.ActorRollout, None)
        self.mapping[role] = "global_pool"
        self.resource_pool_manager.mapping = self.mapping

    def on_init_end(self) -> None:
        temperature = self.config.actor_rollout_ref.rollout.temperature
        classes = rollouts.token_classes(self.tokenizer, self.stops)
        self.drops_out = any(self.actor_rollout_wg.configure(self.opd, classes, temperature))
        super().on_init_end()

    # ------------------------------------------------------------------ one step

    def _fetch_one_gen_batch(self) -> Any:
        """verl's batch with names that a rerun reproduces; replay and order of the batch depend on them."""
        batch = super()._fetch_one_gen_batch()
        step = self.global_steps  # dynamic sampling fetches several times per step
        _, first, copies = self._names if self._names[0] == step else (step, 0, Copies())
        self._names = (step, first + len(batch), copies)
        uids = [f"t{step:06d}p{i:05d}" for i in range(first, first + len(batch))]
        draws = rollouts.first_draws(batch["raw_prompt"], copies, self.config.actor_rollout_ref.rollout.n)
        batch.update(tu.get_tensordict({"uid": np.array(uids, dtype=object), "first_draw": draws}))
        return batch

    def take(self, partition: str, prompts: int) -> tuple[KVBatchMeta, dict]:
        """The finished rollouts of so many prompts, and what verl's buffer says of them."""
        with impatient(self.replay_buffer, self.opd.rollout.silence_seconds):
            return failures.sample(self.replay_buffer, self.agent_loop_manager, self.global_steps, partition, prompts)

    def account(self, rows: list[dict], wanted: int, prefix: str) -> dict[str, float]:
        """None is missing, and those that failed are counted and told; see :func:`opd_ext.bridge.failures.account`."""
        ask = self.agent_loop_manager.first_exception
        metrics, line = failures.account(rows, wanted, self.opd.rollout.failed, prefix, ask)
        if line:
            self.log.note(f"step {self.global_steps}: {line}", "yellow")
        return metrics

    def _step_once(self, metrics: dict, timing_raw: dict, sample_batch_size: int) -> KVBatchMeta:
        with marked_timer("gen", timing_raw, color="red"):
            self.on_sample_begin()
            batch, sampling = self.take("train", sample_batch_size)
            metrics.update(sampling)
            batch.extra_info["temperature"] = self.config.actor_rollout_ref.rollout.temperature
            self.on_sample_end()
        batch.reorder(sorted(range(len(batch.keys)), key=batch.keys.__getitem__))  # arrival order is not reproducible
        if self.reward_loop_manager.reward_loop_worker_handles is None:
            batch = self._compute_reward_colocate(batch, metrics=metrics)
        rows = rollouts.read_rows(batch, self.tokenizer, self.opd.rollout.train_tokens, self.stops)
        wanted = sample_batch_size * self.config.actor_rollout_ref.rollout.n
        metrics.update(rollouts.summarise(rows, "rollout") | self.account(rows, wanted, "rollout"))
        if self.opd.horizon.limited:
            metrics["rollout/horizon"] = self.opd.horizon.tokens(self.global_steps, self.opd.rollout.train_tokens)
        recorded.write(
            self.run_dir,
            self.global_steps,
            rollouts.read_tokens(batch, self.config.actor_rollout_ref.rollout.calculate_log_probs),
        )
        weight, gate = self.opd.schedule(self.global_steps)
        taught = False
        if weight > 0:
            with marked_timer("teacher_context", timing_raw, color="olive"):
                batch, taught = self._add_teacher_inputs(batch, rows, metrics)
        files.write_jsonl(self.run_dir / "generations" / f"train_{self.global_steps}.jsonl", rows)
        if line := failures.account_annotations(rows, self.opd.credit.annotator.failed):
            self.log.note(f"step {self.global_steps}: {line}", "yellow")
        untrained = not taught and not self.opd.policy.present
        metrics["opd/skipped"] = float(untrained)
        if self._found(rows):
            return batch
        if untrained:
            schedule.refresh(self, metrics, updates=0)
            return batch
        batch = self._balance_batch(batch, metrics)
        if taught and self.opd.asks:
            eos, annotates = self.tokenizer.eos_token_id, self.opd.credit.annotates
            neutralise_padding(batch, eos, annotates, self.foreign, bool(self.opd.told_in_turns))
        selftest.run(self, batch, taught)
        old = self._old_log_probs(batch)
        if old in ("pass", "sampler"):
            with marked_timer("old_log_prob", timing_raw, color="blue"):
                batch = self._compute_old_log_prob(batch, metrics)
        if self.opd.policy.present:
            if self.use_reference_policy:
                with marked_timer("ref", timing_raw, color="olive"):
                    batch = self._compute_ref_log_prob(batch, metrics)
            with marked_timer("adv", timing_raw, color="brown"):
                with old_policy.without_correction(self.config) if old == "update" else nullcontext():
                    batch = self._compute_advantage(batch, metrics)
                weigh_advantages(batch, self.opd.policy, self._mini_batches())
        with marked_timer("update_actor", timing_raw, color="red"):
            if old == "update":
                old_policy.announce(self, batch)
            if taught:
                batch = update.with_teacher(self, batch, metrics, weight, gate, old)
            else:
                batch = update.alone(self, batch, metrics, old)
        with marked_timer("refresh_teacher", timing_raw, color="olive"):
            # Of a teacher without weights of its own nothing moves, so nobody need be asked.
            updates = self.actor_rollout_wg.count_updates()[0] if self.opd.teacher_weights else 0
            schedule.refresh(self, metrics, updates)
        schedule.guard(self, metrics)
        return batch

    def _add_teacher_inputs(self, batch: KVBatchMeta, rows: list[dict], metrics: dict) -> tuple[KVBatchMeta, bool]:
        """Put the teacher's sequences beside the rollouts; the second value says whether there is any.

        Without a policy term a pair that is too long leaves the batch, since cutting one side would misalign it; with
        one it stays and trains without a teacher. The length tag, by which verl balances ranks, becomes student +
        teacher tokens.
        """
        if self.opd.backends == {"server"}:  # verl's servers have scored every rollout as it was finished
            flags = tu.get_tensordict({"has_teacher": torch.ones(len(batch.keys), dtype=torch.bool)})
            tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=flags)
            return batch, True
        inputs, planned = plan_teacher_inputs(
            rows,
            batch,
            self.desks,
            self.tokenizer,
            OmegaConf.to_container(self.config.data.apply_chat_template_kwargs),
            self.tools,
            self.opd.max_pair_length,
            self.global_steps,
            self.opd.credit.moves_spans,
            functools.partial(whose, self.opd),
        )
        metrics.update(planned)
        dropped = [i for i, shown in enumerate(inputs) if shown.too_long and not self.opd.policy.present]
        metrics["rollout/dropped"] = len(dropped) / len(batch.keys)
        self.full_steps = failures.check_pairs(metrics, self.full_steps, self.opd.max_pair_length)
        if len(dropped) == len(batch.keys):  # a skipped step, whose rows verl clears
            return batch, False
        batch = without_rows(batch, dropped)
        kept = [i for i in range(len(inputs)) if i not in set(dropped)]
        inputs = [inputs[i] for i in kept]
        taught = any(shown.ids is not None for shown in inputs)
        if taught:
            for tag, shown in zip(batch.tags, inputs, strict=True):
                tag["seq_len"] += len(shown.ids or ())
            tokens = [rows[i]["response_tokens"] + rows[i].get("environment_tokens", 0) for i in kept]
            eos, lengths = self.tokenizer.eos_token_id, tokens if self.foreign else None
            put_teacher_inputs(batch, inputs, eos, lengths, bool(self.opd.told_in_turns))
        return batch, taught

    def _mini_batches(self) -> int:
        """Optimiser steps that share a batch of rollouts."""
        return self.config.data.train_batch_size // self.config.actor_rollout_ref.actor.ppo_mini_batch_size

    def _old_log_probs(self, batch: KVBatchMeta) -> Source:
        """See :mod:`opd_ext.config.old_policy`; of the batch at hand, which may be longer than the configured one."""
        ref = self.config.actor_rollout_ref
        there = -(-len(batch.keys) // (ref.actor.ppo_mini_batch_size * ref.rollout.n)) * ref.actor.ppo_epochs
        source = old_log_probs(self.config, self.opd, max(there, updates(self.config)))
        # A pass that drops out at random is no copy of one that does not.
        return "pass" if source == "update" and self.drops_out else source

    def _found(self, rows: list[dict]) -> bool:
        """Whether the run is over, because a rollout reached the score that it looks for."""
        attempt = discovery.record_attempts(rows, self.opd.stop_on_success, self.state, self.global_steps, self.run_dir)
        if attempt is not None:
            self.total_training_steps = self.global_steps
            self.log.note(f"found: attempt {attempt} of {self.state.attempts} is right, step {self.global_steps}")
        return attempt is not None

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self) -> None:
        folder = saving.save(self)
        step = self.global_steps
        self.checkpoint_callback.on_save(trainer=self, global_step=step, checkpoint_dir=str(folder), async_save=False)

    def _load_checkpoint(self) -> None:
        saving.prepare(self)
        self.teacher_servers = teacher_server.start(self.opd, self.config)
        if self.teacher_servers:
            self.actor_rollout_wg.reach_servers(self.opd, self.teacher_servers)
        super()._load_checkpoint()
        files.drop_lines_after(self.run_dir / "metrics.jsonl", self.global_steps)
        if self.global_steps > 0:
            saving.load(self)
        self.watch = Watch(self)

    # ------------------------------------------------------------------ validation and metrics

    def fit(self, agent_loop_manager: Any) -> None:
        self.log.say("the stack is up")
        graders = self.reward_loop_manager.reward_loop_worker_handles
        replicas = [replica for manager in self._rollout_server_managers() for replica in manager.get_replicas()]
        teachers = self.teacher_model_manager  # verl's own
        actors = processes(agent_loop_manager, graders, replicas, self.actor_rollout_wg, teachers)
        with guarded(Liveness(actors | dict(teacher_server.processes(self.teacher_servers)))):
            super().fit(agent_loop_manager)

    def _validate(self) -> dict[str, float]:
        return evaluation.validate(self)

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict, timing_raw: dict, global_steps: int, epoch: int):
        metrics.update({f"timing_s/{name}": seconds for name, seconds in timing_raw.items()})
        metrics.update({"training/global_step": global_steps, "training/epoch": epoch})
        metrics["data/filtered"] = self.filtered
        trained = {name: value for name, value in metrics.items() if not name.startswith(evaluation.PREFIXES)}
        trained |= self.watch.look(self.global_steps, trained, validated=len(trained) < len(metrics))
        self.log.record("train", self.global_steps, trained)


@register_trainer("opd")
class SyncTrainer(OPDTrainer, PPOTrainerSync):
    """Samples, then trains: the rollouts of a step are those of the policy that it updates."""

    verl_mode = "sync"
