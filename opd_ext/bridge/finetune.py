# SPDX-License-Identifier: Apache-2.0
"""One process of a fine-tuning on verl's SFT trainer: ``python -m opd_ext.bridge.finetune SPEC``.

verl's trainer and engines do the work. What differs: the data are token tables, a checkpoint is there as a whole or
not at all, a run goes on exactly, and a mask that leaves a global batch nothing to train gives zero, not NaN.

The specification is JSON with the fields of :class:`~opd_ext.tokens.finetuning.FineTuning`.
"""

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import verl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from verl.trainer.sft_trainer import SFTTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.checkpoint import CheckpointHandler
from verl.utils.checkpoint.checkpoint_handler import extract_step
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import sft_loss

from opd_ext.bridge import checkpoint
from opd_ext.bridge import engine as _engine  # noqa: F401  (registers OPDEngine in this process)
from opd_ext.bridge.cpu_platform import init_process_group
from opd_ext.bridge.diffusion import MODEL_TYPE as MASKED_DIFFUSION
from opd_ext.bridge.diffusion import diffusion_loss
from opd_ext.tokens.dataset import TokenDataset
from opd_ext.tokens.finetuning import FineTuning


class FineTuningWorker(TrainingWorker):
    """verl's worker with the loss of a fine-tuning; it also counts all response tokens of a global batch."""

    def __init__(self, config: TrainingWorkerConfig, task: FineTuning):
        super().__init__(config)
        self._task = task
        self.set_loss_fn(self._loss)

    def train_batch(self, data: TensorDict) -> TensorDict:
        count = data["response_mask"].sum().to(self.device_name)
        torch.distributed.all_reduce(count, group=self.engine.get_data_parallel_group())
        tu.assign_non_tensor(data, opd_tokens=int(count.item()))
        return super().train_batch(data)

    def _loss(self, model_output: dict, data: TensorDict, dp_group: Any = None) -> tuple[torch.Tensor, dict]:
        """verl's token mean over what is trained, or over the whole response."""
        whole = self._task.train["normalisation"] == "all-token-mean"
        # A batch in which nothing is trained is a mean over nothing: zero, and not 0 / 0.
        tu.assign_non_tensor(data, batch_num_tokens=max(1, data["opd_tokens"] if whole else data["batch_num_tokens"]))
        loss = diffusion_loss if self._task.corruption else sft_loss
        return loss(None, model_output, data, dp_group)


class Batches:
    """The batches of an epoch, a function of seed and epoch alone; the number of ranks only splits them.

    verl would keep torchdata's loader and store its position. That is exact within an epoch, but a run that was saved
    after the last batch of one goes on with other batches than it would have had. Here the step is the position.

    Args:
        collate: list of items -> batch.
        size: samples per batch, over all ranks.
    """

    def __init__(self, dataset: Any, collate: Callable[[list], Any], size: int, rank: int, ranks: int, seed: int):
        self._dataset, self._collate, self._seed = dataset, collate, seed
        self._size, self._rank, self._ranks = size, rank, ranks
        self._epoch, self._next = 0, 0

    def __len__(self) -> int:
        return len(self._dataset) // self._size

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._dataset.set_epoch(epoch)

    def start_after(self, step: int) -> None:
        """The first pass leaves out what the steps up to this one have had."""
        self._next = step % len(self)

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._dataset), generator=generator).tolist()
        first, self._next = self._next, 0
        for batch in range(first, len(self)):
            whole = order[batch * self._size : (batch + 1) * self._size]
            yield self._collate([self._dataset[index] for index in whole[self._rank :: self._ranks]])


class Checkpoints(CheckpointHandler):
    """Complete or absent. What is needed to go on is kept for the last one only, and no longer than the run lasts."""

    def __init__(self, task: FineTuning, **settings: Any):
        super().__init__(**settings)
        self._task = task

    def save_checkpoint(self, step: int) -> None:
        root = Path(self.default_local_dir)
        folder = checkpoint.begin(root, step) if self.rank == 0 else root / f".incomplete_global_step_{step}"
        torch.distributed.barrier()
        self.engine.save_checkpoint(local_path=str(folder), global_step=step, max_ckpt_to_keep=None)
        if self.rank == 0:
            last = checkpoint.commit(folder, root, step, keep=None)
            for other in set(root.glob("global_step_*")) - {last}:
                if extract_step(str(other)) not in self._task.keep:
                    shutil.rmtree(other)
                else:
                    _drop_resume_state(other)
            if step == self._task.train["steps"]:
                _drop_resume_state(last)
        torch.distributed.barrier()

    def load_checkpoint(self) -> int:
        """As verl does, but from a checkpoint of any number of ranks."""
        path = self._determine_resume_path()
        if path is None or not checkpoint.load_resharded(self.engine, Path(path)):
            return super().load_checkpoint()
        self.resume_global_step = extract_step(path)
        self._load_dataloader_state(path)
        return self.resume_global_step

    def _load_dataloader_state(self, checkpoint_path: str) -> None:
        self.train_dataloader.start_after(self.resume_global_step)


def _drop_resume_state(folder: Path) -> None:
    for file in folder.iterdir():
        if file.is_file():
            file.unlink()


class FineTuner(SFTTrainer):
    """verl's SFT trainer on a token table."""

    def __init__(self, task: FineTuning):
        self._task = task
        super().__init__(sft_config(task))

    def _build_dataset(self) -> None:
        task = self._task
        self.train_dataset = TokenDataset(
            Path(task.samples),
            task.train["max_length"],
            task.stop_ids,
            flags=Path(task.flags) if task.flags else None,
            corruption=task.corruption,
        )
        self.val_dataset = None
        batches = len(self.train_dataset) // task.train["batch_size"]  # at least one, see Steps.train
        # The epoch in which the last step falls is not needed whole, but must be begun.
        self.config.trainer.total_epochs = math.ceil(task.train["steps"] / batches) + 1

    def _build_engine(self) -> None:
        config = TrainingWorkerConfig(
            model_type=MASKED_DIFFUSION if self._task.corruption else "language_model",
            model_config=self.model_config,
            engine_config=self.engine_config,
            optimizer_config=self.optimizer_config,
            checkpoint_config=self.checkpoint_config,
            profiler_config=self.profiler_config,
        )
        self.training_client = FineTuningWorker(config, self._task)
        self.engine = self.training_client.engine

    def _build_dataloader(self) -> None:
        # `fit` tells the sampler of each epoch and iterates over the loader; here they are one.
        self.global_batch_size = self._task.train["batch_size"]
        self.train_sampler = self.train_dataloader = Batches(
            self.train_dataset,
            SFTTensorCollator(self.config.data.pad_mode),
            self.global_batch_size,
            self.engine.get_data_parallel_rank(),
            self.engine.get_data_parallel_size(),
            self._task.seed,
        )
        self.val_dataloader = None

    def _build_ckpt_handler(self) -> None:
        self.ckpt_handler = Checkpoints(
            self._task,
            engine=self.engine,
            train_dataloader=self.train_dataloader,
            default_local_dir=self.config.trainer.default_local_dir,
            resume_mode=self.config.trainer.resume_mode,
        )

    def fit(self) -> None:
        """Train what is left; a finished run is never started again."""
        os.environ["VERL_FILE_LOGGER_PATH"] = str(self._task.metrics_file(self.resume_global_step))
        super().fit()


def sft_config(task: FineTuning) -> DictConfig:
    """verl's own SFT configuration with the settings of ``task``."""
    train = task.train
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        config = compose("sft_trainer_engine")
    ours = {
        "model": {"path": task.model, "trust_remote_code": task.trust_remote_code, "use_remove_padding": True},
        "engine": {"strategy": "fsdp2", "seed": task.seed},
        "optim": {
            "lr": train["lr"],
            "lr_scheduler_type": train["schedule"],
            "lr_warmup_steps": train["warmup_steps"],
            "lr_warmup_steps_ratio": 0.0,
            "min_lr_ratio": train["min_lr"] / train["lr"],
            "weight_decay": train["weight_decay"],
            "betas": train["betas"],
            "clip_grad": train["clip_grad"],
        },
        "data": {
            "train_batch_size": train["batch_size"],
            "use_dynamic_bsz": True,
            "max_token_len_per_gpu": max(train["tokens_per_gpu"], train["max_length"]),
        },
        "checkpoint": {"save_contents": ["model", "optimizer", "extra", "hf_model"]},
        "trainer": {
            "default_local_dir": str(task.checkpoints),
            "project_name": "opd-ext",
            "experiment_name": Path(task.out).name,
            "logger": ["file"],
            "seed": task.seed,
            "device": task.device,
            "total_training_steps": train["steps"],
            "save_freq": train["save_every"],
            "test_freq": -1,
            "resume_mode": "auto",
        },
    }
    # verl's file leaves some keys of the engine to its dataclass, which refuses those that it does not know.
    for section in (config.engine, config.model.override_config):
        OmegaConf.set_struct(section, False)
    return OmegaConf.merge(config, ours, train["verl"])


def join_group(device: str) -> None:
    """Join the process group that the launcher describes in the environment."""
    if device == "cpu":
        init_process_group()
    else:
        initialize_global_process_group()


def main(spec: Path) -> None:
    """Fine-tune from where the last complete checkpoint is, or from the model."""
    task = FineTuning.read(spec)
    join_group(task.device)
    FineTuner(task).fit()
    destroy_global_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
