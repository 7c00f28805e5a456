# SPDX-License-Identifier: Apache-2.0
"""``opd.teachers``: several teachers by name, and which rows are whose."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from opd_ext.context.config import ContextConfig
from opd_ext.divergence.config import DivergenceConfig
from opd_ext.errors import ConfigError, positive
from opd_ext.teacher.config import TeacherConfig

if TYPE_CHECKING:
    from opd_ext.config.schema import OPDConfig

SOURCE = "data_source"
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
_OF_TEACHER = [entry.name for entry in fields(TeacherConfig) if entry.name != "args"]


@dataclass
class NamedTeacher(TeacherConfig):
    """One of several teachers: the keys of `opd.teacher`, and these.

    What it leaves out is that of `opd.teacher`, unless it names `weights` of its own.
    """

    rows: list[Any] | None = None  # values of opd.teacher_key whose rows it teaches; null: its own name
    weight: float = 1.0  # of the distillation term on its rows, beside opd.credit.weight
    context: ContextConfig = field(default_factory=ContextConfig)
    """What it sees; left out: opd.context."""
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    """What is compared with it; left out: opd.divergence."""

    def taught(self, name: str) -> list[str]:
        """Values of the key whose rows it teaches, as texts."""
        return [name] if self.rows is None else [str(key) for key in self.rows]


@dataclass(frozen=True)
class View:
    """One teacher of a run.

    Attributes:
        name: in ``opd.teachers``; empty where ``opd.teacher`` is the only one.
        opd: the settings as a run with this teacher alone would have them.
        weight: of its distillation term, beside that of the schedule.
        weights: which weights it teaches with, by the name of the first teacher that has them; None: the student's, or
            elsewhere.
        server: which servers of ours are asked, by the name of the first teacher that has them; None: none is.
    """

    name: str
    opd: OPDConfig
    weight: float = 1.0
    weights: str | None = None
    server: str | None = None

    @property
    def key(self) -> str:
        """Under which its settings stand."""
        return f"opd.teachers.{self.name}" if self.name else "opd.teacher"

    @property
    def place(self) -> str:
        """Of the metrics that are its alone: their names begin so."""
        return f"teacher/{self.name}" if self.name else "teacher"

    @contextmanager
    def named(self) -> Iterator[None]:
        """A ConfigError of the block says which of several teachers it is about."""
        try:
            yield
        except ConfigError as error:
            if not self.name:
                raise
            said = str(error).replace("opd.teacher.", f"{self.key}.").replace("opd.teacher=", f"{self.key}=")
            for place in ("context", "divergence"):
                said = said.replace(f"opd.{place}", f"{self.key}.{place}")
            raise ConfigError(said) from None


def same_weights(mine: TeacherConfig, other: TeacherConfig) -> bool:
    """Whether two teachers hold equal weights at every step, so that one copy serves both."""
    if mine.kind.path_of_weights != other.kind.path_of_weights:
        return False
    return mine.kind == other.kind or not (mine.kind.moves or other.kind.moves)


def shared_name(mine: TeacherConfig, others: Iterable[tuple[TeacherConfig, str | None]], otherwise: str) -> str:
    """The name, among those of ``others``, under which equal weights are known already."""
    return next((name for other, name in others if name is not None and same_weights(other, mine)), otherwise)


def trains_adapter(config: DictConfig) -> bool:
    """Whether the student is a LoRA adapter on a base that stays as it is."""
    return config.actor_rollout_ref.model.lora_rank > 0


def adapter_weights(opd: OPDConfig, config: DictConfig) -> dict[str, View]:
    """Of ``opd.teacher_weights``, those that are an adapter on the student's base: of a LoRA student, its own past."""
    return {
        name: view
        for name, view in opd.teacher_weights.items()
        if trains_adapter(config) and view.opd.teacher.kind.path_of_weights is None
    }


def model_weights(opd: OPDConfig, config: DictConfig) -> dict[str, View]:
    """Of ``opd.teacher_weights``, those that are a whole model beside the student."""
    return {n: view for n, view in opd.teacher_weights.items() if n not in adapter_weights(opd, config)}


def completed(content: dict[str, Any]) -> None:
    """Give every named teacher what it leaves out, in place.

    Args:
        content: the `opd` section, plain, its places filled in.

    Raises:
        ConfigError: what stands there is no section.
    """
    teachers = content.get("teachers") or {}
    if not isinstance(teachers, Mapping):
        raise ConfigError(f"opd.teachers={teachers} must be a section: NAME: {{weights: ..., path: ...}} per teacher.")
    content["teachers"] = {str(name): said for name, said in teachers.items()}
    for name, said in content["teachers"].items():
        if not isinstance(said, Mapping):
            raise ConfigError(f"opd.teachers.{name}={said} must be a section: {{weights: ..., path: ...}}.")
        said = dict(said)
        base = {key: value for key, value in content["teacher"].items() if key in _OF_TEACHER}
        if content["teacher"].get("args"):
            base["args"] = dict(content["teacher"]["args"])
        content["teachers"][name] = ({} if "weights" in said else base) | said
        for place in ("context", "divergence"):
            if said.get(place) is None:
                content["teachers"][name][place] = content[place]
            elif not isinstance(said[place], Mapping):
                raise ConfigError(f"opd.teachers.{name}.{place}={said[place]} must be a section.")


def check(opd: OPDConfig) -> None:
    """Refuse names and keys that cannot tell the teachers apart; each one's own settings are checked elsewhere.

    Raises:
        ConfigError: one sentence.
    """
    if not opd.teachers:
        if opd.teacher_key is not None:
            raise ConfigError(f"opd.teacher_key={opd.teacher_key} chooses among opd.teachers, of which there is none.")
        return
    if not isinstance(opd.teacher_key, str) or not opd.teacher_key:
        raise ConfigError(
            f"opd.teachers need opd.teacher_key: {SOURCE}, or the name of a field of extra_info, whose value in a row "
            "says whose it is."
        )
    for name, teacher in opd.teachers.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"opd.teachers.{name}: a name has letters, digits, - and _, since folders and metrics have it, too; "
                f"give it another one, and rows=[{name}]."
            )
        positive(f"opd.teachers.{name}.weight", teacher.weight, zero=True)
        if teacher.rows is not None and not teacher.rows:
            raise ConfigError(f"opd.teachers.{name}.rows=[] gives it no row: leave it out, or name values.")
    for key, usual in (("backend", "engine"), ("tokenizer", "student")):
        value = getattr(opd.teacher, key)
        if value != usual and all(getattr(teacher, key) != value for teacher in opd.teachers.values()):
            raise ConfigError(
                f"opd.teacher.{key}={value} reaches none of opd.teachers, since each names weights of its own: set "
                f"opd.teachers.{next(iter(opd.teachers))}.{key}={value}, or of whom it is meant."
            )
    named = Counter(key for name, teacher in opd.teachers.items() for key in teacher.taught(name))
    if twice := [key for key, count in named.items() if count > 1]:
        raise ConfigError(f"opd.teachers: rows whose {opd.teacher_key} is {twice[0]} would have two teachers.")
    if len([view for view in opd.views if view.opd.teacher.backend == "server"]) > 1:
        raise ConfigError("opd.teachers: one of them at most has backend=server, whose servers score every rollout.")


class UnknownKey(ValueError):
    """A row whose key names no teacher; one sentence."""


def place_of(teacher_key: str) -> tuple[str, str | None]:
    """Column of a data set, and field in it, that say whose a row is."""
    return (SOURCE, None) if teacher_key == SOURCE else ("extra_info", teacher_key.removeprefix("extra_info."))


def whose(opd: OPDConfig, sources: list[Any], extra_infos: list[Any]) -> list[int]:
    """:func:`assign` of rows by their data sources and ``extra_info``.

    Raises:
        UnknownKey: a row names no teacher.
    """
    if opd.teacher_key is None:
        return [0] * len(extra_infos)
    _, name = place_of(opd.teacher_key)
    if name is None:
        return assign(opd, sources)
    return assign(opd, [info.get(name) if isinstance(info, Mapping) else None for info in extra_infos])


def assign(opd: OPDConfig, found: list[Any]) -> list[int]:
    """The place among ``opd.views`` of the teacher of every row, by what the rows' keys are.

    Raises:
        UnknownKey: a row names none.
    """
    of = {key: i for i, (name, teacher) in enumerate(opd.teachers.items()) for key in teacher.taught(name)}
    for i, key in enumerate(found):
        if key is None or str(key) not in of:
            said = f"has no {opd.teacher_key}" if key is None else f"has {opd.teacher_key}={key}"
            raise UnknownKey(f"row {i} {said}, and opd.teachers are for {', '.join(of)}")
    return [of[str(key)] for key in found]
