# SPDX-License-Identifier: Apache-2.0
"""The loss of a micro-batch whose samples have several teachers: one lesson each, put together token by token.

A lesson has samples, a teacher, a context (which made the teacher's rows), a divergence and a weight. Samples are cut
between lessons, so every row meets the vocabulary once, and the loss is the one that a single teacher would give who
says of every sample what its own teacher says: reductions count over the whole batch, the policy term sees it whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_ext.objective.batch import MicroBatch, PolicyTerm, Terms, chosen
from opd_ext.objective.byte_spans import SpanScores
from opd_ext.objective.chunks import Side
from opd_ext.objective.head import GradientSum
from opd_ext.objective.objective import Objective


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What one teacher says of its samples.

    Attributes:
        objective: its divergence, and all that lessons share.
        samples: places of its samples in the micro-batch, in order.
        teacher: hidden states of its samples' tokens [n, Ht], of this rank's rows where ranks share the batch, and the
            head that belongs to them; None: it is served, and the micro-batch has its log-probs, or it has another
            tokenizer, or no sample in the whole batch.
        reference: rows [n, H] of the initial model, for a surrogate that extrapolates.
        weight: of its distillation term, beside the batch's.
        served: what it says is in ``teacher_log_prob``, or in ``teacher_topk``.
        byte_spans: what it says of its samples' tokens [n], if it has another tokenizer.
    """

    objective: Objective
    samples: Sequence[int]
    teacher: Side | None = None
    reference: Float[Tensor, "_n H"] | None = None
    weight: float = 1.0
    served: bool = False
    byte_spans: SpanScores | None = None


def taught(
    batch: MicroBatch,
    hidden: Float[Tensor, "_n H"],
    weight: Float[Tensor, "V H"],
    lessons: Sequence[Lesson],
    policy: PolicyTerm | None = None,
) -> Terms:
    """Loss and per-token terms of one micro-batch, every sample of which is in one of ``lessons``.

    Args:
        hidden, weight: of the student, as :class:`Objective` takes them.
        lessons: all that the run has, in the same order every time: micro-batches report the same quantities whether or
            not a lesson has a sample in them. One alone is the objective itself.

    Raises:
        ValueError: a sample is in no lesson, or in two.
    """
    objective, alone = lessons[0].objective, policy is None
    if len(lessons) == 1:
        terms = _of_one(batch, Side(hidden, weight), lessons[0], alone, None)
        return objective.finished(batch, terms, policy)
    if sorted(place for lesson in lessons for place in lesson.samples) != list(range(len(batch.lengths))):
        raise ValueError("Every sample of a micro-batch must be in one lesson, and in no other.")
    batch = dataclasses.replace(batch, reduced=objective.reduced(batch))
    bounds = torch.tensor([0, *batch.sizes]).cumsum(0).tolist()
    total, parts, places = GradientSum(), [], []
    for lesson in lessons:
        if not lesson.samples:
            continue
        rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in lesson.samples]).to(hidden.device)
        part, own = _part(batch, torch.tensor(lesson.samples, device=hidden.device), rows)
        parts.append(_of_one(part, Side(hidden[own], weight), lesson, alone, total))
        places.append(rows)
    terms = _joined(parts, torch.cat(places).argsort(), lessons, alone)
    return objective.finished(batch, terms, policy)


def _of_one(batch: MicroBatch, student: Side, lesson: Lesson, alone: bool, total: GradientSum | None) -> Terms:
    batch = dataclasses.replace(
        batch,
        distillation_weight=batch.distillation_weight * lesson.weight,
        known_ids=None if lesson.teacher is None else len(lesson.teacher.weight),
        teacher_log_prob=batch.teacher_log_prob if lesson.served else None,
        teacher_topk=batch.teacher_topk if lesson.served else None,
        byte_spans=lesson.byte_spans,
    )
    return lesson.objective.distilled(batch, student, lesson.teacher, alone, lesson.reference, total)


def _part(
    batch: MicroBatch, samples: Int[Tensor, " b"], rows: Int[Tensor, " n"]
) -> tuple[MicroBatch, Int[Tensor, " k"]]:
    """Some samples of a micro-batch, with the counts and the reduction of the whole; which hidden states are theirs."""
    per_token = ("labels", "mask", "span_label", "rollout_log_probs", "old_log_probs", "teacher_log_prob", "reduced")
    per_sample = ("lengths", "sample_mask")
    cut: dict[str, Any] = {}
    for names, where in ((per_token, rows), (per_sample, samples)):
        cut |= {name: values[where] for name in names if (values := getattr(batch, name)) is not None}
    cut["teacher_topk"] = chosen(batch.teacher_topk, rows)
    share, own = (None, rows) if batch.share is None else batch.share.pick(rows)
    return dataclasses.replace(batch, share=share, **cut), own


def _joined(parts: Sequence[Terms], order: Int[Tensor, " N"], lessons: Sequence[Lesson], alone: bool) -> Terms:
    """Terms of all tokens; what is reported depends on the run's lessons, not on which have a sample here.

    Credit, the teacher's entropy and log-probs mean something only where every lesson has them; a divergence without a
    bound clips nothing.
    """
    reported = {
        "divergence": True,
        "teacher_log_prob": not any(lesson.served and lesson.objective.surrogate is None for lesson in lessons),
        "teacher_entropy": not any(lesson.served for lesson in lessons),
        "credit": not any(lesson.objective.weighs_beforehand(alone) or _on_spans(lesson) for lesson in lessons),
        "clipped": any(lesson.objective.clips for lesson in lessons),
        "weight": True,
        "per_token": True,
    }
    found = {name: torch.cat([getattr(part, name) for part in parts])[order] for name in _ALWAYS}
    for name, is_reported in reported.items():
        if is_reported:
            values = [getattr(part, name) for part in parts]
            filled = [_zeros(part) if value is None else value for part, value in zip(parts, values, strict=True)]
            found[name] = torch.cat(filled)[order]
    loss = parts[0].loss
    for part in parts[1:]:
        loss = loss + part.loss
    return Terms(loss=loss, **found)


_ALWAYS = ("student_log_prob", "student_entropy", "distilled")


def _on_spans(lesson: Lesson) -> bool:
    objective = lesson.objective
    return objective.surrogate is None and objective.branches[0].label is not None


def _zeros(part: Terms) -> Float[Tensor, " n"]:
    return torch.zeros_like(part.student_log_prob).detach()
