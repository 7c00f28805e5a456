# SPDX-License-Identifier: Apache-2.0
"""Contracts of verl's asynchronous trainer and its buffer: what waits, what the queue and a checkpoint hold."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import transfer_queue
from omegaconf import OmegaConf
from verl.checkpoint_engine import CheckpointEngineManager
from verl.trainer.ppo.v1 import replay_buffer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.utils import tensordict_utils as tu

from .seams import bare, says, seam

ASYNC = "verl.trainer.ppo.v1.trainer_colocate_async:PPOTrainerColocateAsync"
TRAINER = "verl.trainer.ppo.v1.trainer_base:PPOTrainer."
BUFFER = "verl.trainer.ppo.v1.replay_buffer:ReplayBufferAsync."
WHOLE = {"max_off_policy_threshold": 1, "max_off_policy_strategy": "wait"}


def _buffer(config):
    config.trainer.v1.trainer_mode = "colocate_async"
    config.trainer.v1.sampler = OmegaConf.merge(config.trainer.v1.sampler, WHOLE)
    buffer = PPOTrainerColocateAsync(config).replay_buffer
    buffer.poll_interval = 0.001
    return buffer


def _prompt(status, step):
    return {"is_prompt": True, "status": status, "global_steps": step}


@seam(
    "bridge/one_step_off.py",
    covers="AheadTrainer._build_replay_buffer AheadTrainer.replay_buffer AheadTrainer.config "
    "AheadTrainer.agent_loop_manager buffer.refill_fn",
    pins={ASYNC: "config", f"{BUFFER}wait_for_sampleable": "self global_steps partition_id target_count"},
)
def whole_batches(config, queue, monkeypatch):
    """With ``wait`` and a threshold of 1 a step waits for all prompts of its tag and takes those alone, though others
    are finished; a wait for the next step ends when nothing of it is in flight; a prompt that failed is refilled."""
    buffer = _buffer(config)
    assert type(buffer) is replay_buffer.ReplayBufferAsync
    rows = {"a": _prompt("running", 4), "b": _prompt("finished", 4), "c": _prompt("finished", 5), "b_0_0": {"n": 4}}
    queue.kv_batch_put(keys=list(rows), partition_id="train", tags=list(rows.values()))
    waited = []

    def finish(seconds):
        waited.append(seconds)
        queue.kv_batch_put(keys=["a", "a_0_0"], partition_id="train", tags=[_prompt("finished", 4), {"n": 4}])

    monkeypatch.setattr(replay_buffer.time, "sleep", finish)
    batch, _ = buffer.sample(global_steps=4, partition_id="train", batch_size=2)
    assert waited and sorted(batch.keys) == ["a_0_0", "b_0_0"]
    waited.clear()
    buffer.wait_for_sampleable(5, "train", 0)
    assert not waited
    queue.kv_batch_put(keys=["d"], partition_id="train", tags=[_prompt("failure", 5)])
    lost = Mock(side_effect=RuntimeError("rollouts are missing"))
    buffer.refill_fn = lost
    with pytest.raises(RuntimeError, match="rollouts are missing"):
        buffer.wait_for_sampleable(5, "train", 0)
    lost.assert_called_once_with(1)


@seam(
    "bridge/one_step_off.py",
    covers="AheadTrainer.prepare_step AheadTrainer.global_steps AheadTrainer.total_training_steps",
    pins={f"{TRAINER}prepare_step": "self", f"{TRAINER}_submit_batch_to_rollout": "self batch"},
)
def submitted(config, queue):
    """Tag and rows of what is submitted have the trainer's ``global_steps``, and the queue keeps the prompts."""
    config.data.train_batch_size, config.data.gen_batch_size = 2, 1
    loop, names = Mock(), iter("ab")
    trainer = bare(PPOTrainerColocateAsync, config=config, trainer_mode="colocate_async", global_steps=7)
    trainer.agent_loop_manager = loop

    def fetch():
        return tu.get_tensordict({"uid": np.array([next(names)], dtype=object), "first_draw": np.array([0])})

    object.__setattr__(trainer, "_fetch_one_gen_batch", fetch)
    assert trainer.prepare_step() == {}
    assert queue.kv_list("train")["train"] == {"a": _prompt("pending", 7), "b": _prompt("pending", 7)}
    (batch,) = loop.generate_sequences.call_args.args
    assert list(batch["uid"]) == ["a", "b"] and batch["global_steps"] == 7
    assert list(queue.kv_batch_get(keys=["a", "b"], partition_id="train")["uid"]) == ["a", "b"]


@seam(
    "bridge/one_step_off.py",
    covers="OneStepOffTrainer.on_sample_end AheadTrainer.on_step_end AheadTrainer.on_train_begin "
    "AheadTrainer.timing_raw OneStepOffTrainer.curr_step_profile OneStepOffTrainer._stop_rollout_profiling",
    pins={
        f"{ASYNC}.on_sample_end": "self",
        f"{ASYNC}.on_step_end": "self",
        f"{ASYNC}.on_train_begin": "self",
        f"{TRAINER}_stop_rollout_profiling": "self",
    },
)
def awake_servers():
    """verl's end of sampling stops the servers, and nothing but that and the profiler; the end of a step sends weights
    and starts them; the warm-up in front of the first step is what the queue lacks."""
    manager = Mock(spec=CheckpointEngineManager)
    trainer = bare(PPOTrainerColocateAsync, checkpoint_manager=manager, curr_step_profile=False, timing_raw={})
    trainer.global_steps = 4
    trainer.on_sample_end()
    trainer.on_step_end()
    told = [(name, args) for name, args, _ in manager.method_calls]
    sent = [("update_weights", (4,)), ("resume_generation_replicas", ())]
    assert told == [("abort_replicas", ()), ("sleep_replicas", ()), *sent]
    data = SimpleNamespace(train_batch_size=8, get=lambda name, default=None: 1)
    mode = SimpleNamespace(colocate_async=SimpleNamespace(num_warmup_batches=1))
    trainer.config = SimpleNamespace(
        data=data,
        skip=SimpleNamespace(rollout_tq=SimpleNamespace(enable=False)),
        trainer=SimpleNamespace(v1=mode),
    )
    for there, asked in ((0, [8]), (8, [])):
        found = []
        trainer._restored_tq_prompt_count = there
        object.__setattr__(trainer, "_add_prompts_to_generate", found.append)
        trainer.on_train_begin()
        assert found == asked


@seam(
    "bridge/one_step_off.py",
    covers="AheadTrainer._save_checkpoint AheadTrainer._load_checkpoint",
    pins={
        f"{TRAINER}_load_checkpoint": "self",
        "transfer_queue:kv_list": "partition_id=",
        "transfer_queue:save_checkpoint": "checkpoint_dir * include_storage= metadata=",
        "transfer_queue:load_checkpoint": "checkpoint_dir",
    },
)
def queue_in_a_checkpoint(queue):
    """``transfer_queue`` beside ``actor`` is loaded where the trainer is not ``sync``, its prompts are counted, and
    those in flight are submitted again; nobody asks for rows without their prompt."""
    says(
        f"{TRAINER}_load_checkpoint",
        'if self.trainer_mode != "sync": tq_ckpt_path = os.path.join(global_step_folder, "transfer_queue")',
        "tq.load_checkpoint(tq_ckpt_path)",
        "self._restored_tq_prompt_count = _count_tq_prompt_groups()",
    )
    says(f"{TRAINER}fit", "self.global_steps += 1 SkipManager.set_step(self.global_steps) self._reissue_inflight")
    assert transfer_queue.kv_list is queue.kv_list
    queue.kv_batch_put(keys=["a_0_0"], partition_id="train", tags=[{"n": 1}])
    assert queue.kv_list("train")["train"]["a_0_0"] == {"n": 1}


@seam(
    "bridge/staleness.py",
    pins={
        "verl.workers.rollout.llm_server:FullyAsyncLLMServerClient": None,
        "verl.workers.rollout.llm_server:FullyAsyncLLMServerClient.generate": None,
    },
)
def versions():
    """A server counts the versions that it was given, every row has those of its first and last token, and an answer
    that was not cut is one request."""
    says(
        "verl.workers.rollout.vllm_rollout.vllm_rollout:ServerAdapter.update_weights",
        "await self.server_handle.clear_kv_cache.remote()",
        "await self.server_handle.set_global_steps.remote(global_steps)",
    )
    says(
        "verl.workers.rollout.llm_server:FullyAsyncLLMServerClient.generate",
        'if output.stop_reason not in ("aborted", "abort") or not should_retry: break',
        'final_output.extra_fields["min_global_steps"] = min_global_steps',
    )
    says(
        "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ.__ray_metadata__.modified_class._agent_loop_postprocess",
        '"min_global_steps": field["extra_fields"].get("min_global_steps")',
        '"max_global_steps": field["extra_fields"].get("max_global_steps")',
    )
