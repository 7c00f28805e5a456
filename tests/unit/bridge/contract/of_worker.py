# SPDX-License-Identifier: Apache-2.0
"""Contracts of verl's workers: what they build, how they are called, and which numbers they give back."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import verl
from omegaconf import OmegaConf
from verl.single_controller.base.decorator import (
    DISPATCH_MODE_FN_REGISTRY,
    MAGIC_ATTR,
    Dispatch,
    get_predefined_dispatch_fn,
    register,
)
from verl.trainer.distillation import is_distillation_enabled
from verl.utils import tensordict_utils as tu
from verl.utils.metric.utils import Metric
from verl.workers import engine_workers
from verl.workers.config import HFModelConfig, TrainingWorkerConfig
from verl.workers.engine import base as engine_base
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from opd_ext.bridge import worker as ours

from .seams import bare, says, seam

WORKERS = "verl.workers.engine_workers:"
HYBRID = f"{WORKERS}ActorRolloutRefWorker."


def _built(role: str, config, **kinds):
    """The configuration that ``init_model`` passes to the inner worker of ``role``."""
    worker = bare(ActorRolloutRefWorker, config=config.actor_rollout_ref, role=role, distillation_enabled=False)
    worker._omega_profiler_config = {}
    kind = Mock()
    kind.return_value.get_dispatch_collect.return_value = {}
    object.__setattr__(worker, "set_dispatch_collect", lambda mesh_name: None)
    object.__setattr__(worker, f"{role}_worker_cls", kind)
    worker.init_model()
    getattr(worker, role).reset.assert_called_once_with()
    return kind.call_args.kwargs["config"]


@seam(
    "bridge/worker.py",
    covers="OPDWorker.__init__ OPDWorker.actor_worker_cls OPDWorker.ref_worker_cls OPDWorker.init_model "
    "OPDWorker.actor config.actor_rollout_ref.teacher_paths config.actor_rollout_ref.teacher_adapters",
    pins={
        f"{HYBRID}__init__": "self config role distillation_config= **kwargs",
        f"{HYBRID}init_model": "self",
        f"{WORKERS}ActorRolloutRefWorker": None,
    },
)
def inner_workers(config):
    """``init_model`` builds ``ref`` and ``actor`` with the classes that the worker names, each from one config."""
    assert ActorRolloutRefWorker.actor_worker_cls is ActorRolloutRefWorker.ref_worker_cls is TrainingWorker
    budget = config.actor_rollout_ref.ref.log_prob_max_token_len_per_gpu
    found = _built("ref", config)
    assert isinstance(found, TrainingWorkerConfig) and found.model_type == "language_model"
    assert found.engine_config.forward_only is True, "what tells the teacher's engine from the student's"
    assert found.engine_config.infer_max_token_len_per_gpu == budget, "of the teacher's pass"
    assert found.engine_config.infer_micro_batch_size_per_gpu == 1 and found.engine_config.use_remove_padding is True
    assert not is_distillation_enabled(None), "so that verl's distillation loss stays out"


@seam(
    "bridge/worker.py",
    pins={f"{WORKERS}TrainingWorker": None, "verl.workers.config:FSDPActorConfig": None},
)
def gradient_clip(config, one_rank):
    """The optimiser clips at ``actor.optim.clip_grad``; nothing reads ``actor.grad_clip``."""
    config.actor_rollout_ref.actor.grad_clip = 0.125
    config.actor_rollout_ref.actor.optim.clip_grad = 0.5
    found = _built("actor", config)
    assert found.optimizer_config.clip_grad == 0.5
    assert found.engine_config.forward_only is False and found.engine_config.strategy == "fsdp2"


@seam("config/opd.yaml", pins={"verl.workers.config:FSDPEngineConfig": None})
def gradient_sync_config(config, one_rank):
    """Both engines get ``use_no_sync_for_gradient_accumulation: false`` from verl's YAML, whose dataclass says true."""
    for role in ("ref", "actor"):
        assert _built(role, config).engine_config.use_no_sync_for_gradient_accumulation is False
    # An 8B student would otherwise hold 30 GiB of unsharded gradients from its second micro-batch on.


@seam(
    "bridge/worker.py",
    covers="OPDTrainingWorker.__init__",
    pins={f"{WORKERS}TrainingWorker.__init__": "self config", "verl.workers.config:HFModelConfig": None},
)
def external_teacher(model):
    """A worker's config can be copied with another model, of the same settings but for its path."""
    shared = {name: getattr(HFModelConfig(path=model), name) for name in ours._SHARED_MODEL_SETTINGS}
    student = TrainingWorkerConfig(model_type="language_model", model_config="student", optimizer_config="kept")
    teacher = dataclasses.replace(student, model_config=HFModelConfig(path=model, **shared))
    assert teacher.model_config.path == model and teacher.optimizer_config == "kept"
    assert student.model_config == "student"


MANAGER = "verl.utils.checkpoint.checkpoint_manager:BaseCheckpointManager."
FSDP = "verl.workers.engine.fsdp.transformer_impl:FSDPEngine."


@seam("bridge/worker.py", covers="engine.lr_scheduler.base_lrs")
def learning_rate(engine):
    """The engine's schedule is one of torch's: a rate is ``base_lrs`` times a factor of the step."""
    schedule = engine.lr_scheduler
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    assert len(schedule.base_lrs) == len(engine.optimizer.param_groups) == len(schedule.lr_lambdas)
    says("torch.optim.lr_scheduler:LambdaLR.get_lr", "base_lr * lmbda(self.last_epoch)")


@seam(
    "bridge/worker.py",
    covers="OPDTrainingWorker.save_checkpoint OPDTrainingWorker.load_checkpoint OPDTrainingWorker.engine "
    "manager.checkpoint_save_contents",
    pins={
        f"{WORKERS}TrainingWorker.save_checkpoint": "self local_path hdfs_path= global_step= max_ckpt_to_keep=",
        f"{WORKERS}TrainingWorker.load_checkpoint": "self local_path hdfs_path= del_local_after_load=",
        f"{MANAGER}load_rng_state": "rng_state",
        f"{FSDP}to": "self device model= optimizer= grad=",
        f"{FSDP}is_optimizer_offload_enabled": None,
    },
)
def checkpoints(engine, tmp_path):
    """A rank writes ``<part>_world_size_<W>_rank_<R>.pt`` of the parts in its manager's ``checkpoint_save_contents``.

    Its engine has ``module``, ``optimizer``, ``lr_scheduler`` and the ``device_mesh`` whose first axis are replicas.
    """
    engine.save_checkpoint(str(tmp_path / "all"))
    parts = {"model_": "should_load_model", "optim_": "should_load_optimizer", "extra_state_": "should_load_extra"}
    ours = f"{{}}world_size_{engine.device_mesh.size()}_rank_0.pt"
    assert {path.name for path in (tmp_path / "all").glob("*.pt")} == {ours.format(part) for part in parts}
    assert all(getattr(engine.checkpoint_manager, asked) for asked in parts.values())
    kept, engine.checkpoint_manager.checkpoint_save_contents = (
        engine.checkpoint_manager.checkpoint_save_contents,
        ["extra"],
    )
    engine.save_checkpoint(str(tmp_path / "extra"))
    engine.checkpoint_manager.checkpoint_save_contents = kept
    assert [path.name for path in (tmp_path / "extra").glob("*.pt")] == [ours.format("extra_state_")]
    extra = torch.load(tmp_path / "all" / ours.format("extra_state_"), weights_only=False)
    assert extra.keys() == {"lr_scheduler", "rng"}
    assert engine.module and engine.optimizer and engine.lr_scheduler
    says("verl.workers.engine.fsdp.utils:create_device_mesh", 'mesh_dim_names=["ddp", "fsdp"]')


@seam(
    "bridge/cpu_platform.py",
    pins={"verl.utils.distributed:initialize_global_process_group_ray": "timeout_second= backend="},
)
def joining(monkeypatch):
    """A worker leaves an initialised process group as it is, and asks otherwise for ``cpu:gloo,cpu:gloo``."""
    from verl.utils import distributed

    asked = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **kwargs: asked.append(kwargs["backend"]))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    distributed.initialize_global_process_group_ray()
    assert not asked
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    distributed.initialize_global_process_group_ray()
    assert asked == ["cpu:gloo,cpu:gloo"], "if this can be joined now, init_process_group need not come first"
    # The worker itself needs the environment of a Ray actor, so its call is read, not run.
    says(f"{WORKERS}TrainingWorker.__init__", "initialize_global_process_group_ray(timeout_second=None)")


@seam(
    "bridge/worker.py",
    covers="OPDWorker.compute_log_prob",
    pins={
        f"{HYBRID}compute_log_prob": "self data",
        "verl.single_controller.base.decorator:make_nd_compute_dataproto_dispatch_fn": "mesh_name",
    },
)
def rows_of_ranks():
    """``compute_log_prob`` is sent the rows of each rank, by the mesh of the actor, as ours is."""
    theirs, mine = (getattr(kind.compute_log_prob, MAGIC_ATTR) for kind in (ActorRolloutRefWorker, ours.OPDWorker))
    for name in ("dispatch_fn", "collect_fn"):
        a, b = theirs["dispatch_mode"][name], mine["dispatch_mode"][name]
        assert (a.func, a.args) == (b.func, b.args) == (a.func, ("actor",))
    assert theirs["blocking"] is mine["blocking"] is True


@seam(
    "bridge/worker.py",
    pins={
        "verl.single_controller.base.decorator:register": "dispatch_mode= execute_mode= blocking= materialize_futures=",
        "verl.single_controller.base.decorator:Dispatch": None,
    },
)
def one_to_all():
    """A method that is registered so gets the same arguments on every rank; the answers come back as a list."""

    class Probe:
        @register(dispatch_mode=Dispatch.ONE_TO_ALL)
        def method(self, value):
            return value

    assert Probe().method(3) == 3
    assert getattr(Probe.method, MAGIC_ATTR)["blocking"] is True
    assert Dispatch.ONE_TO_ALL in DISPATCH_MODE_FN_REGISTRY
    functions = get_predefined_dispatch_fn(Dispatch.ONE_TO_ALL)
    group = SimpleNamespace(world_size=2)
    assert functions["dispatch_fn"](group, "a", b="c") == ((["a", "a"],), {"b": ["c", "c"]})
    assert functions["collect_fn"](group, [7, 7]) == [7, 7]
    for name in ("update_actor", "compute_log_prob", "save_checkpoint", "load_checkpoint"):
        assert getattr(getattr(ActorRolloutRefWorker, name), MAGIC_ATTR)["blocking"] is True


@seam(
    "bridge/update.py",
    pins={
        f"{HYBRID}update_actor": "self data",
        f"{WORKERS}TrainingWorker.train_mini_batch": "self data",
        f"{WORKERS}TrainingWorker._postprocess_output": "self output * global_token_num delta_time forward_only "
        "images_seqlens",
    },
)
def numbers_of_an_update(monkeypatch):
    """An update's numbers are called ``loss``, ``grad_norm``, ``lr`` and ``perf/...``; ours keep their names."""
    engine = Mock()
    engine.get_data_parallel_group.return_value = None
    worker = bare(TrainingWorker, engine=engine, device_name="cpu", flops_counter=None)
    metrics = {"entropy:sum": [1.0, 2.0], "grad_norm": 2.0, "lr": 0.1}
    output = {"metrics": metrics, "loss": [0.25, 0.5]}
    settings = {"global_token_num": None, "delta_time": 1.0, "forward_only": False, "images_seqlens": None}
    found = tu.get(worker._postprocess_output(output, **settings), "metrics")
    memory = {"perf/max_memory_allocated_gb", "perf/max_memory_reserved_gb", "perf/cpu_memory_used_gb"}
    assert found.keys() == {"entropy:sum", "loss", "grad_norm", "lr"} | memory
    assert (found["loss"], found["grad_norm"], found["lr"]) == (0.75, 2.0, 0.1)


@seam(
    "bridge/worker.py",
    pins={
        f"{WORKERS}TrainingWorker.train_batch": "self data",
        "verl.workers.engine.base:BaseEngine.train_batch": "self data loss_function",
    },
)
def mini_batches(jagged, one_rank):
    """A batch is cut into mini-batches in its order; each is one ``train_batch``; ranks' sums are put together."""
    ids = jagged([[1, 2], [3], [4, 5, 6], [7]])
    data = tu.get_tensordict({"input_ids": ids}, {"opd_scale": 0.5, "temperature": 1.0})
    tu.assign_non_tensor(data, mini_batch_size=2, epochs=1, seed=1, dataloader_kwargs={"shuffle": False})
    engine = Mock()
    engine.get_data_parallel_size.return_value, engine.get_data_parallel_rank.return_value = 1, 0
    engine.get_data_parallel_group.return_value = torch.distributed.group.WORLD
    engine.train_mode.return_value.__enter__ = engine.train_mode.return_value.__exit__ = Mock(return_value=None)
    seen = []

    def train_batch(batch):
        seen.append(([row.tolist() for row in batch["input_ids"].unbind()], batch["opd_scale"]))
        last = bool(batch["update_lr_scheduler"])
        return tu.get_tensordict({}, {"metrics": {"entropy:sum": [Metric("sum", 1.0)], "last": float(last)}})

    worker = bare(TrainingWorker, engine=engine, profiler=Mock())
    object.__setattr__(worker, "train_batch", train_batch)
    metrics = tu.get(TrainingWorker.train_mini_batch(worker, data), "metrics")
    assert seen == [([[1, 2], [3]], 0.5), ([[4, 5, 6], [7]], 0.5)]
    assert metrics["entropy:sum"] == [1.0, 1.0] and metrics["last"] == [0.0, 1.0]


@seam("bridge/engine.py", pins={"verl.workers.engine.base:BaseEngine.optimizer_step": "self"})
def order_of_an_update():
    """One ``train_batch``: gradients to zero, forward and backward, one optimiser step, whose norm is reported."""
    turns = []

    class Probe(engine_base.BaseEngine):
        def optimizer_zero_grad(self):
            turns.append("zero")

        def forward_backward_batch(self, data, loss_function, forward_only=False):
            turns.append(f"forward_only={forward_only}")
            return {"metrics": {}}

        def optimizer_step(self):
            turns.append("step")
            return 2.0

        def is_mp_src_rank_with_outputs(self):
            return True

    data = tu.get_tensordict({"ids": torch.zeros(1)})
    assert Probe().train_batch(data, None) == {"metrics": {"grad_norm": 2.0}}
    assert turns == ["zero", "forward_only=False", "step"]


@seam(
    "bridge/worker.py",
    covers="OPDWorker.rollout self.rollout.zmq_handle",
    pins={"verl.workers.rollout.vllm_rollout.vllm_rollout:ServerAdapter.update_weights": None},
)
def weight_socket():
    """The rollout sends weights to ``zmq_handle``, set when it is built and read at every update."""
    # Its constructor asks Ray for the job, and its update talks to a server, so both are read.
    path = "verl.workers.rollout.vllm_rollout.vllm_rollout:ServerAdapter"
    says(f"{path}.__init__", 'self.zmq_handle = f"ipc:///tmp/rl-colocate-zmq-{job_id}-replica-')
    says(f"{path}.update_weights", "BucketedWeightSender(zmq_handle=self.zmq_handle,")
    says(f"{HYBRID}init_model", "self.rollout = rollout_cls(")


@seam(
    "bridge/validation.py",
    pins={
        "verl.utils.config:validate_config": "config use_reference_policy use_critic",
        "verl.trainer.ppo.utils:need_critic": "config",
        "verl.trainer.ppo.utils:need_reference_policy": "config",
        "verl.utils.config:omega_conf_to_dataclass": None,
        "verl.trainer.ppo.core_algos:get_adv_estimator_fn": "name_or_enum",
        "verl.experimental.agent_loop.agent_loop:_agent_loop_registry": None,
    },
)
def validation(config):
    """verl accepts our composition, needs no critic and no reference for it, and knows every key of its sections."""
    from opd_ext.bridge.validation import validate_verl
    from opd_ext.errors import ConfigError

    validate_verl(config)
    OmegaConf.set_struct(config, False)
    config.actor_rollout_ref.actor.optim.lr_scheduler_type = "linear"
    with pytest.raises(ConfigError, match="AssertionError at assert self.lr_scheduler_type in"):  # verl has no words
        validate_verl(config)
    config.actor_rollout_ref.actor.optim.lr_scheduler_type = "constant"
    config.actor_rollout_ref.actor.no_such_key = 1
    try:
        validate_verl(config)
    except ConfigError as error:
        assert "no_such_key" in str(error)
    else:
        raise AssertionError("a key that verl does not know is accepted")
    assert engine_workers.omega_conf_to_dataclass


@seam("bridge/known_keys.py")
def keys_that_verl_lists(config):
    """verl's generated configuration has what its groups compose, and what it leaves out has a line that reads it."""
    from opd_ext.bridge import known_keys

    assert known_keys.listed()["trainer"].keys() >= {"total_epochs", "logger", "v1"}
    known_keys.check_added_keys(config)
    for key, (file, words) in known_keys.UNLISTED.items():
        assert words in (Path(verl.__file__).parent / file).read_text(), key
        assert OmegaConf.select(OmegaConf.create(known_keys.listed()), key) is None, f"{key} is listed now"
    taken = "mixed_precision_config.get"
    engine = (Path(verl.__file__).parent / "workers/engine/fsdp/transformer_impl.py").read_text()
    for name in known_keys._UNLISTED_SECTIONS["mixed_precision"]:
        assert f'{taken}("{name}"' in engine


@seam("bridge/empty_model.py", pins={"verl.utils.model:get_hf_auto_model_class": "hf_config"})
def class_of_a_model():
    """verl chooses a class by the first architecture's name; one that ends otherwise gets a model without a head."""
    from transformers import AutoConfig

    from opd_ext.bridge.empty_model import fault

    assert fault(AutoConfig.for_model("qwen3", architectures=["Qwen3ForCausalLM"]), "sdpa") is None
    assert "Qwen3Model" in (fault(AutoConfig.for_model("qwen3", architectures=["Qwen3LMHeadModel"]), "sdpa") or "")
