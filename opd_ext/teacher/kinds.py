# SPDX-License-Identifier: Apache-2.0
"""Whose weights teach: one small class per choice of ``opd.teacher.weights``.

A kind says whether it needs weights of its own beside the student's, how far these move towards the student after a
step, which student they stand for, and what it makes of a batch. Nothing else in the package asks for its name, so a
kind of a user's own needs no edit: ``@register_teacher``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from opd_ext.errors import positive, present
from opd_ext.registry import Registry

_teachers: Registry[type[Teacher]] = Registry("teacher")
register_teacher = _teachers.register
get_teacher = _teachers.get
teacher_names = _teachers.names


class TeacherOutput(NamedTuple):
    """What a teacher says of a batch, in the compute dtype.

    Attributes:
        rows: per sample, the hidden states that predict its response tokens.
        head: the vocabulary projection that belongs to them.
    """

    rows: list[Float[Tensor, "_R H"]]
    head: Float[Tensor, "V H"]


class Engine(Protocol):
    """What a kind may ask of the student's engine, or of the one that holds the teacher's own weights (collective)."""

    def teacher_output(self, data: Any, adapter: bool = True) -> TeacherOutput:
        """Its output on the teacher's sequences; without its ``adapter`` a LoRA student is the initial model."""
        ...


@dataclass(frozen=True)
class Teacher:
    """Weights of a second model that never move. The fields of a subclass are options of ``opd.teacher``.

    Attributes:
        own_weights: it needs a second set of weights: a second model, or beside a LoRA adapter a second adapter.
        needs_adapter: it exists only beside a LoRA adapter.
        accumulates: its weights gather small changes, which a narrow dtype would round away.
        is_student: it has the student's present weights, so only another context tells the two apart.
    """

    own_weights: ClassVar[bool] = True
    needs_adapter: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    is_student: ClassVar[bool] = False

    def check(self) -> None:
        """Refuse options that cannot work.

        Raises:
            ConfigError: one sentence that names the key.
        """

    @property
    def moves(self) -> bool:
        """Whether its weights may ever be others than those that were loaded."""
        return self.own_weights and type(self).share is not Teacher.share

    @property
    def path_of_weights(self) -> str | None:
        """The checkpoint that is loaded; None: the student's."""
        path = getattr(self, "path", None)
        return None if path is None else str(path).rstrip("/")

    def share(self, step: int, updates: int) -> float:
        """Share of the student in the weights after ``step`` (from 1): 0 leaves them, 1 makes them a copy.

        ``updates`` counts the optimiser steps of this batch of rollouts whose gradient was finite.
        """
        return 0.0

    def version(self, step: int, refreshed: int) -> int:
        """The student version that teaches in ``step``; ``refreshed`` is the one the weights were last moved to."""
        return refreshed

    def output(self, student: Engine, own: Engine | None, data: Any) -> TeacherOutput:
        """What this teacher says of a batch; ``own`` holds the weights of its own, if it needs such."""
        return present(own, "A teacher with weights of its own has an engine for them.").teacher_output(data)

    def __str__(self) -> str:
        """Its options in a few words, for ``opd methods``."""
        return ""


@dataclass(frozen=True)
class NoTeacher(Teacher):
    """There is none: GRPO and CISPO."""

    own_weights: ClassVar[bool] = False


@register_teacher("frozen")
@dataclass(frozen=True)
class Frozen(Teacher):
    """The initial model."""


@register_teacher("external")
@dataclass(frozen=True)
class External(Teacher):
    """Another model, of the same tokenizer."""

    path: str | None = None

    def __str__(self) -> str:
        return str(self.path).rstrip("/").rpartition("/")[2]


@register_teacher("periodic")
@dataclass(frozen=True)
class Periodic(Teacher):
    """CRISP (arXiv 2603.05433): a copy of the student, taken after every ``interval``-th step; 0: never."""

    interval: int = 50

    def check(self) -> None:
        positive("opd.teacher.interval", self.interval, zero=True)

    def share(self, step: int, updates: int) -> float:
        return float(self.interval > 0 and step % self.interval == 0)

    def __str__(self) -> str:
        return str(self.interval)


@register_teacher("ema")
@dataclass(frozen=True)
class MovingAverage(Teacher):
    """SDPO (arXiv 2601.20802): ``rate`` of the student is mixed in per batch of rollouts that moved it."""

    accumulates: ClassVar[bool] = True
    rate: float = 0.05

    def check(self) -> None:
        _check_rate(self.rate)

    def share(self, step: int, updates: int) -> float:
        return self.rate if updates else 0.0

    def __str__(self) -> str:
        return str(self.rate)


@register_teacher("live")
@dataclass(frozen=True)
class Live(Teacher):
    """The student itself, as it is at the start of the step."""

    own_weights: ClassVar[bool] = False
    is_student: ClassVar[bool] = True

    def version(self, step: int, refreshed: int) -> int:
        return step - 1

    def output(self, student: Engine, own: Engine | None, data: Any) -> TeacherOutput:
        return student.teacher_output(data)


@register_teacher("base")
@dataclass(frozen=True)
class Base(Teacher):
    """The student without its adapter, which is the initial model: a frozen teacher that costs no memory."""

    own_weights: ClassVar[bool] = False
    needs_adapter: ClassVar[bool] = True

    def output(self, student: Engine, own: Engine | None, data: Any) -> TeacherOutput:
        return student.teacher_output(data, adapter=False)


@register_teacher("trust_region")
@dataclass(frozen=True)
class TrustRegion(Teacher):
    """SDPO's trust region: the initial model and ``rate`` of the live student, interpolated in their logits."""

    rate: float = 0.05

    def check(self) -> None:
        _check_rate(self.rate)

    def version(self, step: int, refreshed: int) -> int:
        return step - 1

    def output(self, student: Engine, own: Engine | None, data: Any) -> TeacherOutput:
        live, initial = student.teacher_output(data), super().output(student, own, data)
        # (1 - a) W0 h0 + a W h = [W0, W] [(1 - a) h0, a h]: one head whose logits interpolate between both, which is
        # the geometric interpolation of their distributions (SDPO, arXiv 2601.20802, appendix B.2).
        a = self.rate
        rows = [torch.cat([(1 - a) * h0, a * h], -1) for h0, h in zip(initial.rows, live.rows, strict=True)]
        return TeacherOutput(rows, torch.cat([initial.head, live.head], dim=-1))

    def __str__(self) -> str:
        return str(self.rate)


def _check_rate(rate: float) -> None:
    positive("opd.teacher.rate", rate, at_most=1, what="the share of the student mixed in")


def teacher_version(step: int, interval: int) -> int:
    """The student version that serves as the teacher during ``step``, under periodic hard refresh.

    Steps count from 1 and version v is the student after v optimiser steps. The copy is taken after the
    optimiser step whenever ``step % interval == 0`` and used from the next step on (timing of the released
    CRISP code; the pseudocode of arXiv 2603.05433 is one step earlier). So with interval 50, steps 1-50 see
    version 0 and steps 51-100 version 50; interval 1 gives the weights at the start of the step; interval 0
    never refreshes.

    Raises:
        ValueError: for a step below 1 or a negative interval.

    >>> [teacher_version(step, interval=50) for step in (1, 50, 51, 100, 101)]
    [0, 0, 50, 50, 100]
    >>> teacher_version(1000, interval=0)
    0
    """
    if step < 1:
        raise ValueError(f"Steps count from 1; got {step}.")
    if interval < 0:
        raise ValueError(f"interval must be 0 (never) or positive; got {interval}.")
    return 0 if interval == 0 else (step - 1) // interval * interval
