# SPDX-License-Identifier: Apache-2.0
"""The plan of a pipeline as a page and as plain values: its stages, then the whole."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.console import Console
from rich.table import Table

from opd_ext.config.assumptions import Assumptions
from opd_ext.plan.advice import FULL
from opd_ext.plan.machines import GiB
from opd_ext.plan.shapes import UNKNOWN, model_shape
from opd_ext.plan.stages import Estimate, Place, estimate
from opd_ext.plan.work import Sampling, Training, Work

WIDTH = 120
GB = 1e9
_MACHINE = ("nodes", "gpus_per_node")  # what there is, of which a plan that asks for more is refused


@dataclass(frozen=True)
class PlannedStage:
    """A stage: its name, whether it is done, and its work, of which a stage may have none."""

    name: str
    done: bool
    work: Sequence[Work]


class StagesPlan:
    """All stages with their estimates; a stage whose model is not known here has none."""

    def __init__(self, stages: Sequence[PlannedStage], place: Place):
        self.stages, self.place = [stage for stage in stages if stage.work], place

    @cached_property
    def found(self) -> dict[str, list[tuple[Work, Estimate]] | None]:
        """By stage: its work with estimates, None where there is no estimate."""
        alike: dict[str, Estimate | None] = {}  # arms differ in little that a plan sees
        every = {}
        for stage in self.stages:
            for work in stage.work:
                if repr(work) not in alike:
                    alike[repr(work)] = estimate(work, self.place)
            pairs = [(work, alike[repr(work)]) for work in stage.work]
            known = [(work, found) for work, found in pairs if found is not None]
            every[stage.name] = known if len(known) == len(pairs) else None
        return every

    @property
    def known(self) -> list[Estimate]:
        return [found for pairs in self.found.values() for _, found in pairs or ()]

    @property
    def unknown(self) -> list[str]:
        return [name for name, pairs in self.found.items() if pairs is None]

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.known)

    @property
    def left(self) -> float:
        """Seconds of the stages that are not done."""
        done = {stage.name for stage in self.stages if stage.done}
        return sum(each.seconds for name, pairs in self.found.items() if name not in done for _, each in pairs or ())

    @property
    def disk(self) -> tuple[float, float]:
        """Bytes of models that stay, and of what is there besides while a stage trains."""
        return sum(each.disk for each in self.known), max((each.passing for each in self.known), default=0.0)

    @property
    def gpus(self) -> int:
        return max((each.gpus for each in self.known), default=0)

    @property
    def advice(self) -> list[str]:
        """Every sentence once, whatever the number of stages that it holds for."""
        return list(dict.fromkeys(sentence for each in self.known for sentence in each.advice))

    def as_json(self) -> dict[str, Any]:
        """Bytes, seconds, tokens of the stages that have an estimate; where none has, and of a stage without, null."""
        kept, passing = self.disk
        return {
            "stages": {name: pairs and [_plain(*pair) for pair in pairs] for name, pairs in self.found.items()},
            "unknown": self.unknown,
            "seconds": {"run": self.seconds, "left": self.left} if self.known else None,
            "disk": {"stays": kept, "besides": passing} if self.known else None,
            "gpus": self.gpus if self.known else None,
            "machine": dataclasses.asdict(self.place.machine),
            "advice": self.advice,
            "assumed": dataclasses.asdict(self.place.assumed),
        }

    def print(self, console: Console) -> None:
        console.print(self._table())
        console.print(self._whole())
        for sentence in self.advice:
            console.print(f"advice: {sentence}", highlight=False, soft_wrap=True)
        for model in dict.fromkeys(work.model for stage in self.stages for work in stage.work):
            if (shape := model_shape(model)) is None:
                told = f"note: no estimate of what {model} does, because it {UNKNOWN}."
            elif shape.guessed:
                told = f"note: {model}, which is not here, has the size of {shape.source}."
            else:
                continue
            console.print(told, highlight=False, soft_wrap=True)
        console.print(f"assumed: {_assumed(self)}", highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        room = self.place.machine.memory
        title = f"Per GPU and stage ({self.place.machine.name}, {room / GiB:.0f} GiB)"
        table = Table(title=title, title_justify="left")
        for name in ("stage", "GPUs", "GiB", "of it", "min", "tokens/s", "GB stay", "made of, GiB"):
            words = name in ("stage", "made of, GiB")
            table.add_column(name, justify="left" if words else "right", no_wrap=name == "stage")
        for name, pairs in self.found.items():
            if pairs is None:
                table.add_row(name, *["unknown"] * 5)
            for _, each in pairs or ():
                full = " !" if each.bytes > FULL * room else ""
                uses = sorted(each.memory.items(), key=lambda item: -item[1])
                table.add_row(
                    name,
                    str(each.gpus),
                    f"{each.bytes / GiB:.1f}",
                    f"{each.bytes / room:.0%}{full}",
                    f"{each.seconds / 60:.1f}",
                    f"{each.tokens / each.seconds:,.0f}" if each.seconds else "",
                    f"{each.disk / GB:.1f}" if each.disk else "",
                    ", ".join(f"{use} {size / GiB:.1f}" for use, size in uses if size >= 0.05 * GiB),
                )
        return table

    def _whole(self) -> Table:
        kept, passing = self.disk
        table = Table(title="Whole pipeline", show_header=False, title_justify="left")
        if not self.known and self.unknown:
            for row in ("GPUs", "disk", "whole run"):
                table.add_row(row, "unknown")
            return table
        table.add_row("GPUs", f"{self.gpus} at most; stages follow each other")
        table.add_row("disk", f"{kept / GB:.1f} GB of models stay, {passing / GB:.1f} GB more while one trains")
        left = f"; {_time(self.left)} are left" if self.left < self.seconds else ""
        most = f", {self.seconds / 3600 * self.gpus:.0f} GPU hours at most" if self.seconds >= 3600 else ""
        rest = f"; besides unknown: {', '.join(self.unknown)}" if self.unknown else ""
        table.add_row("whole run", f"{_time(self.seconds)}{most}{left}{rest}")
        return table


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _plain(work: Work, found: Estimate) -> dict[str, Any]:
    kind = type(work).__name__.lower()
    return {"work": kind, **{name: value for name, value in dataclasses.asdict(found).items() if name != "advice"}}


def _assumed(plan: StagesPlan) -> str:
    works = [work for stage in plan.stages for work in stage.work]
    sampled = sorted({f"{work.mean:.0f} of {work.limit:,}" for work in works if isinstance(work, Sampling)})
    trained = sorted({f"{work.mean:.0f}" for work in works if isinstance(work, Training)})
    parts = [f"tokens of a sampled response {', '.join(sampled)}"] if sampled else []
    parts += [f"of a trained one {', '.join(trained)}"] if trained else []
    parts += [f"{name}={value:g}" for name, value in _numbers(plan.place.assumed)]
    guessed = "" if all(work.known for work in works if isinstance(work, Sampling)) else "; some prompts are guessed"
    said = (
        "Change them with plan.NAME=VALUE; times are good to a factor of 1.5, without the start of processes, grading"
    )
    return f"{', '.join(parts)}{guessed}. {said} and token tables."


def _numbers(assumed: Assumptions) -> list[tuple[str, float]]:
    fields = dataclasses.asdict(assumed).items()
    return [(name, value) for name, value in fields if isinstance(value, int | float) and name not in _MACHINE]
