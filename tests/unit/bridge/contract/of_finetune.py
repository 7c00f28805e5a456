# SPDX-License-Identifier: Apache-2.0
"""Contracts of verl's SFT trainer: its hooks in order, its loop, its checkpoints, its loss."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import verl
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.checkpoint import CheckpointHandler
from verl.utils.checkpoint.checkpoint_handler import extract_step
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.profiler import DistProfiler
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import sft_loss

from opd_ext.bridge import checkpoint
from opd_ext.bridge.finetune import sft_config

from .seams import bare, says, seam

SFT = "verl.trainer.sft_trainer:SFTTrainer."
HANDLER = "verl.utils.checkpoint.checkpoint_handler:CheckpointHandler."


@seam(
    "bridge/finetune.py",
    covers="FineTuner.__init__ FineTuner._build_dataset FineTuner._build_engine FineTuner._build_dataloader "
    "FineTuner._build_ckpt_handler FineTuner.resume_global_step FineTuner.ckpt_handler FineTuner.config",
    pins={
        f"{SFT}__init__": "self config",
        **{f"{SFT}{hook}": "self" for hook in ("_build_dataset", "_build_engine", "_build_dataloader")},
        f"{SFT}_build_ckpt_handler": "self",
    },
)
def hooks(one_rank):
    """The trainer builds config, data, engine, loader, starts the engine, builds the handler and lets it load, once."""
    turns = []
    names = ["_build_config", "_build_dataset", "_build_engine", "_build_dataloader", "_init_engine"]
    methods = {name: lambda self, name=name: turns.append(name) for name in names}

    def _build_ckpt_handler(self):
        turns.append("_build_ckpt_handler")
        self.ckpt_handler = Mock(load_checkpoint=lambda: turns.append("load") or 3)

    probe = type("Probe", (SFTTrainer,), {**methods, "_build_ckpt_handler": _build_ckpt_handler})
    trainer = probe(config := SimpleNamespace(trainer=SimpleNamespace(device="cpu")))
    assert turns == [*names, "_build_ckpt_handler", "load"]
    assert trainer.resume_global_step == 3 and trainer.config is config and trainer.rank == 0


@seam(
    "bridge/finetune.py",
    covers="FineTuner.model_config FineTuner.engine_config FineTuner.optimizer_config FineTuner.checkpoint_config "
    "FineTuner.profiler_config FineTuner.training_client FineTuner.engine self.config.trainer.total_epochs",
    pins={"verl.workers.config:TrainingWorkerConfig": None, "verl.workers.engine_workers:TrainingWorker": None},
)
def configuration(task):
    """verl's SFT configuration becomes the parts of a worker's; gradients are sharded after every micro-batch there."""
    trainer = bare(SFTTrainer, config=sft_config(task))
    trainer._build_config()
    assert trainer.model_config.path == task.model and trainer.engine_config.strategy == "fsdp2"
    assert trainer.optimizer_config.clip_grad == task.train["clip_grad"]
    assert trainer.engine_config.use_no_sync_for_gradient_accumulation is False
    parts = ("model_config", "engine_config", "optimizer_config", "checkpoint_config", "profiler_config")
    TrainingWorkerConfig(model_type="language_model", **{name: getattr(trainer, name) for name in parts})
    assert (omega_conf_to_dataclass(trainer.config.engine)).forward_only is False
    trainer.config.trainer.total_epochs = 9
    assert trainer.config.trainer.total_epochs == 9
    assert verl.__file__.endswith("__init__.py")


@seam(
    "bridge/finetune.py",
    covers="FineTuner.fit FineTuner.train_dataset FineTuner.val_dataset FineTuner.train_sampler "
    "FineTuner.train_dataloader FineTuner.val_dataloader FineTuner.global_batch_size",
    pins={f"{SFT}fit": "self"},
)
def loop(task, jagged, one_rank, monkeypatch, tmp_path):
    """``fit`` tells the sampler of each epoch, trains from the step resumed, saves as told, writes where it is told."""
    turns = []
    config = sft_config(task)
    config.trainer.total_epochs, config.trainer.total_training_steps, config.trainer.save_freq = 5, 4, 3
    batch = {"input_ids": jagged([[1, 2, 3]])}

    class Loader(list):
        def set_epoch(self, epoch):
            turns.append(f"epoch {epoch}")

    def train_batch(data):
        assert data["use_remove_padding"] is True and data["global_batch_size"] == 8 and data["update_lr_scheduler"]
        turns.append("train")
        return tu.get_tensordict({}, {"metrics": {"loss": 0.5, "grad_norm": 1.0, "lr": 0.1}})

    client = Mock(train_batch=train_batch)
    engine = Mock(get_data_parallel_size=lambda: 1, get_data_parallel_rank=lambda: 0)
    handler = Mock(save_checkpoint=lambda step: turns.append(f"save {step}"))
    model_config = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    loader = Loader([batch, batch])
    trainer = bare(SFTTrainer, config=config, rank=0, device_name="cpu", engine=engine, training_client=client)
    for name, value in {
        "train_sampler": loader,
        "train_dataloader": loader,
        "val_dataloader": None,
        "ckpt_handler": handler,
        "model_config": model_config,
        "global_batch_size": 8,
        "resume_global_step": 1,
        "optimizer_config": SimpleNamespace(),
        "start_profile_step": -1,
        "end_profile_step": -1,
    }.items():
        setattr(trainer, name, value)
    trainer._init_engine()
    assert trainer.steps_per_epoch == 2 and trainer.optimizer_config.total_training_steps == 4
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    trainer.fit()
    assert turns == ["epoch 0", "train", "train", "save 3", "epoch 1", "train", "save 4"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4] and lines[0]["data"]["train/loss"] == 0.5


@seam(
    "bridge/finetune.py",
    covers="Checkpoints.__init__ Checkpoints.save_checkpoint Checkpoints._load_dataloader_state "
    "Checkpoints.load_checkpoint Checkpoints._determine_resume_path "
    "Checkpoints.default_local_dir Checkpoints.rank Checkpoints.engine Checkpoints.train_dataloader "
    "Checkpoints.resume_global_step",
    pins={
        f"{HANDLER}save_checkpoint": "self step",
        f"{HANDLER}load_checkpoint": "self",
        f"{HANDLER}_determine_resume_path": "self",
        f"{HANDLER}_load_dataloader_state": "self checkpoint_path",
        "verl.utils.checkpoint:CheckpointHandler": None,
        "verl.utils.checkpoint.checkpoint_handler:extract_step": "path",
        "verl.workers.engine.base:BaseEngine.save_checkpoint": "self local_path hdfs_path= global_step= "
        "max_ckpt_to_keep= **kwargs",
    },
)
def handler(one_rank, tmp_path):
    """The handler loads what our tracker names, knows the step before the loader is asked, and else says 0."""
    engine, seen = Mock(), []

    class Probe(CheckpointHandler):
        def _load_dataloader_state(self, checkpoint_path):
            seen.append((self.resume_global_step, checkpoint_path))

    settings = {"engine": engine, "train_dataloader": "the loader", "default_local_dir": str(tmp_path)}
    probe = Probe(**settings, resume_mode="auto")
    assert (probe.rank, probe.engine, probe.train_dataloader) == (0, engine, "the loader")
    assert probe._determine_resume_path() is None
    assert probe.load_checkpoint() == 0 and not seen
    checkpoint.commit(checkpoint.begin(tmp_path, 4), tmp_path, 4, keep=None)
    assert probe.load_checkpoint() == 4
    folder = str(tmp_path / "global_step_4")
    assert probe._determine_resume_path() == folder
    assert seen == [(4, folder)] and extract_step(folder) == 4
    engine.load_checkpoint.assert_called_once_with(folder)


@seam(
    "bridge/finetune.py",
    covers="FineTuningWorker.__init__ FineTuningWorker.train_batch FineTuningWorker.set_loss_fn "
    "FineTuningWorker.device_name FineTuningWorker.engine",
    pins={
        "verl.workers.engine_workers:TrainingWorker.set_loss_fn": "self loss_fn",
        "verl.workers.engine_workers:TrainingWorker.infer_batch": "self data",
        "verl.workers.engine_workers:TrainingWorker.reset": "self",
    },
)
def worker(engine, jagged):
    """``train_batch`` calls the loss that was set, with ``batch_num_tokens`` and ``dp_size`` in the data."""
    seen = []

    def loss(model_output, data, dp_group=None):
        seen.append((data["batch_num_tokens"], data["dp_size"], data["opd_tokens"]))
        return sft_loss(None, model_output, data, dp_group)

    client = bare(TrainingWorker, engine=engine, device_name="cpu", flops_counter=None)
    client.profiler = DistProfiler(rank=0)
    client.engine_config, client.model_config = engine.engine_config, engine.model_config
    client.set_loss_fn(loss)
    rows = jagged([[3, 4, 5], [6, 7]])
    fields = {"input_ids": rows, "position_ids": jagged([[0, 1, 2], [0, 1]]), "loss_mask": jagged([[0, 1, 1], [0, 1]])}
    settings = {"temperature": 1.0, "opd_tokens": 9, "use_dynamic_bsz": True, "max_token_len_per_gpu": 64}
    output = client.train_batch(tu.get_tensordict(fields, settings))
    assert seen == [(3, 1, 9)]
    assert tu.get(output, "metrics")["grad_norm"] > 0
    says("verl.workers.engine_workers:TrainingWorker.reset", "self.engine.initialize()")


@seam(
    "bridge/confidence.py",
    covers="engine_config.forward_only",
    pins={"verl.workers.engine.base:BaseEngine.infer_batch": "self data loss_function="},
)
def inference(engine, jagged, task):
    """Inference without a loss gives ``log_probs`` in the order of the batch, token j + 1's at place j."""
    rows = [[3, 4, 5, 6], [7, 8]]
    fields = {"input_ids": jagged(rows), "position_ids": jagged([[0, 1, 2, 3], [0, 1]])}
    fields["loss_mask"] = jagged([[0, 1, 1, 1], [0, 1]])
    settings = {"temperature": 1.0, "use_dynamic_bsz": True, "max_token_len_per_gpu": 4}
    with engine.eval_mode():
        found = engine.infer_batch(tu.get_tensordict(fields, settings))["model_output"]["log_probs"]
        logits = engine.module(input_ids=torch.tensor([rows[1]]), use_cache=False).logits
    expected = logits[0, 0].log_softmax(-1)[8]
    assert [len(row) for row in found.unbind()] == [4, 2]
    torch.testing.assert_close(found.unbind()[1][0], expected, rtol=0, atol=1e-4)
    assert engine.is_mp_src_rank_with_outputs() and engine.get_data_parallel_rank() == 0
    settings = omega_conf_to_dataclass(sft_config(task).engine)
    settings.forward_only = True
    assert settings.forward_only is True, "most of verl's settings are frozen; this one is not"


@seam("bridge/finetune.py", pins={"verl.workers.utils.losses:sft_loss": "config model_output data dp_group="})
def loss(jagged):
    """verl's loss shifts the mask by one, divides by ``batch_num_tokens`` and multiplies by the ranks."""
    log_probs = jagged([[-1.0, -2.0, -9.0], [-4.0, -9.0]], torch.float32)
    masks = {"loss_mask": jagged([[0, 1, 1], [0, 1]])}
    data = tu.get_tensordict(masks, {"dp_size": 2, "batch_num_tokens": 5, "pad_mode": "no_padding"})
    assert sft_loss(None, {"log_probs": log_probs}, data)[0].item() == pytest.approx((1 + 2 + 4) / 5 * 2)


@seam("bridge/finetune.py", pins={"verl.utils.dataset.dataset_utils:SFTTensorCollator": "pad_mode="})
def collation():
    """``no_padding`` makes jagged tensors of a list of samples."""
    found = SFTTensorCollator("no_padding")([{"ids": torch.tensor([1, 2])}, {"ids": torch.tensor([3])}])
    assert found["ids"].is_nested and [row.tolist() for row in found["ids"].unbind()] == [[1, 2], [3]]


@seam(
    "bridge/finetune.py",
    pins={"verl.utils.distributed:initialize_global_process_group": "timeout_second="},
)
def joining():
    """On an accelerator a rank joins the group that RANK, WORLD_SIZE and MASTER_* describe, with its backend."""
    # The backend of an accelerator is not here to be joined.
    says(
        "verl.utils.distributed:initialize_global_process_group",
        'backend = f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"',
        'os.environ["LOCAL_RANK"]',
    )
