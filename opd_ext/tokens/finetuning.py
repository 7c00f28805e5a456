# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning as a pipeline sees it: what is asked for, how far it is, where its checkpoints are.

The work is done by verl's SFT trainer in processes of their own, see :mod:`opd_ext.bridge.finetune`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_ext import launch
from opd_ext.files import read_jsonl, write_whole
from opd_ext.progress import Progress
from opd_ext.tokens.dataset import Corruption


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """A fine-tuning; paths are absolute.

    ``train`` has the fields of :class:`opd_ext.pipelines.settings.TrainConfig`; with a ``corruption`` the model is a
    masked-diffusion model.
    """

    model: str
    samples: str
    out: str
    train: dict[str, Any]
    stop_ids: Sequence[int]
    seed: int
    device: str
    flags: str | None = None
    corruption: Corruption | None = None
    keep: Sequence[int] = ()  # steps whose models stay; of the others only the last, to go on from
    trust_remote_code: bool = False

    @classmethod
    def read(cls, path: Path) -> "FineTuning":
        content = json.loads(path.read_text())
        corruption = content.pop("corruption")
        return cls(**content, corruption=Corruption(**corruption) if corruption else None)

    @property
    def checkpoints(self) -> Path:
        return Path(self.out) / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The model after a step, as transformers and vLLM load it."""
        return self.checkpoints / f"global_step_{step}" / "huggingface"

    @property
    def saved_steps(self) -> list[int]:
        """Steps after which a checkpoint is written."""
        steps, every = self.train["steps"], self.train["save_every"]
        return sorted({*range(every, steps + 1, every), steps})

    @property
    def final(self) -> Path:
        return self.checkpoint(self.train["steps"])

    def metrics_file(self, step: int) -> Path:
        """Metrics of the run that went on after ``step``; verl would begin a file of one name anew."""
        return Path(self.out) / f"metrics-from-{step:06d}.jsonl"


def fine_tune(task: FineTuning, worker: str, environment: dict[str, str], title: str) -> None:
    """Fine-tune, or go on where an interrupted run left its last checkpoint; progress is shown on the console.

    Args:
        worker: the module that trains, in processes of its own: ``python -m WORKER finetuning.json``.

    Raises:
        LaunchError: a process failed.
    """
    if task.final.exists():  # renamed into place when it was complete
        return
    out = Path(task.out)
    out.mkdir(parents=True, exist_ok=True)
    spec = out / "finetuning.json"
    write_whole(spec, json.dumps(dataclasses.asdict(task), indent=2).encode())
    ranks, nodes = task.train["ranks"], task.train["nodes"]
    command = launch.Command(worker, [str(spec)], out / "log.txt", ranks, ranks, environment, nodes)
    with Progress(title, task.train["steps"], "steps") as progress:
        progress.update(note="starting verl")

        def watch() -> None:
            if metrics := read_metrics(out):
                progress.update(metrics[-1]["step"], note=f"loss {metrics[-1]['train/loss']:.4f}")

        launch.run([command], task.device, watch)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """verl's metrics of every step, in order; of a step that was made twice, the later line."""
    steps: dict[int, dict[str, Any]] = {}
    for file in sorted(out.glob("metrics-from-*.jsonl")):
        for entry in read_jsonl(file, cut_off_end=True):
            steps[entry["step"]] = {"step": entry["step"], **entry["data"]}
    return [steps[step] for step in sorted(steps)]
