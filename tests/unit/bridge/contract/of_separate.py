# SPDX-License-Identifier: Apache-2.0
"""Contracts of verl's trainer whose vLLM has devices of its own, and of the way that weights take there."""

import asyncio
import socket
import threading

import torch
from torch.distributed import TCPStore
from verl.checkpoint_engine.base import CheckpointEngineRegistry
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.workers.rollout import base

from opd_ext.bridge import gloo_weights

from .seams import bare, says, seam

SEPARATE = "verl.trainer.ppo.v1.trainer_separate_async:PPOTrainerSeparateAsync"
ENGINE = "verl.checkpoint_engine.base:CheckpointEngine"


@seam(
    "bridge/one_step_off.py",
    covers="SeparateTrainer._setup SeparateTrainer._compute_old_log_prob",
    pins={SEPARATE: "config", f"{SEPARATE}._compute_old_log_prob": "self batch metrics", f"{SEPARATE}._setup": "self"},
)
def servers_of_their_own():
    """With ``hybrid_engine=false`` there are no servers on the trainer's devices, whichever role its workers have; the
    servers elsewhere are asked, synced, and found by ``_rollout_server_managers``; a step syncs weights once."""
    says(f"{SEPARATE}.__init__", 'self._enable_hybrid_replicas = bool(config.actor_rollout_ref.get("hybrid_engine"')
    says(
        "verl.trainer.ppo.v1.trainer_base:PPOTrainer._setup",
        'if getattr(self, "_enable_hybrid_replicas", True): self.llm_server_manager: LLMServerManager =',
        "else: self.llm_server_manager = LLMServerManager.create_empty(config=self.config)",
        "elif Role.ActorRolloutRef in self.role_worker_mapping",
    )
    says(f"{SEPARATE}._setup", "self.standalone_server_manager: LLMServerManager = LLMServerManager.create(")
    says(f"{SEPARATE}._setup", "logger.info(", "flush=True")
    says("verl.trainer.ppo.v1.trainer_separate_async:", "logger = logging.getLogger(__name__)")
    says(f"{SEPARATE}.on_step_end", "self.standalone_checkpoint_manager.update_weights(self.global_steps)")
    managers = {"llm_server_manager": "beside", "standalone_server_manager": "apart"}
    assert bare(PPOTrainerSeparateAsync, **managers)._rollout_server_managers() == ["beside", "apart"]
    says(f"{SEPARATE}._compute_old_log_prob", "self.actor_rollout_wg.save_model_to_cpu(0)")


@seam(
    "bridge/trainer.py",
    covers="OPDTrainer._rollout_server_managers",
    pins={"verl.trainer.ppo.v1.trainer_base:PPOTrainer._rollout_server_managers": "self"},
)
def server_managers():
    """The managers of all servers that sample."""
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    assert bare(PPOTrainerSync, llm_server_manager="one")._rollout_server_managers() == ["one"]


@seam(
    "bridge/gloo_weights.py",
    covers="GlooCheckpointEngine.prepare GlooCheckpointEngine.build_topology "
    "GlooCheckpointEngine.init_process_group GlooCheckpointEngine.finalize GlooCheckpointEngine.send_weights "
    "GlooCheckpointEngine.receive_weights",
    pins={
        "verl.checkpoint_engine.base:CheckpointEngineRegistry": None,
        f"{ENGINE}.prepare": "self",
        f"{ENGINE}.build_topology": "cls actor_wg_world_size rollout_world_size metadata",
        f"{ENGINE}.init_process_group": "self **kwargs",
        f"{ENGINE}.send_weights": "self weights global_steps=",
        f"{ENGINE}.receive_weights": "self global_steps=",
        "ray.util:get_node_ip_address": None,
    },
)
def gloo(monkeypatch):
    """A backend is found by its name, and gives tensors of any dtype and shape as they were sent, sync after sync."""
    monkeypatch.setattr(gloo_weights, "get_node_ip_address", lambda: socket.gethostbyname("localhost"))
    kind = CheckpointEngineRegistry.get("gloo")
    assert kind is gloo_weights.GlooCheckpointEngine
    sender, idle, receiver = kind(bucket_size=1, is_master=True), kind(bucket_size=1), kind(bucket_size=1)
    address = sender.prepare()
    assert isinstance(sender._store, TCPStore) and receiver.prepare() is None and address == sender.prepare()
    actors, rollouts = kind.build_topology(2, 1, [address, None, None])
    assert (actors["rank"], rollouts["rank"], rollouts["world_size"]) == ([0, -1], [1], [2])
    sent = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2), "c": torch.ones(3, dtype=torch.bfloat16)}
    walked = []

    def weights(seen):
        for name, tensor in sent.items():
            seen.append(name)
            yield name, tensor

    def receive(found):
        async def all_of_them():
            return {name: tensor async for name, tensor in receiver.receive_weights()}

        receiver.init_process_group(rank=1, world_size=2, address=address)
        found.update(asyncio.run(all_of_them()))

    for version in (1, 2):
        found: dict[str, torch.Tensor] = {}
        thread = threading.Thread(target=receive, args=(found,))
        thread.start()
        sender.init_process_group(rank=0, world_size=2, address=address)
        asyncio.run(sender.send_weights(weights([]), global_steps=version))
        thread.join(30)
        assert found.keys() == sent.keys() and all(torch.equal(found[name], sent[name]) for name in sent)
        assert all(found[name].dtype == sent[name].dtype for name in sent)
        sent["a"] = sent["a"] + 1
        sender.finalize()
    idle.init_process_group(rank=-1, world_size=2, address=address)
    asyncio.run(idle.send_weights(weights(walked)))
    assert walked == list(sent)


@seam(
    "bridge/gloo_weights.py",
    covers="OwnSocketAdapter.__init__ OwnSocketAdapter.zmq_handle _ROLLOUT_REGISTRY",
    pins={
        "verl.workers.rollout.vllm_rollout:ServerAdapter": None,
        "verl.workers.rollout:base": None,
        "verl.workers.rollout.base:_ROLLOUT_REGISTRY": None,
    },
)
def socket_of_a_server(monkeypatch):
    """The class that talks to a server is looked up by name after the module of the backend was imported."""
    assert base.get_rollout_class("vllm", "async") is gloo_weights.OwnSocketAdapter
    says(
        "verl.checkpoint_engine.base:CheckpointEngineWorker.__init__",
        "import_external_libs(self.rollout_config.checkpoint_engine.custom_backend_module or None)",
    )
    monkeypatch.setenv("OPD_RUN", "abc")
    from opd_ext.bridge.cpu_platform import own_socket

    assert own_socket(own_socket("ipc:///tmp/x")) == "ipc:///tmp/x.abc"
