# SPDX-License-Identifier: Apache-2.0
"""What contracts run on: a composed configuration, a real queue, a process group of one, verl's own engine."""

import copy
from pathlib import Path

import pytest
import torch
import transfer_queue
from omegaconf import OmegaConf
from transfer_queue import interface
from transfer_queue.controller import TransferQueueController
from transfer_queue.storage.simple_storage import SimpleStorageUnit

from opd_ext import plugin
from opd_ext.config.compose import compose_config
from opd_ext.pipelines.settings import TrainConfig, plain
from opd_ext.tinymath.shipped import FOLDER
from opd_ext.tokens.finetuning import FineTuning

MODEL = FOLDER / "base"


@pytest.fixture(scope="session")
def model() -> str:
    """Folder of a real model of half a million weights, with its tokenizer."""
    return str(MODEL)


@pytest.fixture(scope="session")
def _composed(model, tmp_path_factory):
    plugin.register()
    folder = tmp_path_factory.mktemp("run")
    return compose_config(
        ["method=crisp", "scale=cpu_tiny", f"opd.run_dir={folder}", f"actor_rollout_ref.model.path={model}"]
    )


@pytest.fixture
def config(_composed):
    """The configuration of a small run, as the task runner gets it."""
    return copy.deepcopy(_composed)


@pytest.fixture(scope="module")
def _queue():
    """TransferQueue's own controller, storage and client, as threads of this process instead of Ray actors."""
    settings = dict(OmegaConf.load(Path(transfer_queue.__file__).parent / "config.yaml").backend.SimpleStorage)
    controller = TransferQueueController.__ray_metadata__.modified_class()
    storage = SimpleStorageUnit.__ray_metadata__.modified_class(config=settings | {"_run_id": "contract"})
    client = transfer_queue.TransferQueueClient(client_id="contract", controller_info=controller.get_zmq_server_info())
    zmq_info = {"unit": storage.get_zmq_server_info()}
    client.initialize_storage_manager(manager_type="SimpleStorage", config=settings | {"zmq_info": zmq_info})
    before, interface._TQ_CLIENT = interface._TQ_CLIENT, client
    yield transfer_queue
    interface._TQ_CLIENT = before
    client.close()


@pytest.fixture
def queue(_queue):
    """The queue, empty; every module that imports it meets this one."""
    yield _queue
    for partition, keys in _queue.kv_list().items():
        if keys:
            _queue.kv_clear(keys=list(keys), partition_id=partition)


@pytest.fixture(scope="module")
def one_rank():
    """A default process group that has this process alone; its tensors are too small for several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def make_engine(one_rank, model):
    """``make_engine(kind, **engine settings)``: an initialised FSDP2 engine in float32, on the CPU."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    def make(kind: type, clip_grad: float = 1.0, **settings):
        precision = {name: "fp32" for name in ("param_dtype", "reduce_dtype", "buffer_dtype")}
        engine = kind(
            HFModelConfig(path=model, override_config={"attn_implementation": "sdpa"}, use_remove_padding=True),
            FSDPEngineConfig(
                strategy="fsdp2", model_dtype="fp32", mixed_precision=precision, use_torch_compile=False, **settings
            ),
            FSDPOptimizerConfig(lr=1e-2, total_training_steps=1, clip_grad=clip_grad),
            CheckpointConfig(),
        )
        engine.initialize()
        return engine

    return make


@pytest.fixture(scope="module")
def _engine(make_engine):
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    return make_engine(FSDPEngineWithLMHead, use_no_sync_for_gradient_accumulation=False)


@pytest.fixture
def engine(_engine):
    """verl's own language-model engine; its weights and settings are put back."""
    before = {name: value.detach().clone() for name, value in _engine.module.state_dict().items()}
    clip_grad = _engine.optimizer_config.clip_grad
    yield _engine
    _engine.optimizer_config.clip_grad = clip_grad
    _engine.optimizer_zero_grad()
    with torch.no_grad():
        for name, value in _engine.module.state_dict().items():
            value.copy_(before[name])


@pytest.fixture
def jagged():
    """Rows -> a jagged tensor [B, j1]."""

    def make(rows: list[list], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(row, dtype=dtype) for row in rows], layout=torch.jagged)

    return make


@pytest.fixture
def task(model, tmp_path):
    """A fine-tuning with the defaults of a pipeline."""
    return FineTuning(model, "/samples", str(tmp_path / "arm"), plain(TrainConfig()), [1], seed=5, device="cpu")
