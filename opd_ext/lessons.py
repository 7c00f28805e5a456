# SPDX-License-Identifier: Apache-2.0
"""What each rollout of a step is to be taught: the teacher's token sequence and the labels of its annotated spans.

Plain values in and out, so that the trainer and whoever looks at its rollouts afterwards plan alike.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from opd_ext.context.base import STUDENT
from opd_ext.context.contexts import TeacherContext
from opd_ext.context.sequence import build_teacher_sequence, render, render_teacher
from opd_ext.context.turns import tell
from opd_ext.control_tokens import as_text
from opd_ext.credit.placement import moved_spans
from opd_ext.tokens.byte_spans import ByteSpans, Foreign, align


@dataclass
class TeacherInput:
    """One rollout as its teacher sees it.

    Attributes:
        ids: teacher prompt + sampled response; None: this rollout has no teacher.
        too_long: there would be a teacher, but student's or teacher's sequence exceeds the limit.
        span_label: class of every response token (0 none, 1 key, 2 error), or None without an annotator.
        prompt: the teacher's prompt, as part of ``ids`` or of what was too long; None without a teacher.
        lesson: the place of its teacher among several.
        own: of ``ids`` behind ``prompt``, 1 where an id is the rollout's, 0 where its teacher was told it in a turn;
            None: all are the rollout's.
        byte_spans: how a teacher of another tokenizer reads the response; its tokens stand in ``ids``. None of others.
    """

    ids: list[int] | None
    too_long: bool = False
    span_label: list[int] | None = None
    prompt: list[int] | None = None
    lesson: int = 0
    byte_spans: ByteSpans | None = None
    own: list[int] | None = None


def plan(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    masks: Sequence[Sequence[int]],
    raw_prompts: Sequence[Sequence[Mapping[str, Any]]],
    extra_infos: Sequence[Any],
    context: TeacherContext,
    tokenizer: Any,
    template_kwargs: Mapping[str, Any],
    tools: list[dict[str, Any]] | None,
    max_pair_length: int,
    step: int,
    active_spans: Collection[int] | None,
    moves_spans: bool = False,
    foreign: Foreign | None = None,
) -> tuple[list[TeacherInput], list[dict[str, Any]]]:
    """One teacher input per rollout, and the samples that ``context`` was shown.

    Args:
        rows: of the grader and the annotator: ``uid``, ``sample``, ``score``, ``acc``, ``output`` and, where there are
            such, ``feedback`` and ``annotation``. A group must be here as a whole.
        prompts, responses: ids that the student was sent, and that it sampled.
        masks: of the responses, 1 where a token is trained.
        raw_prompts, extra_infos: columns of the data set.
        template_kwargs: of the student's chat template; the context may override some.
        tools: schemas that an agent may have put into the prompt.
        max_pair_length: tokens of prompt + response, of the student and of the teacher.
        active_spans: labels that have a divergence; None: no annotator is at work. A token keeps such a label only if
            its rollout has a teacher, since otherwise nothing would train it; a rollout whose spans have none needs no
            teacher.
        moves_spans: a control: the spans lie elsewhere; what the teacher is told of them stays.
        foreign: the teacher's tokenizer, if it is another than ``tokenizer``.

    Raises:
        ValueError: a sample lacks what the context shows.
        RuntimeError: see :func:`rendered_with`.
    """
    body = as_text(tokenizer) if foreign is None else as_text(foreign.teacher.tokenizer, foreign=True)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        member = {"session": row["sample"], "score": row["score"], "response": body(row["output"])}
        groups.setdefault(row["uid"], []).append(member)
    overrides, sent_with = context.template_kwargs(), {}
    samples: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        annotation = row.get("annotation") or {}
        sample = {
            "raw_prompt": list(raw_prompts[i]),
            "extra_info": _as_text(body, extra_infos[i]),
            "uid": row["uid"],
            "session": row["sample"],
            "score": row["score"],
            "feedback": body(row.get("feedback") or ""),
            "response": body(row["output"]),
            "group": groups[row["uid"]],
            "types": list(annotation.get("types", ())),
            "correct": is_correct(row["acc"], row["score"]),
            "step": step,
            "batch": samples,
        }
        samples.append(sample)
    spans = [None] * len(rows) if foreign is None else align(foreign.student, foreign.teacher, responses, foreign.stops)
    inputs = []
    for i, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        annotation = row.get("annotation") or {}
        messages, shown, response = context.messages(sample), TeacherInput(None), responses[i]
        found = {label for _, _, label in annotation.get("runs", ())}
        if active_spans is not None and found and not found & set(active_spans):
            messages = None
        if messages is not None and (any(masks[i]) or not response):  # else a rollout that was never finished
            sent = prompts[i]
            if foreign is not None:
                kwargs = {**template_kwargs, **overrides, **({"tools": tools} if tools else {})}
                shown = _read_apart(foreign, messages, kwargs, sent, response, spans[i], max_pair_length)
                inputs.append(shown)
                continue
            alike = messages == sample["raw_prompt"] and overrides.items() <= template_kwargs.items()
            if alike and context.ending in (None, STUDENT):
                shown.prompt = sent  # the teacher is to see what the student saw
            else:
                if row["uid"] not in sent_with:
                    sent_with[row["uid"]] = rendered_with(tokenizer, sent, sample, template_kwargs, tools)
                shown.prompt = render_teacher(tokenizer, messages, sent_with[row["uid"]], overrides, context.ending)
            read = response
            if context.in_turns:
                kwargs = {**template_kwargs, **overrides}
                read, shown.own = tell(tokenizer, response, masks[i], partial(context.told, sample), kwargs)
            shown.ids = build_teacher_sequence(shown.prompt, read, max_pair_length, student_prompt_ids=sent)
            shown.too_long = shown.ids is None
        if active_spans is not None:
            runs = usable_runs(annotation.get("runs", ()), active_spans, shown.ids is not None)
            if moves_spans:
                runs = moved_spans(runs, len(response), f"spans/{step}/{row['uid']}/{row['sample']}")
            shown.span_label = span_labels(runs, len(response))
        inputs.append(shown)
    return inputs, samples


def _read_apart(
    foreign: Foreign,
    messages: Sequence[Mapping[str, Any]],
    kwargs: Mapping[str, Any],
    sent: Sequence[int],
    response: Sequence[int],
    spans: ByteSpans | None,
    max_pair_length: int,
) -> TeacherInput:
    """A rollout as a teacher of another tokenizer sees it: its own template, and the response in its own tokens."""
    if spans is None or not spans.teacher:  # nothing that both could read
        return TeacherInput(None)
    prompt = render(foreign.teacher.tokenizer, messages, kwargs)
    too_long = len(sent) + len(response) > max_pair_length
    ids = None if too_long else build_teacher_sequence(prompt, spans.teacher_ids, max_pair_length)
    return TeacherInput(ids, ids is None, prompt=prompt, byte_spans=spans)


def is_correct(acc: float, score: float) -> bool:
    """Whether a rollout is right where its label decides what is trained: the grader says so, and pays for it."""
    return acc > 0.5 and score > 0


def _as_text(body: Callable[[str], str], extra_info: Any) -> Any:
    """A row's own texts (a solution, say), as a teacher may be shown them."""
    if not isinstance(extra_info, Mapping):
        return extra_info
    return {key: body(value) if isinstance(value, str) else value for key, value in extra_info.items()}


def rendered_with(
    tokenizer: Any,
    sent: list[int],
    sample: Mapping[str, Any],
    template_kwargs: Mapping[str, Any],
    tools: list[dict[str, Any]] | None,
) -> Mapping[str, Any]:
    """Arguments of the chat template that make the prompt which the student was sent of the row's messages.

    A context rewrites those messages, so if they were not what the student saw the teacher would answer another
    question.

    Raises:
        RuntimeError: the template makes another prompt, with tools and without.
    """
    for kwargs in (template_kwargs, {**template_kwargs, "tools": tools}):
        if sent == render(tokenizer, sample["raw_prompt"], kwargs):
            return kwargs
    index = (sample["extra_info"] or {}).get("index")
    raise RuntimeError(
        f"The student was sent {len(sent)} prompt tokens which its chat template does not make of the row (index "
        f"{index}), so the teacher would answer another question: an agent loop that rewrites or cuts prompts needs "
        "opd.context.kind=same."
    )


def usable_runs(
    runs: Iterable[Iterable[int]], active_spans: Collection[int], has_teacher: bool
) -> list[tuple[int, int, int]]:
    """The spans that the loss and the gate may see.

    None where a span has a divergence but its rollout no teacher: gated and untaught, its tokens would not train.
    """
    found = [tuple(run) for run in runs]
    untaught = not has_teacher and any(label in active_spans for _, _, label in found)
    return [] if untaught else found


def span_labels(runs: Iterable[Iterable[int]], length: int) -> list[int]:
    """(start, end, label) runs in response tokens -> one label per token."""
    labels = [0] * length
    for start, end, label in runs:
        labels[start:end] = [label] * (min(end, length) - start)
    return labels
