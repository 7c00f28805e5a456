# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint of a run somebody means, and what is known about it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_ext.checkpoints import best, layout
from opd_ext.checkpoints.layout import CheckpointError, TrainerState


@dataclass(frozen=True)
class Source:
    """A checkpoint to make a model of.

    Attributes:
        run: the folder of the run, or of one fine-tuning of a pipeline.
        step: optimiser steps of the run.
        folder: ``global_step_<step>``.
        config: of the run, plain; of a fine-tuning the section of its model.
    """

    run: Path
    step: int
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def fine_tuned(self) -> bool:
        """Whether it is a pipeline's, which saves whole Hugging Face folders."""
        return not (self.folder / "actor").is_dir()

    @property
    def template(self) -> Path:
        """Config, tokenizer and generation config; of a fine-tuning the weights, too."""
        return self.folder / "huggingface" if self.fine_tuned else self.folder / "actor" / "huggingface"

    @property
    def model(self) -> dict[str, Any]:
        """verl's section of the student's model."""
        return self.config.get("actor_rollout_ref", {}).get("model", {})

    def check_teacher(self, name: str = "") -> Path:
        """The folder of a teacher's shards; ``name`` is that of one of several.

        Raises:
            CheckpointError: there is none, and where the teacher's weights are instead.
        """
        section = self.config.get("opd") or {}
        teacher, weights = section.get("teacher") or {}, name
        if teachers := section.get("teachers"):
            if name not in teachers:
                raise CheckpointError(
                    f"This run has several teachers: name one of {', '.join(teachers)}, as in --teacher "
                    f"{next(iter(teachers))}."
                )
            teacher = ({} if "weights" in teachers[name] else teacher) | teachers[name]
            weights = TrainerState.read(self.folder).teacher_weights.get(name, name)
        elif name:
            raise CheckpointError(f"This run has one teacher at most: leave {name} out.")
        folder = self.folder / layout.teacher_folder(weights)
        if folder.is_dir():
            return folder
        kind, path = teacher.get("weights"), self.model.get("path")
        if self.fine_tuned or kind in (None, "none"):
            why = "this run has no teacher"
        elif kind == "live":
            why = "the teacher of this run is the student itself: leave --teacher out"
        elif teacher.get("path"):
            why = f"the teacher of this run is {teacher['path']}, which does not change"
        elif TrainerState.read(self.folder).version(weights) == 0:
            why = f"the teacher of step {self.step} is still the initial model, {path}"
        else:
            why = f"the teacher of step {self.step} was not saved, since no later step reads it"
        raise CheckpointError(f"There are no weights of a teacher in {self.folder}: {why}.")


def find(run: Path, step: str | None = None) -> Source:
    """The checkpoint of ``step`` (a number, ``best``; None: the one that the run would go on from).

    Raises:
        CheckpointError: no such run, no such checkpoint; one sentence that says which there are.
    """
    if not run.is_dir():
        raise CheckpointError(f"There is no folder {run}.")
    config = _config(run)
    root = run / "checkpoints"
    elsewhere = config.get("trainer", {}).get("default_local_dir")
    if not root.is_dir() and elsewhere:
        root = Path(elsewhere)
    if not root.is_dir():
        if parts := sorted(path.parent for path in run.glob("train/*/checkpoints")):
            if len(parts) == 1:
                return find(parts[0], step)
            names = ", ".join(str(part) for part in parts)
            raise CheckpointError(f"{run} is a pipeline with several fine-tunings: name one of {names}.")
        raise CheckpointError(f"{run} has no checkpoints: let the run save some (trainer.save_freq).")
    there = layout.steps(root)
    if not there:
        raise CheckpointError(f"{root} holds no checkpoint so far.")
    chosen = _choose(run, step, there, layout.latest(root))
    return Source(run, chosen, root / f"global_step_{chosen}", config)


def _choose(run: Path, step: str | None, there: list[int], latest: int | None) -> int:
    listed = ", ".join(map(str, there))
    if step is None:
        return latest if latest in there else there[-1]
    if step == "best":
        scores = {at: share for at, share in best.validations(run).items() if at in there}
        found = best.best_step(scores)
        if found is None:
            raise CheckpointError(f"No checkpoint of {run} was validated: choose --step of {listed}.")
        return found
    if not step.isdecimal() or int(step) not in there:
        raise CheckpointError(f"--step {step} does not exist in {run}: there are {listed}, and best.")
    return int(step)


def _config(run: Path) -> dict[str, Any]:
    """Of a run, or what a fine-tuning of a pipeline says of its model, in the same place."""
    task, path = run / "finetuning.json", run / "config.yaml"
    if task.is_file():
        said = json.loads(task.read_text(encoding="utf-8"))
        model = {"path": said.get("model"), "trust_remote_code": said.get("trust_remote_code")}
        return {"actor_rollout_ref": {"model": model}}
    if not path.is_file():
        return {}
    import yaml

    return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}


def record(source: Source, weights: str, dtype: str) -> str:
    """What an export says of itself, as JSON."""
    state = None if source.fine_tuned else TrainerState.read(source.folder)
    said = {
        "run": str(source.run.absolute()),
        "step": source.step,
        "weights": weights,
        "dtype": dtype,
        "method": state.method if state else None,
        "initial_model": source.model.get("path"),
    }
    return json.dumps(said, indent=2) + "\n"
