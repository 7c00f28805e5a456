# SPDX-License-Identifier: Apache-2.0
"""The methods that are put to a run's rollouts, each as its preset configures it; and why one cannot be."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd_ext.checkpoints.export import RECORD, export
from opd_ext.checkpoints.layout import CheckpointError, TrainerState, steps, teacher_folder
from opd_ext.checkpoints.source import Source, find
from opd_ext.config import schema
from opd_ext.config.compose import CONFIG_DIR, compose_config
from opd_ext.config.schema import OPDConfig
from opd_ext.config.teachers import View
from opd_ext.pipelines.eval.models import evaluated
from opd_ext.teacher.kinds import Teacher


class CannotApply(ValueError):
    """Why a method says nothing about these rollouts; one sentence."""


@dataclass
class Method:
    """A method, its `opd` section, and what about it is not as it would be in training.

    Attributes:
        config: of a run of it, whole.
        view, whole: with several teachers there is a method of each, whose ``opd`` is as with that teacher alone: which
            one it is, and the settings that say whose rows are whose.
    """

    name: str
    opd: OPDConfig
    config: DictConfig
    notes: list[str] = field(default_factory=list)
    view: View | None = None
    whole: OPDConfig | None = None

    @property
    def places(self) -> str:
        """Its choices in one line."""
        opd = self.opd
        distilled = (opd.teacher, opd.context, opd.divergence, opd.credit.kind) if opd.distils else ()
        return " · ".join(map(str, (*distilled, *((opd.policy,) if opd.policy.present else ()))))


def known_methods() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in (CONFIG_DIR / "method").glob("*.yaml"))


def each_teacher(chosen: Method) -> list[Method]:
    """A method with several teachers, teacher by teacher; one with a single teacher as it is."""
    if not chosen.opd.teachers:
        return [chosen]
    found = []
    for view in chosen.opd.views:
        credit = dataclasses.replace(chosen.opd.credit, weight=chosen.opd.credit.weight * view.weight)
        opd = dataclasses.replace(
            view.opd, credit=credit, teacher=dataclasses.replace(view.opd.teacher, backend="engine")
        )
        found.append(Method(f"{chosen.name}-{view.name}", opd, chosen.config, [*chosen.notes], view, chosen.opd))
    return found


def method(name: str, config: Mapping[str, Any], teacher: str | None) -> Method:
    """The run's own method as it was configured; another one as its preset has it at the run's scale.

    Args:
        config: of the run, plain.
        teacher: folder or hub id of a model that takes the place of an external teacher.

    Raises:
        CannotApply: the method needs what is not here.
        ConfigError: there is no such method.
    """
    own = config["opd"]["method"] == name
    if own:
        whole = OmegaConf.create(dict(config))
    else:
        # What a preset takes from the sampling is that of these rollouts.
        heat = config["actor_rollout_ref"]["rollout"]["temperature"]
        asked = [f"method={name}", f"scale={config['opd']['scale']}", f"actor_rollout_ref.rollout.temperature={heat}"]
        whole = compose_config(asked)
    opd = schema.load(whole.opd)
    opd.import_external_libs()
    found = Method(name, opd, whole)
    if opd.teacher.backend != "engine":  # it is asked here
        opd.teacher.backend = "engine"
    if opd.teacher.weights == "external" and not opd.teachers:
        opd.teacher.path = teacher or opd.teacher.path
        if not Path(str(opd.teacher.path)).expanduser().is_dir() and not (teacher or own):
            raise CannotApply("it learns from another model: name one with --teacher MODEL.")
    return found


class Weights:
    """Models of a run by what they are: the student at a step, its teacher, the initial model.

    Args:
        source: the checkpoint; None: the initial model, before the first step.
        config: of the run, plain.
    """

    def __init__(self, run: Path, source: Source | None, config: Mapping[str, Any]) -> None:
        self.run, self.source, self.config = run, source, config
        self.initial = str(config["actor_rollout_ref"]["model"]["path"])
        self.step = source.step if source else 0

    def student(self, step: int) -> str:
        """Folder of the student at a step that has a checkpoint; exported if it was not so far."""
        if step == 0:
            return self.initial
        found = evaluated("RUN", str(self.run), str(step))
        found.have()
        return found.path

    def teacher(self, chosen: Method, own: bool) -> dict[str, float] | None:
        """Models and their shares of the teacher's weights; None where it has no weights of its own.

        Args:
            own: the method is the run's.
        """
        opd, kind = chosen.opd, chosen.opd.teacher.kind
        if opd.teacher.path:
            return {str(opd.teacher.path): 1.0}
        if not kind.own_weights:
            return None
        if own and self.source is not None:
            name = (chosen.view.weights or "") if chosen.view else ""
            if (self.source.folder / teacher_folder(name)).is_dir():
                return {self._saved_teacher(self.source, name): 1.0}
            if TrainerState.read(self.source.folder).version(name) == 0:
                return {self.initial: 1.0}
        return self._made_of_versions(chosen, kind)

    def _saved_teacher(self, source: Source, name: str) -> str:
        out = source.run / "export" / f"step_{source.step}-teacher{f'-{name}' if name else ''}"
        if not (out / RECORD).is_file():
            export(source.run, str(source.step), out, teacher=name)
        return str(out)

    def _made_of_versions(self, chosen: Method, kind: Teacher) -> dict[str, float]:
        """What the schedule makes of the student's versions, each replaced by the nearest one that was saved."""
        shares = {0: 1.0}
        for step in range(1, self.step + 1):
            share = kind.share(step, 1)
            if share:
                shares = {at: mass * (1 - share) for at, mass in shares.items() if mass * (1 - share) > 0}
                shares[step] = shares.get(step, 0.0) + share
        root = self.source.folder.parent if self.source else self.run / "checkpoints"
        saved = sorted({0, *(at for at in steps(root) if at <= self.step)})
        mixture: dict[int, float] = {}
        for at, mass in shares.items():
            nearest = min(saved, key=lambda there: (abs(there - at), there))
            mixture[nearest] = mixture.get(nearest, 0.0) + mass
        if mixture.keys() != shares.keys():
            made = ", ".join(f"{mass:.0%} of step {at}" for at, mass in sorted(mixture.items()))
            chosen.notes.append(f"The run did not keep this teacher's weights; in their place: {made}.")
        if len(mixture) > 1 and self.config["actor_rollout_ref"]["model"].get("lora_rank"):
            chosen.notes.append("Here it averages merged weights, where a run with LoRA averages A and B.")
        return {self.student(at): mass for at, mass in mixture.items()}


def checkpoint(run: Path, step: str | None) -> Source | None:
    """The checkpoint to look from; step 0 is the initial model.

    Raises:
        CheckpointError: there is none, or it is of a pipeline.
    """
    if step == "0":
        return None
    source = find(run, step)
    if source.fine_tuned:
        raise CheckpointError(f"{run} is a fine-tuning, which has no rollouts: name a run of opd train.")
    return source
