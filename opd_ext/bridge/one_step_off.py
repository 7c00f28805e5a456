# SPDX-License-Identifier: Apache-2.0
"""One step off: while the student trains on a batch, the rollouts of the next one are sampled.

verl's asynchronous trainers keep the queue, the warm-up and the weight sync: ``colocate_async`` with vLLM on the
trainer's devices, ``separate_async`` with vLLM on others. Two things are ours, and make a run repeat itself whatever
its machine does meanwhile:

* A batch belongs to the step that trains it. It is submitted one step earlier, under the name, the seeds and the tag of
  its own step, so that it has the prompts and random numbers that it has in a synchronous run; the policy that samples
  it is one version older.
* Weights reach vLLM when nothing is in flight. verl would cut what is unfinished and let newer weights go on with it,
  so that a rollout were of several policies, of which ones by the clock. Here every rollout is of one.

So a checkpoint finds the queue at rest, with the whole next batch in it, and a killed run goes on from both.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.utils.debug import marked_timer

from opd_ext.bridge import failures, staleness
from opd_ext.bridge.liveness import impatient
from opd_ext.bridge.trainer import OPDTrainer


class AheadTrainer(OPDTrainer):
    """What samples the next batch while it trains, wherever vLLM is; verl's trainer that says where is a base more."""

    def _build_replay_buffer(self) -> ReplayBuffer:
        buffer = super()._build_replay_buffer()
        buffer.refill_fn = self._lost
        return buffer

    def _lost(self, prompts: int) -> None:
        """verl would drop prompts whose rollouts did not arrive and sample others; a run of ours ends."""
        wanted, first = self.config.data.train_batch_size, self.agent_loop_manager.first_exception()
        raise RuntimeError(f"Of the prompts of a batch, {failures.missing(prompts, wanted, first)}")

    def on_train_begin(self) -> None:
        """Submit the batch of the first step, unless a run that had ended is started again."""
        if self.global_steps <= self.total_training_steps:
            super().on_train_begin()

    def prepare_step(self) -> dict:
        """Submit the batch of the next step; the last one has none."""
        if self.global_steps >= self.total_training_steps:
            return {}
        with self._next_step():
            return super().prepare_step()

    @contextmanager
    def _next_step(self) -> Iterator[None]:
        self.global_steps += 1
        try:
            yield
        finally:
            self.global_steps -= 1

    def take(self, partition: str, prompts: int) -> tuple[KVBatchMeta, dict]:
        batch, found = super().take(partition, prompts)
        if partition == "train":
            found |= staleness.measure(batch.tags, self.global_steps)
        return batch, found

    def on_step_end(self) -> None:
        self._drain()
        super().on_step_end()

    def _drain(self) -> None:
        """Wait until the next batch has been sampled."""
        with marked_timer("drain", self.timing_raw), impatient(self.replay_buffer, self.opd.rollout.silence_seconds):
            self.replay_buffer.wait_for_sampleable(self.global_steps + 1, "train", 0)

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self) -> None:
        self._drain()
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        # verl saves before it clears the rows of the step, which nobody asks for any more.
        rows = (tq.kv_list("train") or {}).get("train", {})
        prompts = {key for key, tag in rows.items() if tag.get("is_prompt")}
        if done := [key for key in rows if key.split("_")[0] not in prompts]:
            tq.kv_clear(keys=done, partition_id="train")


@register_trainer("opd_one_step_off")
class OneStepOffTrainer(AheadTrainer, PPOTrainerColocateAsync):
    """vLLM shares the trainer's devices, and never sleeps."""

    verl_mode = "colocate_async"

    def on_sample_end(self) -> None:
        """The servers stay awake: they are at the next batch."""
        if self.curr_step_profile:
            self._stop_rollout_profiling()


@register_trainer("opd_separate")
class SeparateTrainer(AheadTrainer, PPOTrainerSeparateAsync):
    """vLLM has devices of its own.

    Student and teacher stay in one worker, which has no servers of verl's beside it (``hybrid_engine=false``).
    """

    verl_mode = "separate_async"

    def _setup(self) -> None:
        """verl's, without its line about absent servers: verl 0.9.1 hands ``logging`` a word that it does not take."""
        log = logging.getLogger("verl.trainer.ppo.v1.trainer_separate_async")
        level = log.level
        log.setLevel(logging.WARNING)
        try:
            super()._setup()
        finally:
            log.setLevel(level)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """As in any step: weights are synced after each, so that there is no older policy to go back to."""
        return PPOTrainer._compute_old_log_prob(self, batch, metrics)
