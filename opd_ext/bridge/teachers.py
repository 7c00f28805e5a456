# SPDX-License-Identifier: Apache-2.0
"""The teachers of a student's engine: who is asked about which samples, and what each says as a lesson of the loss.

A batch is cut between its teachers, every one of which passes over its own samples alone; teachers of equal weights
share a pass. Passes are collective, so all ranks make the same ones: a rank that has fewer samples for a teacher fills
up with sequences of two tokens, and a teacher whom no rank needs is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id

from opd_ext.bridge.adapters import TeacherAdapter
from opd_ext.bridge.served_teacher import ServedTeacher
from opd_ext.objective.byte_spans import SpanScores, joined, score, unspoken
from opd_ext.objective.chunks import Side
from opd_ext.objective.lessons import Lesson
from opd_ext.objective.objective import Objective
from opd_ext.teacher.kinds import NoTeacher, Teacher

if TYPE_CHECKING:
    from opd_ext.bridge.engine import OPDEngine

LESSON = "lesson"
"""Column of a batch: which of the teachers a sample has, by its place. Absent where there is one."""

STUDENT_SPANS, TEACHER_SPANS = "student_byte_span", "teacher_byte_span"
"""Columns of a batch, jagged: of every response token, in the student's tokens and in the teacher's, the number of its
span of text. Absent where every teacher has the student's tokenizer."""

READ = "teacher_reads"
"""Column of a batch, jagged: of every token that a teacher reads behind its prompt, 1 where it is the rollout's own, 0
where the teacher was told it in a turn. Absent where no teacher is told anything there."""


@dataclasses.dataclass(frozen=True)
class Tutor:
    """A teacher as the student's engine has it.

    Attributes:
        kind: whose weights teach.
        own: what holds weights of its own, if it has such: an engine, an adapter on the student's, or servers; several
            teachers may share one.
        objective: the loss, with this teacher's divergence.
        name: in ``opd.teachers``; empty where there is one.
        weight: of its distillation term, beside the batch's.
        served: verl's servers have scored its samples, so nobody is asked.
        foreign: it has a tokenizer of its own, and reads responses in its own tokens.
    """

    kind: Teacher = NoTeacher()
    own: OPDEngine | TeacherAdapter | ServedTeacher | None = None
    objective: Objective = Objective()
    name: str = ""
    weight: float = 1.0
    served: bool = False
    foreign: bool = False

    def engine(self, student: OPDEngine) -> OPDEngine:
        """Through whose module its passes go, as far as they are made here."""
        elsewhere = self.own is None or isinstance(self.own, (TeacherAdapter, ServedTeacher))
        return student if elsewhere else self.own


class Answers(NamedTuple):
    """What the teachers say of a mini-batch.

    Attributes:
        rows: per sample, the teacher's hidden states [R, Ht] in the compute dtype, this rank's where ranks share
            sequences; None without a teacher.
        references: the same of the initial model, where a loss extrapolates from it.
        heads: per teacher, the vocabulary projection [V, Ht]; None for one that was not asked, or is foreign.
        spoken: per sample, what a foreign teacher says of it; None of others, and without a teacher.
    """

    rows: list[Tensor | None]
    references: list[Tensor | None]
    heads: list[Tensor | None]
    spoken: list[SpanScores | None]


def places(data: TensorDict) -> list[int]:
    """The place of every sample's teacher among the tutors."""
    return data[LESSON].tolist() if LESSON in data.keys() else [0] * len(data["has_teacher"])


def ask(student: OPDEngine, data: TensorDict) -> Answers:
    """Let every teacher see its samples (collective).

    Args:
        data: jagged ``teacher_input_ids`` and ``responses``, ``has_teacher`` [B], ``lesson`` [B] if there are several
            teachers, and the spans of either side if one of them is foreign.
    """
    tutors, size = student.tutors, len(data["has_teacher"])
    vocabulary = student.module.get_output_embeddings().weight.shape[0]
    said = Answers([None] * size, [None] * size, [None] * len(tutors), [None] * size)
    of = places(data)
    for group, where, part in _shares(student, _as_read(data)):
        first = tutors[group[0]]
        rows, head = first.kind.output(student, first.own, part)
        for i in group:
            if not tutors[i].foreign:
                said.heads[i] = head[:vocabulary]  # what lies beyond are padding rows, which no id names
        for place, row in zip(where, rows, strict=False):  # behind them are those that fill the share up
            if not tutors[of[place]].foreign:
                said.rows[place] = row if READ not in data.keys() else row[data[READ][place].bool().to(row.device)]
        read = [(place, row) for place, row in zip(where, rows, strict=False) if tutors[of[place]].foreign]
        for place, spoken in _spoken(student, data, [(i, row) for i, row in read if data["has_teacher"][i]], head):
            said.spoken[place] = spoken
        if any(tutors[i].objective.extrapolates for i in group):  # with context `same` the sequences are the student's
            with student.evaluates(), student.disable_adapter():
                references = student.response_hidden_states(part)
            for place, row in zip(where, references, strict=False):
                said.references[place] = row
    return said


def _as_read(data: TensorDict) -> TensorDict:
    """``data`` with responses as long as the teachers read them."""
    if READ in data.keys():
        read = READ
    elif TEACHER_SPANS in data.keys():
        read = TEACHER_SPANS
    else:
        return data
    names = ["teacher_input_ids", "has_teacher", *([LESSON] if LESSON in data.keys() else [])]
    return tu.get_tensordict({name: data[name] for name in names} | {"responses": data[read]})


@torch.no_grad()
def _spoken(
    student: OPDEngine, data: TensorDict, rows: Sequence[tuple[int, Tensor]], head: Tensor
) -> Iterator[tuple[int, SpanScores]]:
    """What a foreign teacher says of its samples, by their places, from its rows [R, H] of each, in one pass of a head.

    Where ranks share sequences, the rows are this rank's, and what is said is of all (collective among them).
    """
    if not rows:
        return
    device, places = head.device, [place for place, _ in rows]
    mine, theirs = ([data[name][place].to(device) for place in places] for name in _SPANS)
    lengths = [len(spans) for spans in theirs]
    labels = [data["teacher_input_ids"][place][-n:] for place, n in zip(places, lengths, strict=True)]
    hidden, share = torch.cat([row for _, row in rows]), student.share_of(lengths)
    values = student.objective.scores(hidden, head, torch.cat(labels).to(device), share)
    log_probs, entropies = (each.split(lengths) for each in values)
    yield from zip(places, map(score, log_probs, entropies, theirs, mine), strict=True)


_SPANS = (STUDENT_SPANS, TEACHER_SPANS)


def _shares(student: OPDEngine, data: TensorDict) -> list[tuple[list[int], list[int], TensorDict]]:
    """Teachers that one pass serves, the samples of theirs, and the batch of that pass."""
    tutors, everyone = student.tutors, list(range(len(data["has_teacher"])))
    if len(tutors) == 1:
        return [([0], everyone, data)]
    groups: list[list[int]] = []
    for i, tutor in enumerate(tutors):
        if tutor.served:
            continue
        alike = next((g for g in groups if (tutors[g[0]].kind, tutors[g[0]].own) == (tutor.kind, tutor.own)), None)
        if alike is None:
            groups.append([i])
        else:
            alike.append(i)
    of, flags = places(data), data["has_teacher"].bool().tolist()
    mine = [[row for row in everyone if flags[row] and of[row] in group] for group in groups]
    counts = torch.tensor([len(rows) for rows in mine], device=get_device_id())
    torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX, group=student.get_data_parallel_group())
    found = []
    for group, rows, count in zip(groups, mine, counts.tolist(), strict=True):
        if count:
            found.append((group, rows, _share(data, rows, _whole(student, tutors[group[0]], count))))
    return found


def _whole(student: OPDEngine, tutor: Tutor, count: int) -> int:
    """``count``, filled up to whole micro-batches where these have a fixed size."""
    engine = tutor.engine(student)
    size = engine.engine_config.infer_micro_batch_size_per_gpu
    fixed = not engine.alone and not engine.engine_config.use_dynamic_bsz and size
    return -(-count // size) * size if fixed else count


def _share(data: TensorDict, rows: Sequence[int], count: int) -> TensorDict:
    """Some samples of a batch and, behind them, sequences without a teacher, ``count`` in all."""
    ids, responses = data["teacher_input_ids"].unbind(), data["responses"].unbind()
    filler = torch.zeros(2, dtype=torch.long, device=ids[0].device)
    more = count - len(rows)

    def jagged(values: Sequence[Tensor], fill: Tensor) -> Tensor:
        return torch.nested.as_nested_tensor([values[row] for row in rows] + [fill] * more, layout=torch.jagged)

    taught = torch.tensor([True] * len(rows) + [False] * more)
    columns = {"teacher_input_ids": jagged(ids, filler), "responses": jagged(responses, filler[:1])}
    return tu.get_tensordict(columns | {"has_teacher": taught})


def lessons(student: OPDEngine, said: Answers | None, micro_batch: TensorDict) -> list[Lesson]:
    """The lessons of a micro-batch, which is still on the host: one per teacher, with or without samples.

    Args:
        said: of the mini-batch; None: verl's servers are the only teachers.
    """
    of, flags = places(micro_batch), micro_batch["has_teacher"].bool().tolist()
    whole = micro_batch["responses"].offsets().diff().tolist()
    lengths = student.own_rows(whole)
    numbers = micro_batch["row"].tolist() if said is not None else []
    found = []
    for i, tutor in enumerate(student.tutors):
        samples = [place for place, own in enumerate(of) if own == i]
        teacher = reference = spans = None
        if said is not None and samples and tutor.foreign:
            parts = [said.spoken[numbers[place]] or unspoken(whole[place], get_device_id()) for place in samples]
            spans = joined(parts)
        elif said is not None and samples and (head := said.heads[i]) is not None:
            asked = [(numbers[place] if flags[place] else None, lengths[place]) for place in samples]
            teacher = Side(_rows(said.rows, asked, head), head)
            if tutor.objective.extrapolates:
                like = next((row for row in said.references if row is not None), head)
                reference = _rows(said.references, asked, like)
        found.append(Lesson(tutor.objective, samples, teacher, reference, tutor.weight, tutor.served, spans))
    return found


def _rows(said: list[Tensor | None], asked: list[tuple[int | None, int]], like: Tensor) -> Tensor:
    """What was said of some samples, end to end, [n, H]; zeros, which no weight lets through, without a teacher."""
    parts = [(None if row is None else said[row], length) for row, length in asked]
    return torch.cat([like.new_zeros(n, like.shape[1]) if part is None else part for part, n in parts])


def marks(student: OPDEngine, micro_batch: TensorDict, sample: Tensor) -> dict[str, Tensor]:
    """By the name of each of several teachers, its tokens [N] bool; ``sample`` [N] is the sample of every token."""
    if len(student.tutors) == 1:
        return {}
    own = micro_batch[LESSON][sample]
    return {tutor.name: own == i for i, tutor in enumerate(student.tutors)}
