# SPDX-License-Identifier: Apache-2.0
"""``opd.teacher``: its keys, their check and their words."""

from dataclasses import dataclass, field, fields
from typing import Any

from opd_ext.errors import ABSENT, ConfigError, check_options, one_of
from opd_ext.teacher.kinds import NoTeacher, Teacher, get_teacher, teacher_names


@dataclass
class TeacherConfig:
    """Whose weights teach, and when they are refreshed; every other key is an option of a registered teacher."""

    weights: str = "periodic"  # a registered teacher: live, base, frozen, periodic, ema, trust_region, external, ...
    interval: int = 50  # optimiser steps between refreshes of `periodic`; 0: never
    rate: float = 0.05  # `ema`: share of the student mixed in per step; `trust_region`: share of the live student
    path: str | None = None  # `external`: folder or hub id of the teacher
    backend: str = "engine"  # engine: colocated with the student; server: verl's teacher servers on their own devices
    tokenizer: str = "student"  # whose tokens `external` reads: student, which must be its own too, or own (another)
    args: dict[str, Any] = field(default_factory=dict)
    """Options of a registered teacher that are no keys here; write them beside `weights`."""

    @property
    def present(self) -> bool:
        return self.weights != ABSENT

    @property
    def holds_weights(self) -> bool:
        """Whether it has weights of its own, and has them beside the student: a served one is elsewhere."""
        known = self.weights in teacher_names()  # else it is refused by its check
        return known and self.kind.own_weights and self.backend == "engine"

    @property
    def foreign(self) -> bool:
        """Whether it reads responses in tokens of its own."""
        return self.tokenizer == "own"

    @property
    def kind(self) -> Teacher:
        """The registered teacher with those of these keys that are its options."""
        if not self.present:
            return NoTeacher()
        teacher = get_teacher(self.weights)
        given = {"interval": self.interval, "rate": self.rate, "path": self.path, **self.args}
        return teacher(**{option.name: given[option.name] for option in fields(teacher) if option.name in given})

    def check(self) -> None:
        """Refuse what cannot work, whatever the other places say.

        Raises:
            ConfigError: one sentence.
        """
        one_of("opd.teacher.weights", self.weights, teacher_names())
        one_of("opd.teacher.backend", self.backend, ("engine", "server"))
        one_of("opd.teacher.tokenizer", self.tokenizer, ("student", "own"))
        options = {option.name for option in fields(get_teacher(self.weights))}
        check_options("opd.teacher", f"weights={self.weights}", self.args, options)
        if ("path" in options) != (self.path is not None):
            raise ConfigError("opd.teacher.path belongs to weights=external and to no other: set both or neither.")
        if self.foreign and (self.path is None or self.backend != "engine"):
            raise ConfigError(
                "opd.teacher.tokenizer=own is for another model beside the student: set weights=external with a path, "
                "and backend=engine."
            )
        try:
            self.kind.check()
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"opd.teacher: {error}") from None

    def __str__(self) -> str:
        detail = f"{self.kind}, own tokens" if self.foreign else str(self.kind)
        return f"{self.weights}({detail})" if detail else self.weights
