# SPDX-License-Identifier: Apache-2.0
"""What each rollout of a batch is to be taught, read from the queue and put into it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from opd_ext import lessons
from opd_ext.bridge.teachers import LESSON, READ, STUDENT_SPANS, TEACHER_SPANS
from opd_ext.context.contexts import TeacherContext
from opd_ext.credit.annotate import annotation_metrics
from opd_ext.lessons import TeacherInput
from opd_ext.tokens.byte_spans import OUTSIDE, Foreign
from opd_ext.tokens.texts import decode


@dataclass(frozen=True)
class Desk:
    """A teacher as its inputs see it.

    Attributes:
        context: what it is shown.
        active_spans: labels that have a divergence; None: no annotator is at work. A token keeps such a label only if
            its rollout has a teacher, since otherwise nothing would train it; a rollout whose spans have none needs no
            teacher.
        name: among several; empty where there is one.
        foreign: its tokenizer, if it has one of its own.
    """

    context: TeacherContext
    active_spans: Collection[int] | None = None
    name: str = ""
    foreign: Foreign | None = None


def _the_only_one(sources: list[Any], extra_infos: list[Any]) -> list[int]:
    return [0] * len(extra_infos)


def plan_teacher_inputs(
    rows: list[dict[str, Any]],
    batch: KVBatchMeta,
    desks: Sequence[Desk],
    tokenizer: Any,
    template_kwargs: Mapping[str, Any],
    tools: list[dict[str, Any]] | None,
    max_pair_length: int,
    step: int,
    moves_spans: bool = False,
    whose: Callable[[list[Any], list[Any]], list[int]] = _the_only_one,
) -> tuple[list[TeacherInput], dict[str, float]]:
    """One teacher input per rollout, and metrics of them all.

    Args:
        rows: as :func:`opd_ext.bridge.rollouts.read_rows` returns them, in the order of ``batch``. Those with a
            teacher get its prompt as ``teacher_prompt`` and, of several, its name as ``teacher``.
        desks: the teachers. Each plans for its own rows as if there were no others; a prompt's rollouts are all one
            teacher's, so its groups are whole.
        template_kwargs: of the student's chat template; the context may override some.
        tools: schemas that an agent may have put into the prompt.
        max_pair_length: tokens of prompt + response, of the student and of the teacher.
        moves_spans: a control: the spans lie elsewhere; what the teacher is told of them stays.
        whose: data sources and ``extra_info`` of all rows -> the place of each row's teacher.

    Raises:
        UnknownKey: a row names none of several teachers.
    """
    fields = ["prompts", "responses", "loss_mask", "raw_prompt", "extra_info"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    columns: list[list[Any]] = [[row.tolist() for row in data[name].unbind()] for name in fields[:3]]
    columns += [[_data(value) for value in list(data[name])] for name in fields[3:]]
    responses, masks, extra_infos = columns[1], columns[2], columns[4]
    of = whose([row.get("data_source") for row in rows], extra_infos)
    inputs: list[TeacherInput] = [TeacherInput(None)] * len(rows)
    metrics: dict[str, float] = {}
    for lesson, desk in enumerate(desks):
        mine = [i for i, place in enumerate(of) if place == lesson]
        if not mine and len(desks) > 1:
            continue
        planned, samples = lessons.plan(
            [rows[i] for i in mine],
            *([column[i] for i in mine] for column in columns),
            desk.context,
            tokenizer,
            template_kwargs,
            tools,
            max_pair_length,
            step,
            desk.active_spans,
            moves_spans,
            desk.foreign,
        )
        place = f"teacher/{desk.name}/" if desk.name else ""
        for i, shown in zip(mine, planned, strict=True):
            inputs[i] = replace(shown, lesson=lesson)
            if desk.name:
                rows[i]["teacher"] = desk.name
        if desk.foreign is not None:
            metrics |= {place + name: value for name, value in _covered(planned, [masks[i] for i in mine]).items()}
        metrics |= {f"{place}context/{name}": value for name, value in desk.context.metrics(samples).items()}
    shown_to = [(row, shown) for row, shown in zip(rows, inputs, strict=True) if shown.prompt is not None]
    for lesson, desk in enumerate(desks):
        mine = [(row, shown.prompt) for row, shown in shown_to if shown.lesson == lesson]
        reader = tokenizer if desk.foreign is None else desk.foreign.teacher.tokenizer
        texts = decode(reader, [prompt for _, prompt in mine], skip_special_tokens=False)
        for (row, _), text in zip(mine, texts, strict=True):
            row["teacher_prompt"] = text
    metrics |= {
        "teacher/samples": float(np.mean([shown.ids is not None for shown in inputs])),
        "teacher/prompt_tokens_max": float(max((len(shown.prompt) for _, shown in shown_to), default=0)),
        "rollout/too_long": float(np.mean([shown.too_long for shown in inputs])),
    }
    if any(desk.active_spans is not None for desk in desks):
        metrics |= annotation_metrics([row.get("annotation") for row in rows], [len(ids) for ids in responses])
    return inputs, metrics


def _covered(planned: Sequence[TeacherInput], masks: Sequence[Sequence[int]]) -> dict[str, float]:
    """How much of what is trained a teacher of another tokenizer could read, and how coarse its spans are."""
    read = [
        (shown.byte_spans, mask) for shown, mask in zip(planned, masks, strict=True) if shown.byte_spans is not None
    ]
    trained = sum(sum(map(bool, mask)) for mask in masks)
    pairs = ((span, used) for spans, mask in read for span, used in zip(spans.student, mask, strict=True))
    covered = sum(bool(used) and span != OUTSIDE for span, used in pairs)
    tokens = sum(span != OUTSIDE for spans, _ in read for span in spans.student)
    numbers = sum(max(spans.student, default=OUTSIDE) + 1 for spans, _ in read)
    return {
        "byte_spans/covered": covered / trained if trained else 0.0,
        "byte_spans/tokens": tokens / numbers if numbers else 0.0,
    }


def put_teacher_inputs(
    batch: KVBatchMeta,
    inputs: list[TeacherInput],
    eos: int,
    lengths: Sequence[int] | None = None,
    in_turns: bool = False,
) -> None:
    """Write ``teacher_input_ids``, ``has_teacher``, ``lesson`` and, with labels, ``span_label`` beside the rollouts.

    With ``lengths``, of the responses, the byte spans of either side as well: a teacher of the student's tokenizer has
    one for every token. With ``in_turns``, where a teacher may be told something in a turn, which of the tokens that it
    reads are the rollout's. A rollout without a teacher gets a placeholder of one prompt and one response token.
    """
    fields: dict[str, Any] = {
        "teacher_input_ids": _jagged([[eos, eos] if shown.ids is None else shown.ids for shown in inputs]),
        "has_teacher": torch.tensor([shown.ids is not None for shown in inputs]),
        LESSON: torch.tensor([shown.lesson for shown in inputs]),
    }
    if any(shown.span_label is not None for shown in inputs):
        fields["span_label"] = _jagged([shown.span_label for shown in inputs])
    if in_turns:
        fields[READ] = _jagged([_own(shown) for shown in inputs])
    if lengths is not None:
        spans = [_spans(shown, length) for shown, length in zip(inputs, lengths, strict=True)]
        fields |= {STUDENT_SPANS: _jagged([own for own, _ in spans]), TEACHER_SPANS: _jagged([its for _, its in spans])}
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=tu.get_tensordict(fields))


def _own(shown: TeacherInput) -> list[int]:
    if shown.ids is None or shown.prompt is None:
        return [1]
    return shown.own or [1] * (len(shown.ids) - len(shown.prompt))


def _spans(shown: TeacherInput, length: int) -> tuple[list[int], list[int]]:
    """Numbers of the byte spans of a response, in the student's tokens and in the teacher's."""
    if shown.byte_spans is not None and shown.ids is not None:
        return shown.byte_spans.student, shown.byte_spans.teacher
    if shown.ids is None:
        return [OUTSIDE] * length, [OUTSIDE]
    return list(range(length)), list(range(length))


def _jagged(rows: list[list[int]]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def _data(value: Any) -> Any:
    """The object inside tensordict's non-tensor wrapper, or the value itself."""
    return getattr(value, "data", value)


def without_rows(batch: KVBatchMeta, dropped: Collection[int]) -> KVBatchMeta:
    """The batch without some of its rows, which leave the queue as well."""
    if not dropped:
        return batch
    tq.kv_clear(keys=[batch.keys[i] for i in dropped], partition_id=batch.partition_id)
    kept = [i for i in range(len(batch.keys)) if i not in set(dropped)]
    return KVBatchMeta(
        partition_id=batch.partition_id,
        keys=[batch.keys[i] for i in kept],
        tags=[dict(batch.tags[i]) for i in kept],
        extra_info=batch.extra_info,
    )


def neutralise_padding(
    batch: KVBatchMeta, eos: int, annotated: bool, foreign: bool = False, in_turns: bool = False
) -> None:
    """Take the teacher's input from the rows that fill the batch up.

    verl fills it to a multiple of the ranks with copies of a row whose mask is zero and whose response is one token;
    the copies carry that row's input, which does not fit them.
    """
    keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if tag.get("is_padding")]
    if keys:
        padding = KVBatchMeta(partition_id=batch.partition_id, keys=keys, tags=[{} for _ in keys])
        nothing = TeacherInput(None, span_label=[0] if annotated else None)
        put_teacher_inputs(padding, [nothing] * len(keys), eos, [1] * len(keys) if foreign else None, in_turns)
