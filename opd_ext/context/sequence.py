# SPDX-License-Identifier: Apache-2.0
"""From messages to token ids: the one way to render a chat, and the one way to join a prompt to a response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opd_ext.context.base import STUDENT, TEXT


def render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a chat, generation prompt included: exactly what verl's agent loop sends to the model.

    Args:
        tokenizer: a ``transformers`` tokenizer with a chat template (or a custom one set on it).
        messages: ``{"role", "content"}`` mappings, oldest first.
        template_kwargs: verl's ``data.apply_chat_template_kwargs``, e.g. ``{"enable_thinking": True}``.

    Returns:
        Ids, one flat list. Not truncated: verl cuts prompts longer than ``rollout.prompt_length`` on the
        left, which the data set's over-long filter must prevent.
    """
    encoded = _apply(tokenizer, messages, True, template_kwargs)
    # transformers >= 5 returns a mapping by default, and a template call may come back as a batch of one.
    ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    return [int(token) for token in (ids[0] if ids and isinstance(ids[0], list) else ids)]


def render_text(tokenizer: Any, messages: Sequence[Mapping], template_kwargs: Mapping[str, Any] | None = None) -> str:
    """The text that :func:`render` turns into ids."""
    return _apply(tokenizer, messages, False, template_kwargs)


def render_teacher(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    student: Mapping[str, Any],
    overrides: Mapping[str, Any],
    ending: str | None,
) -> list[int]:
    """Token ids of a teacher's chat, see :func:`render`.

    Args:
        student: the student's ``template_kwargs``.
        overrides: what the teacher's are besides.
        ending: see :class:`opd_ext.context.base.TeacherContext`.

    Raises:
        ValueError: the template opens no answer behind the last message, so that there is no ending to exchange.
    """
    kwargs = {**student, **overrides}
    if ending is None:
        return render(tokenizer, messages, kwargs)
    if ending == STUDENT:
        chat = _apply(tokenizer, messages, False, kwargs, opened=False)
        text = chat + opening(tokenizer, messages, student)
    else:
        text = render_text(tokenizer, messages, kwargs) + ending.removeprefix(TEXT)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def opening(tokenizer: Any, messages: Sequence[Mapping], template_kwargs: Mapping[str, Any] | None = None) -> str:
    """What a template puts behind the last message for the answer to begin, e.g. ``<|im_start|>assistant``.

    Raises:
        ValueError: the template changes what comes before, too.
    """
    chat = _apply(tokenizer, messages, False, template_kwargs, opened=False)
    whole = render_text(tokenizer, messages, template_kwargs)
    if not whole.startswith(chat):
        raise ValueError("the chat template does more than to open the answer: leave opd.context.ending at null")
    return whole.removeprefix(chat)


def _apply(
    tokenizer: Any,
    messages: Sequence[Mapping],
    tokenize: bool,
    template_kwargs: Mapping[str, Any] | None,
    opened: bool = True,
) -> Any:
    """The one call of a chat template in this package: student, teacher and evaluation render alike."""
    chat = [dict(message) for message in messages]
    return tokenizer.apply_chat_template(
        chat, tokenize=tokenize, **{"add_generation_prompt": opened, **(template_kwargs or {})}
    )


def build_teacher_sequence(
    teacher_prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    max_length: int,
    *,
    student_prompt_ids: Sequence[int] = (),
) -> list[int] | None:
    """The teacher's prompt followed by the very ids that the student sampled.

    Nothing is decoded, re-encoded or appended: an end-of-sequence token is there only if it was sampled.

    Args:
        teacher_prompt_ids, response_ids: token ids.
        max_length: cap on prompt plus response, in tokens, for the student's sequence and the teacher's.
        student_prompt_ids: the prompt that the response was sampled from; leave it out where the student's
            side is already known to fit.

    Returns:
        The ids, or None if either side is too long. Such a pair is dropped whole: cutting one side would pair
        the student's distribution at one token with the teacher's at another.
    """
    prompt_length = max(len(teacher_prompt_ids), len(student_prompt_ids))
    if prompt_length + len(response_ids) > max_length:
        return None
    return [*teacher_prompt_ids, *response_ids]
