# SPDX-License-Identifier: Apache-2.0
"""Contracts of verl's trainer: registration, set-up, and the loop that our hooks hang in."""

import inspect
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta, interface
from verl.checkpoint_engine import CheckpointEngineManager
from verl.experimental.reward_loop import RewardLoopManager
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import replay_buffer, trainer_base
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn
from verl.workers.engine_workers import ActorRolloutRefWorker

from opd_ext.bridge import checkpoint
from opd_ext.errors import RunError

from .seams import bare, says, seam

BASE = "verl.trainer.ppo.v1.trainer_base:"
SYNC = "verl.trainer.ppo.v1.trainer_sync:PPOTrainerSync"
TRAINER = f"{BASE}PPOTrainer."


@seam("bridge/trainer.py", pins={f"{BASE}register_trainer": "name", f"{BASE}get_trainer_cls": "name"})
def registry(monkeypatch):
    """A trainer is found under the name it was registered with; registering the same class again is allowed."""
    monkeypatch.setattr(trainer_base, "TRAINER_REGISTRY", dict(trainer_base.TRAINER_REGISTRY))
    probe = type("Probe", (PPOTrainerSync,), {})
    for _ in range(2):
        assert trainer_base.register_trainer("contract")(probe) is probe
    assert trainer_base.get_trainer_cls("contract") is probe


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer.__init__ OPDTrainer.config config.trainer.v1.trainer_mode",
    pins={f"{TRAINER}__init__": "self config", SYNC: "config"},
)
def construction(config):
    """The base class branches on ``trainer.v1.trainer_mode``: only ``sync`` gives the synchronous replay buffer."""
    config.trainer.v1.trainer_mode = "sync"
    trainer = PPOTrainerSync(config)
    assert type(trainer.replay_buffer) is replay_buffer.ReplayBuffer
    assert trainer.config is config and trainer.parameter_sync_step == 1
    assert trainer.use_reference_policy is False
    config.trainer.v1.trainer_mode = "opd"
    assert type(PPOTrainerSync(config).replay_buffer) is replay_buffer.ReplayBufferAsync


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer._build_replay_buffer buffer.poll_interval OPDTrainer.replay_buffer",
    pins={
        f"{TRAINER}_build_replay_buffer": "self",
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer": None,
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer.sample": "self global_steps partition_id batch_size",
    },
)
def replay(config, queue, monkeypatch):
    """``sample`` sleeps ``poll_interval`` (2 s unless it is set) until the prompts are done, then gives their rows."""
    config.trainer.v1.trainer_mode = "sync"
    buffer, slept = PPOTrainerSync(config).replay_buffer, []
    assert buffer.poll_interval == 2.0
    buffer.poll_interval = 0.05
    prompt = {"is_prompt": True, "global_steps": 1}
    queue.kv_batch_put(keys=["t1p0"], partition_id="train", tags=[prompt | {"status": "pending"}])
    queue.kv_batch_put(keys=["t1p0_0_0"], partition_id="train", tags=[{"seq_len": 5}])

    def finish(seconds):
        slept.append(seconds)
        queue.kv_batch_put(keys=["t1p0"], partition_id="train", tags=[prompt | {"status": "finished"}])

    monkeypatch.setattr(replay_buffer.time, "sleep", finish)
    batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=1)
    assert slept == [0.05] and isinstance(metrics, dict)
    assert (batch.keys, batch.tags, batch.partition_id) == (["t1p0_0_0"], [{"seq_len": 5}], "train")
    assert batch.extra_info == {}, "what the trainer adds its temperature to"


@seam(
    "bridge/liveness.py",
    covers="buffer._wait_for_next_poll __ray_ready__ _TQ_CONTROLLER _TQ_STORAGE OPDTrainer.teacher_model_manager",
    pins={
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._wait_for_next_poll": "self partition_id last_debug_time",
        "verl.workers.rollout.llm_server:LLMServerManager.get_replicas": "self",
        "ray:wait": None,
        "transfer_queue.interface:_TQ_CONTROLLER": None,
        "transfer_queue.interface:_TQ_STORAGE": None,
        "ray:get": None,
        "ray.exceptions:RayActorError": None,
        "ray.exceptions:ActorUnavailableError": None,
    },
)
def waiting(config, queue):
    """A wait for rollouts goes through ``_wait_for_next_poll``, with what is out in ``pending_keys`` and
    ``running_keys``; a replica lists its ``servers``; every actor answers ``__ray_ready__``."""
    config.trainer.v1.trainer_mode = "sync"
    buffer = PPOTrainerSync(config).replay_buffer
    buffer.poll_interval = 0.001
    prompt = {"is_prompt": True, "global_steps": 1}
    queue.kv_batch_put(keys=["t1p0"], partition_id="train", tags=[prompt | {"status": "pending"}])
    queue.kv_batch_put(keys=["t1p1"], partition_id="train", tags=[prompt | {"status": "running"}])
    from opd_ext.bridge.liveness import impatient

    with pytest.raises(RunError, match="those of 2 prompts are still out"), impatient(buffer, 0.05):
        buffer.sample(global_steps=1, partition_id="train", batch_size=2)
    assert "_wait_for_next_poll" not in vars(buffer), "the buffer is verl's own again"
    says("verl.workers.rollout.replica:RolloutReplica.__init__", "self.servers: list[ActorHandle] = []")
    assert issubclass(ray.exceptions.ActorUnavailableError, ray.exceptions.RayActorError)
    says("verl.trainer.ppo.v1.trainer_base:PPOTrainer._setup", "self.llm_server_manager: LLMServerManager =")
    teachers = "verl.experimental.teacher_loop.teacher_model:"
    says("verl.trainer.ppo.v1.trainer_base:PPOTrainer._setup", "self.teacher_model_manager = MultiTeacherModelManager(")
    says("verl.trainer.ppo.v1.trainer_base:PPOTrainer._setup", "self.teacher_model_manager = None")
    says(f"{teachers}MultiTeacherModelManager.__init__", "self.teacher_model_managers: dict[str, TeacherModelManager]")
    says(f"{teachers}TeacherModelManager._initialize_llm_servers", "self.rollout_replicas = [")
    says("ray.actor:_modify_class", "def __ray_ready__(self): return True")
    assert interface._TQ_CONTROLLER is None and not interface._TQ_STORAGE, (
        "handles, where this process has started them"
    )


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer._init_resource_pool_mgr OPDTrainer.role_worker_mapping OPDTrainer.mapping "
    "OPDTrainer.resource_pool_manager self.resource_pool_manager.mapping OPDTrainer.use_reference_policy",
    pins={
        f"{TRAINER}_init_resource_pool_mgr": "self",
        "ray:remote": None,
        "verl.trainer.ppo.utils:Role": None,
    },
)
def placement(config):
    """The worker's class stands under its role, its pool under ``global_pool``; the manager looks up its mapping."""
    trainer = bare(PPOTrainerSync, config=config)
    trainer._init_resource_pool_mgr()
    assert list(trainer.role_worker_mapping) == [Role.ActorRollout]
    placed = trainer.role_worker_mapping[Role.ActorRollout]
    assert isinstance(placed, ray.actor.ActorClass)
    assert placed.__ray_metadata__.modified_class.__name__ == ActorRolloutRefWorker.__name__
    assert trainer.mapping[Role.ActorRollout] == "global_pool"
    manager = trainer.resource_pool_manager
    assert manager.mapping is trainer.mapping
    manager.mapping = {Role.ActorRolloutRef: "global_pool"}
    manager.resource_pool_dict = {"global_pool": "the pool"}
    assert manager.get_resource_pool(Role.ActorRolloutRef) == "the pool"
    # `_setup` starts Ray actors. It prefers the role with a reference engine, and passes what our worker takes.
    says(
        f"{TRAINER}_setup",
        "elif Role.ActorRolloutRef in self.role_worker_mapping",
        "cls=self.role_worker_mapping[actor_role], config=self.config.actor_rollout_ref,"
        'distillation_config=self.config.get("distillation"), role=str(actor_role)',
        "self.actor_rollout_wg = all_wg[str(actor_role)]",
    )
    assert str(Role.ActorRolloutRef) == "actor_rollout_ref" and str(Role.ActorRollout) == "actor_rollout"


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer.on_init_end OPDTrainer.actor_rollout_wg",
    pins={f"{SYNC}.on_init_end": "self", f"{TRAINER}init": "self", f"{TRAINER}_setup": "self"},
)
def initialisation():
    """``on_init_end`` follows the set-up, checkpoint included, and sends the weights to vLLM."""
    order = []
    probe = type("Probe", (PPOTrainerSync,), {"_setup": lambda self: order.append("set-up")})
    manager = Mock(update_weights=lambda step: order.append(f"weights of step {step}"))
    bare(probe, checkpoint_manager=manager, global_steps=3).init()
    assert order == ["set-up", "weights of step 3"]
    # `_setup` starts Ray actors and vLLM; the order of our hooks in it stands in its text.
    source = inspect.getsource(PPOTrainerSync._setup)
    hooks = ["_init_tokenizer", "_init_dataloader", "_init_resource_pool_mgr", "init_model", "_load_checkpoint"]
    places = [source.index(f"{hook}()") for hook in hooks]
    assert places == sorted(places)


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer._init_tokenizer OPDTrainer.tokenizer",
    pins={f"{TRAINER}_init_tokenizer": "self"},
)
def tokenizer(config):
    """``tokenizer`` is that of ``actor_rollout_ref.model``."""
    trainer = bare(PPOTrainerSync, config=config)
    trainer._init_tokenizer()
    text = "1 + 2 ="
    assert trainer.tokenizer.decode(trainer.tokenizer.encode(text), skip_special_tokens=True).strip() == text
    assert isinstance(trainer.tokenizer.eos_token_id, int)


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer._init_dataloader OPDTrainer.train_dataset OPDTrainer.val_dataset "
    "OPDTrainer.total_training_steps OPDTrainer._fetch_one_gen_batch",
    pins={
        f"{TRAINER}_init_dataloader": "self",
        f"{TRAINER}_fetch_one_gen_batch": "self",
        "verl.utils.dataset.rl_dataset:collate_fn": "data_list",
    },
)
def data(config, tmp_path):
    """Data sets, a loader whose position can be saved, the step count; a batch has random names that may be changed."""
    prompt = [{"role": "user", "content": "1 + 1"}]
    row = {"prompt": prompt, "data_source": "d", "reward_model": {"ground_truth": "2"}, "extra_info": {"index": 0}}
    pd.DataFrame([row] * 4).to_parquet(tmp_path / "data.parquet")
    changes = {"train_files": str(tmp_path / "data.parquet"), "val_files": str(tmp_path / "data.parquet")}
    changes |= {"train_batch_size": 2, "filter_overlong_prompts": False}
    config.data = OmegaConf.merge(config.data, changes)
    config.trainer.total_training_steps = 7
    trainer = bare(PPOTrainerSync, config=config, trainer_mode="sync", parameter_sync_step=1, global_steps=1)
    trainer._init_tokenizer()
    trainer._init_dataloader()
    assert (len(trainer.train_dataset), len(trainer.val_dataset), trainer.total_training_steps) == (4, 4, 7)
    assert isinstance(trainer.train_dataloader.state_dict(), dict)
    rows = [trainer.val_dataset[i] for i in (0, 2)]  # of which a validation takes those that it wants
    assert rows[0]["raw_prompt"] == prompt and rows[0]["data_source"] == "d"
    assert len(collate_fn(rows)["raw_prompt"]) == 2
    batch = trainer._fetch_one_gen_batch()
    assert len(batch) == 2
    batch.update(tu.get_tensordict({"uid": np.array(["a", "b"], dtype=object)}))
    assert list(batch["uid"]) == ["a", "b"]
    assert config.actor_rollout_ref.actor.optim.total_training_steps == 7


class _Loop(PPOTrainerSync):
    """verl's loop over hooks that write down their turn."""

    def _step_once(self, metrics, timing_raw, sample_batch_size):
        self.turns.append(f"step {self.global_steps} of {sample_batch_size}")
        metrics |= {"opd/loss": 0.5, "memory/max_memory_allocated_gb": 2.0}
        if self.global_steps == 2:
            self.total_training_steps = 2  # how a run ends early
        key = f"t{self.global_steps}"
        self.queue.kv_batch_put(keys=[key], partition_id="train", tags=[{}])
        return KVBatchMeta(partition_id="train", keys=[key], tags=[{}])

    def _validate(self):
        self.turns.append(f"validate {self.global_steps}")
        return {"val/accuracy": 1.0}

    def _compute_metrics(self, batch, metrics, timing_raw, global_steps, epoch):
        self.turns.append(f"metrics {global_steps} epoch {epoch}")
        assert {"opd/loss": 0.5, "memory/max_memory_allocated_gb": 2.0}.items() <= metrics.items()
        assert {"step", "save_checkpoint"} <= timing_raw.keys()


for _hook in ("prepare_step", "_save_checkpoint", "on_step_end", "on_train_begin", "on_train_end"):
    setattr(_Loop, _hook, lambda self, _hook=_hook: self.turns.append(_hook))


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer.fit OPDTrainer._validate _validate OPDTrainer._compute_metrics OPDTrainer._step_once "
    "OPDTrainer.global_steps OPDTrainer.agent_loop_manager trainer.total_training_steps",
    pins={
        f"{TRAINER}fit": "self agent_loop_manager",
        f"{TRAINER}step": "self metrics timing_raw",
        f"{TRAINER}_step_once": "self metrics timing_raw sample_batch_size",
        f"{TRAINER}_validate": "self",
        f"{TRAINER}_compute_metrics": "self batch metrics timing_raw global_steps epoch",
    },
)
def loop(config, queue):
    """Validation first; then step, save, weights, validation, metrics; a smaller ``total_training_steps`` ends it."""
    config.trainer = OmegaConf.merge(config.trainer, {"logger": [], "save_freq": 1, "test_freq": 2})
    config.data.train_batch_size = 8
    trainer = bare(_Loop, config=config, queue=queue, turns=[], global_steps=0, steps_per_epoch=10)
    trainer.total_training_steps, trainer.parameter_sync_step, trainer.trainer_mode = 5, 1, "sync"
    trainer._init_dump_executor()
    trainer.fit("the agent loop")
    one = ["prepare_step", "step 1 of 8", "_save_checkpoint", "on_step_end", "metrics 1 epoch 0"]
    two = ["prepare_step", "step 2 of 8", "_save_checkpoint", "on_step_end", "validate 2", "metrics 2 epoch 0"]
    assert trainer.turns == ["validate 0", "on_train_begin", *one, *two, "on_train_end"]
    assert trainer.agent_loop_manager == "the agent loop"
    assert queue.kv_list("train") in ({}, {"train": {}}), "the loop clears the rows of a step"


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer.on_sample_begin OPDTrainer.on_sample_end",
    pins={f"{TRAINER}on_sample_begin": "self", f"{SYNC}.on_sample_end": "self", f"{SYNC}.on_step_end": "self"},
)
def sleeping_servers():
    """vLLM sleeps from the end of sampling until the step's weights arrive: annotators must be done before."""
    manager = Mock(spec=CheckpointEngineManager)
    trainer = bare(PPOTrainerSync, checkpoint_manager=manager, curr_step_profile=False, global_steps=4, timing_raw={})
    trainer.on_sample_begin()
    assert not manager.method_calls
    trainer.on_sample_end()
    trainer.on_step_end()
    told = [(name, args) for name, args, _ in manager.method_calls]
    assert told == [("sleep_replicas", ()), ("update_weights", (4,))]


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer._save_checkpoint OPDTrainer.checkpoint_callback",
    pins={
        f"{TRAINER}_save_checkpoint": "self",
        "verl.workers.engine_workers:ActorRolloutRefWorker.save_checkpoint": "self local_path hdfs_path= global_step= "
        "max_ckpt_to_keep=",
        "verl.trainer.ppo.checkpoint_callback:CheckpointCallback.on_save": "self trainer global_step checkpoint_dir "
        "async_save= **kwargs",
    },
)
def saving(config):
    """``checkpoint_callback`` is there for every configuration; the user's is told of a checkpoint by keyword."""
    config.trainer.v1.trainer_mode = "sync"
    callback = PPOTrainerSync(config).checkpoint_callback
    assert callback.on_save(trainer=None, global_step=1, checkpoint_dir="folder", async_save=False) is None
    assert "max_actor_ckpt_to_keep" in config.trainer and "default_local_dir" in config.trainer


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer._load_checkpoint",
    pins={
        f"{TRAINER}_load_checkpoint": "self",
        "verl.utils.checkpoint.checkpoint_manager:find_latest_ckpt_path": None,
        "verl.workers.engine_workers:ActorRolloutRefWorker.load_checkpoint": "self local_path hdfs_path= "
        "del_local_after_load=",
    },
)
def resuming(config, tmp_path):
    """verl finds the checkpoint that our tracker file names, loads ``actor/`` and ``data.pt``, and sets the step."""
    folder = checkpoint.begin(tmp_path, 3)
    (folder / "actor").mkdir()
    torch.save({"position": 12}, folder / "data.pt")
    checkpoint.commit(folder, tmp_path, 3, keep=None)
    config.trainer.default_local_dir, config.trainer.resume_mode = str(tmp_path), "auto"
    workers, loader = Mock(), Mock()
    trainer = bare(PPOTrainerSync, config=config, use_critic=False, trainer_mode="sync")
    trainer.actor_rollout_wg, trainer.train_dataloader = workers, loader
    trainer._load_checkpoint()
    assert trainer.global_steps == 3
    assert workers.load_checkpoint.call_args.kwargs["local_path"] == str(tmp_path / "global_step_3" / "actor")
    loader.load_state_dict.assert_called_once_with({"position": 12})
    config.trainer.resume_mode = "disable"
    trainer._load_checkpoint()
    assert trainer.global_steps == 0


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer.reward_loop_manager OPDTrainer._compute_reward_colocate",
    pins={f"{TRAINER}_compute_reward_colocate": "self batch metrics="},
)
def colocated_reward(queue, jagged):
    """Without reward workers, the model's scores arrive as ``rm_scores``, one per response token."""
    from tensordict import TensorDict
    from verl.protocol import DataProto

    fields = {"prompts": jagged([[1], [2, 3]]), "responses": jagged([[4, 5], [6]]), "raw_prompt": [[{}], [{}]]}
    batch = queue.kv_batch_put(keys=["a", "b"], partition_id="train", fields=tu.get_tensordict(fields))
    scores = TensorDict({"rm_scores": torch.tensor([[0.0, 1.0], [0.5, 9.0]])}, batch_size=2)
    manager = Mock(compute_rm_score=lambda data: DataProto(batch=scores, meta_info={}))
    trainer = bare(PPOTrainerSync, reward_loop_manager=manager, tokenizer=SimpleNamespace(pad_token_id=0))
    trainer._compute_reward_colocate(batch, metrics={})
    found = queue.kv_batch_get(keys=["a", "b"], partition_id="train", select_fields=["rm_scores"])["rm_scores"]
    assert [row.tolist() for row in found.unbind()] == [[0.0, 1.0], [0.5]]
    assert hasattr(RewardLoopManager, "reward_loop_worker_handles")
