# SPDX-License-Identifier: Apache-2.0
"""verl's hybrid worker with a teacher: the ``ref`` engine of the same process holds the teacher's weights."""

import copy
import dataclasses
import platform
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.device_mesh import DeviceMesh
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.config import HFModelConfig, TrainingWorkerConfig
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from opd_ext.bridge import checkpoint, old_policy, selftest
from opd_ext.bridge.adapters import TeacherAdapter, local_parts, trained_tensors
from opd_ext.bridge.cpu_platform import init_process_group, own_socket
from opd_ext.bridge.engine import OPDEngine  # which registers itself in this process
from opd_ext.bridge.served_teacher import ServedTeacher
from opd_ext.bridge.teacher_server import Servers
from opd_ext.bridge.teachers import Tutor
from opd_ext.checkpoints.layout import TEACHER, shard_name
from opd_ext.checkpoints.reshard import load_teacher
from opd_ext.config.schema import OPDConfig
from opd_ext.teacher.weights import copy_shards, ema_shards

# Of the student's model config, what an external teacher is loaded with too.
_SHARED_MODEL_SETTINGS = ("override_config", "use_shm", "trust_remote_code", "use_remove_padding", "external_lib")


def _distinct_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer, by name.

    A tied weight appears once, under its first name: a moving average over both names would move it twice.
    """
    tensors = module.state_dict(keep_vars=True)
    first_names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first_names.setdefault(id(tensor), name)
    return {name: tensors[name].detach() for name in first_names.values()}


def _shard_file(folder: str) -> Path:
    return Path(folder) / shard_name(TEACHER, torch.distributed.get_world_size(), torch.distributed.get_rank())


def _is_replica(mesh: DeviceMesh) -> bool:
    """Whether another rank holds the same weights and saves them: under HSDP, whose mesh is (replicas, shards)."""
    return mesh.ndim > 1 and mesh.get_local_rank(0) > 0


class OPDTrainingWorker(TrainingWorker):
    """verl's training worker, able to join a process group without an accelerator.

    Args:
        config: verl's, unchanged.
        model_path: another model than the one that ``config`` names (an external teacher).
    """

    def __init__(self, config: TrainingWorkerConfig, model_path: str | None = None):
        if get_device_name() == "cpu":
            init_process_group()
        if model_path is not None:
            shared = {name: getattr(config.model_config, name) for name in _SHARED_MODEL_SETTINGS}
            config = dataclasses.replace(config, model_config=HFModelConfig(path=model_path, **shared))
        super().__init__(config)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, global_step: int = 0, max_ckpt_to_keep: int | None = None
    ) -> None:
        """Write this rank's files; of replicas only the first writes weights and moments."""
        manager = self.engine.checkpoint_manager
        if _is_replica(self.engine.device_mesh):
            shared = ("model", "optimizer")
            manager.checkpoint_save_contents = [it for it in manager.checkpoint_save_contents if it not in shared]
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False
    ) -> None:
        """Load as verl does where every rank has saved a file; else each takes its rows from whoever has them.

        Raises:
            CheckpointError: it is incomplete, or of another model.
        """
        if not checkpoint.load_resharded(self.engine, Path(local_path)):
            super().load_checkpoint(local_path, hdfs_path, del_local_after_load)


class OPDWorker(ActorRolloutRefWorker):
    """Actor, rollout and teacher in one process."""

    actor_worker_cls = OPDTrainingWorker
    ref_worker_cls = OPDTrainingWorker

    def __init__(self, config: Any, role: str, distillation_config: Any = None, **kwargs: Any):
        # With teacher servers verl would put its own distillation loss in the place of the policy loss.
        super().__init__(config, role, distillation_config=None, **kwargs)
        # Engines with weights of their own, by the name of these weights; without a teacher verl's reference alone.
        self.teachers: dict[str, TrainingWorker] = {}
        self.teacher_paths: dict[str, str | None] = dict(config.get("teacher_paths") or {"": None})
        # In their place beside a LoRA student, by whether they ever move.
        self.teacher_adapters: dict[str, bool] = dict(config.get("teacher_adapters") or {})
        self.adapters: dict[str, TeacherAdapter] = {}
        self.served: dict[str, ServedTeacher] = {}  # those on servers of ours, by the servers' name
        self.ref_worker_cls = self._build_teachers

    def _build_teachers(self, config: TrainingWorkerConfig) -> TrainingWorker:
        """An engine per set of weights, all configured as verl configures its reference; the first takes its place."""
        for name, path in self.teacher_paths.items():
            own = copy.deepcopy(config) if len(self.teacher_paths) > 1 else config
            self.teachers[name] = OPDTrainingWorker(own, path)
        first, *others = self.teachers.values()
        for worker in others:  # verl loads the first
            worker.reset()
        return first

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        """Build the engines and the rollout, whose weights travel over a socket of this run's own on a CPU."""
        super().init_model()
        # Before a checkpoint is loaded: what has not moved so far is the adapter as it was built.
        for name, moves in self.teacher_adapters.items():
            self.adapters[name] = TeacherAdapter(self.actor.engine, moves)
        if get_device_name() == "cpu":
            self.rollout.zmq_handle = own_socket(self.rollout.zmq_handle)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_log_prob(self, data: TensorDict) -> TensorDict | None:
        """verl's pass, or what the update has just computed of the same rows by the weights before it."""
        if not old_policy.is_current(data):
            return super().compute_log_prob(data)
        kept = self.actor.engine.recall()
        if not self.actor.engine.is_mp_src_rank_with_outputs():  # of ranks that share sequences the first one speaks
            return None
        return tu.get_tensordict(kept, {"metrics": {}}).cpu()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reach_servers(self, opd: OPDConfig, servers: Servers) -> None:
        """Learn which servers have which teacher; before a checkpoint is loaded, whose weights go there."""
        for name, view in opd.teacher_servers.items():
            held = None if view.weights is None else self.teachers[view.weights].engine
            serving, key = view.opd.teacher.vllm, view.key
            self.served[name] = ServedTeacher(self.actor.engine, servers[name], serving, key, held)

    def _push(self, name: str) -> None:
        """Teachers on servers have the weights ``name`` from now on (collective)."""
        held = self.teachers.get(name)  # else an adapter, which is not served
        for served in self.served.values():
            if held is not None and served.weights is held.engine:
                served.push()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def count_served(self) -> tuple[float, int, int]:
        """Since the last call: seconds that this rank has waited for its teachers' servers, bytes and rows it got."""
        found = [served.traffic() for served in self.served.values()]
        return sum(each[0] for each in found), sum(each[1] for each in found), sum(each[2] for each in found)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def configure(self, opd: OPDConfig, token_classes: dict[str, list[int]], temperature: float) -> bool:
        """Give the student's engine its loss and its teachers.

        Args:
            opd: the five places; plain values, so that they travel without the user's modules.
            token_classes: see :class:`opd_ext.objective.objective.Objective`.
            temperature: of the rollouts.

        Returns:
            Whether a pass of training is another than one without: the student drops out at random.
        """
        opd.import_external_libs()
        engine = self.actor.engine
        engine.tutors = tuple(
            Tutor(
                view.opd.teacher.kind,
                self.served[view.server] if view.server is not None else self._own(view.weights),
                view.opd.objective(temperature, token_classes),
                view.name,
                view.weight,
                view.opd.teacher.backend == "server",
                view.opd.teacher.foreign,
            )
            for view in opd.views
        )
        for worker in (self.actor, *self.teachers.values()):
            worker.engine.module.get_output_embeddings().fp32 = engine.objective.fp32
        return old_policy.drops_out(engine.module)

    def _own(self, name: str | None) -> OPDEngine | TeacherAdapter | None:
        """What holds a set of weights of a teacher; None: there is none."""
        if name is None:
            return None
        return self.adapters[name] if name in self.adapters else self.teachers[name].engine

    def _tensors(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The student's tensors that a set of a teacher's weights goes after, and that set, by name (aliases)."""
        if name in self.adapters:
            return trained_tensors(self.actor.engine.module), self.adapters[name].weights
        return _distinct_tensors(self.actor.engine.module), _distinct_tensors(self.teachers[name].engine.module)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def selftest(self, probes: list[selftest.Probe]) -> dict[str, Any]:
        """See :func:`opd_ext.bridge.selftest.examine`; every rank finds the same."""
        return selftest.examine(self.actor.engine, probes)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def count_updates(self) -> int:
        """Optimiser steps since the last call that changed the student: those whose gradient was finite."""
        engine = self.actor.engine
        count, engine.updates = engine.updates, 0
        return count

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def refresh_teacher(self, rate: float = 1.0, name: str = "") -> None:
        """Move a teacher's weights towards the student, shard by shard: they += rate (student - they); 1 copies.

        ``name`` is that of the weights, where there are several.

        Both are sharded over the same ranks by the same rule, so no communication is needed.
        """
        student, teacher = map(local_parts, self._tensors(name))
        if rate == 1.0:
            copy_shards(student, teacher)
        else:
            ema_shards(student, teacher, rate)
        self._push(name)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def scale_lr(self, factor: float) -> None:
        """Multiply the student's learning rate, now and for the rest of its schedule."""
        engine = self.actor.engine
        for group in engine.optimizer.param_groups:
            group["lr"] *= factor
            group["initial_lr"] = group.get("initial_lr", group["lr"] / factor) * factor
        engine.lr_scheduler.base_lrs = [rate * factor for rate in engine.lr_scheduler.base_lrs]

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_teacher(self, folder: str, name: str = "") -> None:
        """Write this rank's shards of a teacher to ``folder``; ``name`` as in :meth:`refresh_teacher`."""
        holder = self.actor if name in self.adapters else self.teachers[name]
        if _is_replica(holder.engine.device_mesh):
            return
        path = _shard_file(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(local_parts(self._tensors(name)[1]), path)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_teacher(self, folder: str, name: str = "") -> None:
        """Restore this rank's weights of a teacher from ``folder``, however many ranks wrote them.

        Raises:
            CheckpointError: they are incomplete, or of another model.
        """
        load_teacher(self._tensors(name)[1], Path(folder))
        self._push(name)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def leave_token(self, folder: str) -> str:
        """See :func:`opd_ext.bridge.checkpoint.check_shared`; returns the name of this node."""
        checkpoint.leave_token(folder, torch.distributed.get_rank())
        return platform.node()
