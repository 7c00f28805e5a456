# SPDX-License-Identifier: Apache-2.0
"""The protocol of validation: which problems, how many samples of each, and when.

Before and after training all sets are validated in full. While training a set may have a rhythm of its own, and a
monitor, the same few problems of each set, may stand for the rest. What the monitor samples are the first samples of
the full protocol, request by request, so its curve has a point wherever a full validation has one, at no cost.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from opd_ext.errors import ConfigError, did_you_mean, one_of, positive
from opd_ext.seeds import canonical, request_seed

NO_SOURCE = "data"
"""What a row without ``data_source`` counts to."""


@dataclass
class SetConfig:
    """One validation set: the rows of one ``data_source``."""

    n: int | None = None  # samples per problem; null: actor_rollout_ref.rollout.val_kwargs.n
    every: int | None = None  # steps between its validations; null: trainer.test_freq, or never beside a monitor


@dataclass
class MonitorConfig:
    """What stands for the sets while training; its curve and the full protocol's are never one."""

    problems: int = 64  # of each set, at most; always the same ones, whatever the seed and the order of rows
    n: int = 1  # samples per problem: the first ones of the full protocol


@dataclass
class ValidationConfig:
    """What is validated, and when; before and after training everything is."""

    sets: dict[str, SetConfig | None] = field(default_factory=dict)  # what is special about a set, by data source
    monitor: MonitorConfig | None = None  # the few problems that are validated while training; null: all of them
    prompt: str = "student"
    """Whose prompt is answered: student, or teacher (a control: the instruction alone, before any training)."""

    def samples(self, source: str, default: int) -> int:
        """How often a problem of this set is sampled; ``default``: ``val_kwargs.n``."""
        settings: SetConfig | None = self.sets.get(source)
        return default if settings is None or settings.n is None else settings.n

    def is_due(self, source: str, step: int) -> bool:
        """Whether the full protocol of this set is due at a validation while training."""
        settings: SetConfig | None = self.sets.get(source)
        every = None if settings is None else settings.every
        return self.monitor is None if every is None else step % every == 0

    def check(self, default: int, test_freq: int) -> None:
        """Refuse numbers that make no sense together.

        Args:
            default: ``val_kwargs.n``.
            test_freq: ``trainer.test_freq``: verl's loop validates at its multiples alone.

        Raises:
            ConfigError: one sentence.
        """
        one_of("opd.validation.prompt", self.prompt, ("student", "teacher"))
        for source, settings in self.sets.items():
            for key in ("n", "every"):
                value = getattr(settings, key, None)
                if value is not None:
                    positive(f"opd.validation.sets.{source}.{key}", value)
            every = getattr(settings, "every", None)
            if every is not None and test_freq > 0 and every % test_freq:
                raise ConfigError(
                    f"opd.validation.sets.{source}.every={every} must be a multiple of trainer.test_freq={test_freq}, "
                    "which says when a run looks at all."
                )
        if self.monitor is None:
            return
        positive("opd.validation.monitor.problems", self.monitor.problems)
        positive("opd.validation.monitor.n", self.monitor.n)
        fewest, key = min(
            [(default, "actor_rollout_ref.rollout.val_kwargs.n")]
            + [(self.samples(source, default), f"opd.validation.sets.{source}.n") for source in self.sets]
        )
        if self.monitor.n > fewest:
            raise ConfigError(
                f"opd.validation.monitor.n={self.monitor.n} exceeds {key}={fewest}: a monitor takes the first samples "
                "of the full protocol; lower it, or raise the latter."
            )


@dataclass(frozen=True)
class Problem:
    """One row of the validation data.

    Attributes:
        source: its set.
        n: samples in the full protocol.
        first_draw: how many samples equal prompts before it have: its own follow, so no draw is taken twice.
        monitored: whether the monitor has it.
    """

    source: str
    n: int
    first_draw: int
    monitored: bool


class Protocol:
    """The protocol over the rows that there are.

    Args:
        config: checked already.
        default: samples per problem where no set says otherwise.
        rows: ``data_source`` and prompt, anything that JSON can hold, of every problem.

    Raises:
        ConfigError: a set that the rows do not have.
    """

    def __init__(self, config: ValidationConfig, default: int, rows: Iterable[tuple[str, Any]]):
        self.config = config
        identities = [(str(source), canonical(prompt)) for source, prompt in rows]
        self.sources = frozenset(source for source, _ in identities)
        for name, settings in config.sets.items():
            if settings is not None and name not in self.sources:
                there = sorted(self.sources)
                raise ConfigError(
                    f"opd.validation.sets.{name} is no data source of data.val_files, which have {', '.join(there)}: "
                    f"rename it, or set it to null.{did_you_mean(name, there)}"
                )
        monitored = _first_by_content(identities, config.monitor.problems) if config.monitor else set()
        drawn: Counter[str] = Counter()
        self.problems = []
        for i, (source, prompt) in enumerate(identities):
            n = config.samples(source, default)
            self.problems.append(Problem(source, n, drawn[prompt], i in monitored))
            drawn[prompt] += n

    def due(self, step: int, whole: bool) -> frozenset[str]:
        """The sets whose full protocol is due.

        Args:
            step: a multiple of ``trainer.test_freq``, or where a resumed run begins.
            whole: before or after training: all of them.
        """
        return frozenset(source for source in self.sources if whole or self.config.is_due(source, step))

    def asked(self, due: Collection[str]) -> dict[int, int]:
        """Problem, by its place among the rows -> samples: the sets that are due, and of the others the monitor's."""
        few = self.config.monitor.n if self.config.monitor else 0
        asked = {i: p.n if p.source in due else few * p.monitored for i, p in enumerate(self.problems)}
        return {i: n for i, n in asked.items() if n}

    def monitors(self, problem: int, sample: int) -> bool:
        """Whether a sample of a problem, both by number, is one of the monitor's."""
        monitor = self.config.monitor
        return monitor is not None and self.problems[problem].monitored and sample < monitor.n

    def told(self) -> str:
        """How many samples it takes, for the plan and the console."""
        full = f"{sum(self.asked(self.sources).values()):,} samples of {len(self.problems):,} problems"
        if self.config.monitor is None:
            return full
        return f"{full} before and after, {sum(self.asked(()).values()):,} samples of the monitor meanwhile"


def _first_by_content(rows: list[tuple[str, str]], count: int) -> set[int]:
    """Places of ``count`` rows of each source, in the order of their digests: the same whatever the order of rows."""
    ranked: dict[str, list[tuple[int, int]]] = {}
    for i, row in enumerate(rows):
        ranked.setdefault(row[0], []).append((request_seed(canonical(row)), i))
    return {i for places in ranked.values() for _, i in sorted(places)[:count]}
