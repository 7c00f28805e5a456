# SPDX-License-Identifier: Apache-2.0
"""The teachers of a run, as its memory and time see them."""

from collections.abc import Mapping
from dataclasses import dataclass

from opd_ext.config.schema import OPDConfig
from opd_ext.config.teachers import View
from opd_ext.plan.shapes import ModelShape, model_shape

# Tokens of the teacher's prompt beyond the student's, by what it is shown.
_SHOWN = {"same": 0, "instruction": 30, "label": 100, "feedback": 2200, "solution": 3700}


@dataclass(frozen=True)
class Served:
    """A server of a teacher (``backend=vllm``).

    Attributes:
        model: what it serves.
        prompt: mean tokens of the teacher's prompt.
        replicas, tp: copies, and devices of each.
        share: of a device's memory that it takes.
        call: tokens of a request.
        moves: how often, per step, weights are sent to it.
        part: of the rollouts that it is asked about.
    """

    model: ModelShape
    prompt: int
    replicas: int
    tp: int
    share: float
    call: int
    moves: float
    part: float

    @property
    def devices(self) -> int:
        return self.replicas * self.tp


def servers(opd: OPDConfig, taught: Mapping[str, ModelShape], steps: int) -> tuple[Served, ...]:
    """Those of ours; every teacher is taken to have as many rows."""
    found = []
    for name, view in opd.teacher_servers.items():
        serving, kind = view.opd.teacher.vllm, view.opd.teacher.kind
        moved = sum(kind.share(step, 1) > 0 for step in range(1, steps + 1)) / max(1, steps)
        part = sum(other.server == name for other in opd.views) / len(opd.views)
        size = (serving.replicas, serving.tensor_parallel_size, serving.gpu_memory_utilization)
        found.append(Served(taught[view.name], prompt(view.opd), *size, serving.tokens_per_call, moved, part))
    return tuple(found)


def told_bytes(opd: OPDConfig) -> int:
    """What verl's teacher servers tell of every token of prompt and response; 0 where no teacher is on them.

    Of the sampled token, or of each of the k likeliest, an id (int32) and a log-prob (float32).
    """
    return 8 * (opd.served_topk or 1) if "server" in opd.backends else 0


def asked(opd: OPDConfig) -> list[View]:
    """Those that pass over their rows here; a served one does so elsewhere."""
    return [view for view in opd.views if opd.distils and view.opd.teacher.backend == "engine"]


def moving(opd: OPDConfig, steps: int) -> list[str]:
    """Teachers whose weights do not stay what they were within so many steps; of those that share some, the first."""
    return [
        view.name
        for view in opd.teacher_weights.values()
        if any(view.opd.teacher.kind.share(step, 1) > 0 for step in range(1, steps + 1))
    ]


def models(opd: OPDConfig, student: ModelShape) -> dict[str, ModelShape] | None:
    """The model of every teacher, by its name; None where the size of one that is held here is not known."""
    found = {}
    for view in opd.views:
        shape = model_shape(view.opd.teacher.path) if view.opd.teacher.path else student
        if shape is None and (view.weights is not None or view.server is not None):
            return None
        found[view.name] = shape or student
    return found


def unsized(student: str, opd: OPDConfig) -> list[str]:
    """The models without which there is no estimate, the student's among them."""
    held = [view.opd.teacher.path for view in opd.views if (view.weights, view.server) != (None, None)]
    held = [path for path in held if path]
    return [path for path in dict.fromkeys([student, *held]) if model_shape(path) is None]


def prompt(opd: OPDConfig) -> int:
    """Mean tokens of the teacher's prompt, of settings with one teacher."""
    return opd.plan.mean_teacher_prompt or opd.plan.mean_prompt + _SHOWN.get(opd.context.kind, 0)


def projections(opd: OPDConfig, taught: Mapping[str, ModelShape]) -> int:
    """Elements of the teachers' projections, those of equal teachers once; of one on verl's servers none is here."""
    heads = {}
    for view in opd.views:
        if opd.distils and view.opd.teacher.backend != "server":
            held = view.server if view.weights is None else view.weights
            heads[held, view.opd.teacher.weights if held is None else ""] = taught[view.name].head
    return sum(heads.values())
