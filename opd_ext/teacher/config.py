# SPDX-License-Identifier: Apache-2.0
"""``opd.teacher``: its keys, their check and their words."""

from dataclasses import dataclass, field, fields
from typing import Any

from opd_ext.errors import ABSENT, ConfigError, check_options, one_of, positive
from opd_ext.teacher.kinds import NoTeacher, Teacher, get_teacher, teacher_names

BACKENDS = ("engine", "vllm", "server")


@dataclass
class ServingConfig:
    """`opd.teacher.vllm`, of backend=vllm: a vLLM of its own, which sends the hidden states of response tokens."""

    replicas: int = 1  # copies of the model; trainer ranks take turns among them
    tensor_parallel_size: int = 1  # devices of a replica, all on one node
    gpu_memory_utilization: float = 0.9  # share of a device that a replica takes
    tokens_per_call: int = 16384  # of the sequences that one request holds
    calls: int = 2  # requests of a trainer rank that may be under way at once
    seconds: float = 600  # that an answer may take; then the run ends
    start_seconds: float = 1800  # that a replica may take to come up
    engine: dict[str, Any] = field(default_factory=dict)
    """More arguments of vLLM's engine: quantization, enforce_eager, ..."""

    @property
    def devices(self) -> int:
        return self.replicas * self.tensor_parallel_size

    def check(self) -> None:
        """Refuse numbers that cannot work.

        Raises:
            ConfigError: one sentence.
        """
        for name in ("replicas", "tensor_parallel_size", "tokens_per_call", "calls", "seconds", "start_seconds"):
            positive(f"opd.teacher.vllm.{name}", getattr(self, name))
        positive("opd.teacher.vllm.gpu_memory_utilization", self.gpu_memory_utilization, at_most=1)
        if taken := sorted(set(self.engine) & _OWN_ARGUMENTS):
            raise ConfigError(
                f"opd.teacher.vllm.engine.{taken[0]} is not free: the run says which model is served, and how its "
                "hidden states are read."
            )


# Of the engine: what is served and how it is read, and what moves its weights.
_OWN_ARGUMENTS = {
    *("model", "runner", "convert", "pooler_config", "hf_overrides", "enable_prefix_caching"),
    *("tensor_parallel_size", "worker_extension_cls"),
}


@dataclass
class TeacherConfig:
    """Whose weights teach, and when they are refreshed; every other key is an option of a registered teacher."""

    weights: str = "periodic"  # a registered teacher: live, base, frozen, periodic, ema, trust_region, external, ...
    interval: int = 50  # optimiser steps between refreshes of `periodic`; 0: never
    rate: float = 0.05  # `ema`: share of the student mixed in per step; `trust_region`: share of the live student
    path: str | None = None  # `external`: folder or hub id of the teacher
    backend: str = "engine"  # engine: colocated; vllm: devices of its own, exact; server: verl's, sampled or top k
    tokenizer: str = "student"  # whose tokens `external` reads: student, which must be its own too, or own (another)
    vllm: ServingConfig = field(default_factory=ServingConfig)  # of backend=vllm: how many, how large, how patient
    args: dict[str, Any] = field(default_factory=dict)
    """Options of a registered teacher that are no keys here; write them beside `weights`."""

    @property
    def present(self) -> bool:
        return self.weights != ABSENT

    @property
    def holds_weights(self) -> bool:
        """Whether it has weights of its own, and has them beside the student.

        A served one is elsewhere; but what moves moves here, shard by shard, and is then sent there.
        """
        if self.weights not in teacher_names():  # it is refused by its check
            return False
        return self.kind.own_weights and (self.backend == "engine" or (self.backend == "vllm" and self.kind.moves))

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
        one_of("opd.teacher.backend", self.backend, BACKENDS)
        one_of("opd.teacher.tokenizer", self.tokenizer, ("student", "own"))
        options = {option.name for option in fields(get_teacher(self.weights))}
        check_options("opd.teacher", f"weights={self.weights}", self.args, options)
        if ("path" in options) != (self.path is not None):
            raise ConfigError("opd.teacher.path belongs to weights=external and to no other: set both or neither.")
        if self.foreign and (self.path is None or self.backend == "server"):
            raise ConfigError(
                "opd.teacher.tokenizer=own is for another model beside the student: set weights=external with a path, "
                "and backend=engine or vllm."
            )
        if self.backend == "vllm":
            self._check_served()
        try:
            self.kind.check()
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"opd.teacher: {error}") from None

    def _check_served(self) -> None:
        if not get_teacher(self.weights).own_weights:
            raise ConfigError(
                f"opd.teacher.backend=vllm serves weights of the teacher's own, and weights={self.weights} has the "
                "student's: set backend=engine, or weights=periodic with interval=1."
            )
        self.vllm.check()

    def __str__(self) -> str:
        detail = f"{self.kind}, own tokens" if self.foreign else str(self.kind)
        said = f"{self.weights}({detail})" if detail else self.weights
        return said + {"vllm": " on vLLM", "server": " on verl's servers"}.get(self.backend, "")
