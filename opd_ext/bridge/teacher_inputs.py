# SPDX-License-Identifier: Apache-2.0
"""What each rollout of a batch is to be taught: the teacher's token sequence and the labels of its annotated spans."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from opd_ext.bridge.rollouts import is_correct
from opd_ext.context.base import STUDENT
from opd_ext.context.contexts import TeacherContext
from opd_ext.context.sequence import build_teacher_sequence, render, render_teacher
from opd_ext.control_tokens import as_text
from opd_ext.credit.annotate import annotation_metrics
from opd_ext.tokens.texts import decode


@dataclass
class TeacherInput:
    """One rollout as its teacher sees it.

    Attributes:
        ids: teacher prompt + sampled response; None: this rollout has no teacher.
        too_long: there would be a teacher, but student's or teacher's sequence exceeds the limit.
        span_label: class of every response token (0 none, 1 key, 2 error), or None without an annotator.
    """

    ids: list[int] | None
    too_long: bool = False
    span_label: list[int] | None = None


def plan_teacher_inputs(
    rows: list[dict[str, Any]],
    batch: KVBatchMeta,
    context: TeacherContext,
    tokenizer: Any,
    template_kwargs: Mapping[str, Any],
    tools: list[dict[str, Any]] | None,
    max_pair_length: int,
    step: int,
    active_spans: Collection[int] | None,
) -> tuple[list[TeacherInput], dict[str, float]]:
    """One teacher input per rollout, and metrics of them all.

    Args:
        rows: as :func:`opd_ext.bridge.rollouts.read_rows` returns them, in the order of ``batch``. Those with a
            teacher get its prompt as ``teacher_prompt``.
        template_kwargs: of the student's chat template; the context may override some.
        tools: schemas that an agent may have put into the prompt.
        max_pair_length: tokens of prompt + response, of the student and of the teacher.
        active_spans: labels that have a divergence; None: no annotator is at work. A token keeps such a label only if
            its rollout has a teacher, since otherwise nothing would train it; a rollout whose spans have none needs no
            teacher.
    """
    fields = ["prompts", "responses", "loss_mask", "raw_prompt", "extra_info"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    prompts, responses, masks = (data[name].unbind() for name in fields[:3])
    raw_prompts, extra_infos = list(data["raw_prompt"]), list(data["extra_info"])
    body = as_text(tokenizer)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        member = {"session": row["sample"], "score": row["score"], "response": body(row["output"])}
        groups.setdefault(row["uid"], []).append(member)
    overrides, sent_with, longest = context.template_kwargs(), {}, 0
    inputs, samples = [], []
    prompts_shown: list[tuple[dict[str, Any], list[int]]] = []
    for i, row in enumerate(rows):
        annotation = row.get("annotation") or {}
        sample = {
            "raw_prompt": list(_data(raw_prompts[i])),
            "extra_info": _as_text(body, _data(extra_infos[i])),
            "uid": row["uid"],
            "session": row["sample"],
            "score": row["score"],
            "feedback": body(row.get("feedback") or ""),
            "response": body(row["output"]),
            "group": groups[row["uid"]],
            "types": list(annotation.get("types", ())),
            "correct": is_correct(row["acc"], row["score"]),
            "step": step,
        }
        samples.append(sample)
        messages, shown, response = context.messages(sample), TeacherInput(None), responses[i].tolist()
        found = {label for _, _, label in annotation.get("runs", ())}
        if active_spans is not None and found and not found & set(active_spans):
            messages = None
        if messages is not None and (masks[i].any() or not response):  # else a rollout that was never finished
            sent = prompts[i].tolist()
            alike = messages == sample["raw_prompt"] and overrides.items() <= template_kwargs.items()
            if alike and context.ending in (None, STUDENT):
                prompt = sent  # the teacher is to see what the student saw
            else:
                if row["uid"] not in sent_with:
                    sent_with[row["uid"]] = rendered_with(tokenizer, sent, sample, template_kwargs, tools)
                prompt = render_teacher(tokenizer, messages, sent_with[row["uid"]], overrides, context.ending)
            longest = max(longest, len(prompt))
            prompts_shown.append((row, prompt))
            shown.ids = build_teacher_sequence(prompt, response, max_pair_length, student_prompt_ids=sent)
            shown.too_long = shown.ids is None
        if active_spans is not None:
            runs = usable_runs(annotation.get("runs", ()), active_spans, shown.ids is not None)
            shown.span_label = span_labels(runs, len(response))
        inputs.append(shown)
    texts = decode(tokenizer, [prompt for _, prompt in prompts_shown], skip_special_tokens=False)
    for (row, _), text in zip(prompts_shown, texts, strict=True):
        row["teacher_prompt"] = text
    metrics = {
        "teacher/samples": float(np.mean([shown.ids is not None for shown in inputs])),
        "teacher/prompt_tokens_max": float(longest),
        "rollout/too_long": float(np.mean([shown.too_long for shown in inputs])),
    }
    if active_spans is not None:
        metrics |= annotation_metrics([row.get("annotation") for row in rows], [len(ids) for ids in responses])
    return inputs, metrics | {f"context/{name}": value for name, value in context.metrics(samples).items()}


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


def put_teacher_inputs(batch: KVBatchMeta, inputs: list[TeacherInput], eos: int) -> None:
    """Write ``teacher_input_ids``, ``has_teacher`` and, if there are labels, ``span_label`` beside the rollouts.

    A rollout without a teacher gets a placeholder of one prompt and one response token.
    """
    fields: dict[str, Any] = {
        "teacher_input_ids": _jagged([[eos, eos] if shown.ids is None else shown.ids for shown in inputs]),
        "has_teacher": torch.tensor([shown.ids is not None for shown in inputs]),
    }
    if any(shown.span_label is not None for shown in inputs):
        fields["span_label"] = _jagged([shown.span_label for shown in inputs])
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=tu.get_tensordict(fields))


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


def neutralise_padding(batch: KVBatchMeta, eos: int, annotated: bool) -> None:
    """Take the teacher's input from the rows that fill the batch up.

    verl fills it to a multiple of the ranks with copies of a row whose mask is zero and whose response is one token;
    the copies carry that row's input, which does not fit them.
    """
    keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if tag.get("is_padding")]
    if keys:
        padding = KVBatchMeta(partition_id=batch.partition_id, keys=keys, tags=[{} for _ in keys])
        nothing = TeacherInput(None, span_label=[0] if annotated else None)
        put_teacher_inputs(padding, [nothing] * len(keys), eos)
