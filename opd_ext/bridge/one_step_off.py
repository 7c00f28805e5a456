# SPDX-License-Identifier: Apache-2.0
"""One step off: while the student trains on a batch, the rollouts of the next one are sampled.

verl's ``colocate_async`` trainer keeps the queue, the warm-up and the weight sync. Two things are ours, and make a run
repeat itself whatever its machine does meanwhile:

* A batch belongs to the step that trains it. It is submitted one step earlier, under the name, the seeds and the tag of
  its own step, so that it has the prompts and random numbers that it has in a synchronous run; the policy that samples
  it is one version older.
* Weights reach vLLM when nothing is in flight. verl would cut what is unfinished and let newer weights go on with it,
  so that a rollout were of several policies, of which ones by the clock. Here every rollout is of one.

So a checkpoint finds the queue at rest, with the whole next batch in it, and a killed run goes on from both.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.utils.debug import marked_timer

from opd_ext.bridge import failures, staleness
from opd_ext.bridge.liveness import impatient
from opd_ext.bridge.trainer import OPDTrainer


@register_trainer("opd_one_step_off")
class OneStepOffTrainer(OPDTrainer, PPOTrainerColocateAsync):
    """Samples the next batch while it trains."""

    verl_mode = "colocate_async"

    def _build_replay_buffer(self) -> ReplayBuffer:
        buffer = super()._build_replay_buffer()
        buffer.refill_fn = self._lost
        return buffer

    def _lost(self, prompts: int) -> None:
        """verl would drop prompts whose rollouts did not arrive and sample others; a run of ours ends."""
        wanted, first = self.config.data.train_batch_size, self.agent_loop_manager.first_exception()
        raise RuntimeError(f"Of the prompts of a batch, {failures.missing(prompts, wanted, first)}")

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

    def on_sample_end(self) -> None:
        """The servers stay awake: they are at the next batch."""
        if self.curr_step_profile:
            self._stop_rollout_profiling()

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
