# SPDX-License-Identifier: Apache-2.0
"""What every annotator shares: from a finished rollout to labelled tokens, without ever failing the rollout.

An annotator that has nothing to say, or breaks, leaves its rollout without spans: it then trains with the plain policy
term. An exception here would cost the whole group of the prompt. Where all of a step break, the trainer ends the run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from opd_ext.credit.annotate.align import AlignmentError, TokenBytes, align, cap, runs
from opd_ext.credit.annotate.config import AnnotatorConfig
from opd_ext.credit.annotate.segments import Interval, segment
from opd_ext.errors import in_brief
from opd_ext.registry import Registry
from opd_ext.spans import ERROR, KEY

STATUSES = (
    "ok",
    "empty",
    "wrong_schema",
    "parse_error",
    "timeout",
    "api_error",
    "skipped",
    "align_failure",
)
FAILURES = ("wrong_schema", "parse_error", "timeout", "api_error", "align_failure")

Generate = Callable[[Sequence[dict], int, float], Awaitable[tuple[str, int, int]]]
"""(messages, max_tokens, temperature) -> (text, prompt tokens, sampled tokens); ``ValueError`` if it does not fit."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One finished rollout.

    Attributes:
        problem: the question as the student was asked it.
        response_ids: sampled tokens; their number is the length that the coverage is a share of.
        correct: outcome; it decides between key and error spans.
        finished: the response ended by itself. A truncated one is not annotated.
        extra_info: the data set's mapping, for rules that know their world; no language model is shown it.
        seed: of controls that draw tokens.
    """

    problem: str
    response_ids: tuple[int, ...]
    correct: bool
    finished: bool = True
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Annotation:
    """What is kept of one request.

    Attributes:
        status: one of :data:`STATUSES`; anything but ``ok`` means no spans.
        types: distinct diagnostic types, in the annotator's order.
        runs: half-open (start, end, label) ranges of response tokens, after the coverage cap; label 1 key, 2 error.
        coverage_precap: share of the response's tokens inside spans before the cap.
        capped: the cap took some away.
        n_segments: that the annotator was shown.
        tokens_in, tokens_out: of a language model that was asked.
        called: an answer was asked for; latency_s: seconds until it was there.
        cause: of a failure, in words; empty otherwise.
    """

    status: str
    types: tuple[str, ...] = ()
    runs: tuple[tuple[int, int, int], ...] = ()
    coverage_precap: float = 0.0
    capped: bool = False
    n_segments: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    called: bool = False
    latency_s: float = 0.0
    cause: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings."""
        return {**dataclasses.asdict(self), "types": list(self.types), "runs": [list(run) for run in self.runs]}


@dataclass(frozen=True)
class Text:
    """The response as text, the character interval of each token, and its segments."""

    text: str
    offsets: list[Interval]
    segments: list[Interval]


@dataclass(frozen=True)
class Found:
    """An annotator's answer: (start, end, type) in characters, in its order of importance."""

    status: str
    spans: Sequence[tuple[int, int, str]] = ()
    tokens_in: int = 0
    tokens_out: int = 0
    cause: str = ""


class Annotator:
    """Marks spans in rollouts. A subclass says where they are (:meth:`find`).

    Attributes:
        options: names of ``config.args`` that it reads, for annotators of a user's own.

    Args:
        config: its options.
        tokenizer: of the student.
        generate: a chat with the model that is being trained, where there is one.

    Raises:
        ValueError: the tokenizer is not byte-level.
    """

    options: ClassVar[Sequence[str]] = ()

    def __init__(self, config: AnnotatorConfig, tokenizer: Any, generate: Generate | None = None) -> None:
        self.config, self.tokenizer, self.generate = config, tokenizer, generate
        self._bytes = TokenBytes(tokenizer)

    @classmethod
    def check(cls, config: AnnotatorConfig) -> None:
        """Refuse options that cannot work, before anything is started.

        Raises:
            ValueError: one sentence that names the option and what to set.
        """
        if not 0 < config.coverage <= 1:
            raise ValueError(f"annotator.coverage={config.coverage} must be in (0, 1]")
        segment("", [], config.paragraph)

    async def find(self, request: Request, text: Text) -> Found:
        """Where the spans are. What it raises becomes a status: ``ValueError`` skipped, a timeout, else api_error."""
        raise NotImplementedError

    def place(self, request: Request, text: Text, found: Found) -> list[list[int]]:
        """Response tokens of each span."""
        return align([[(start, end)] for start, end, _ in found.spans], text.offsets)

    async def annotate(self, request: Request) -> Annotation:
        """Annotate one rollout. Never raises, except when it is cancelled."""
        if not request.finished or not request.response_ids:
            return Annotation("skipped")
        try:
            text = self._read(request)
        except AlignmentError as error:
            _log.warning("annotation: %s", error)
            return Annotation("align_failure", cause=str(error))
        started = time.perf_counter()
        found = await self._ask(request, text)
        waited = time.perf_counter() - started
        groups = self.place(request, text, found) if found.status == "ok" else []
        marked = sum(map(len, groups))
        kept = cap(groups, len(request.response_ids), self.config.coverage)
        status = found.status
        if status == "ok" and not kept:
            status = "empty"
        return Annotation(
            status,
            tuple(dict.fromkeys(name for _, _, name in found.spans)) if kept else (),
            tuple(runs(kept, KEY if request.correct else ERROR)),
            coverage_precap=marked / len(request.response_ids),
            capped=len(kept) < marked,
            n_segments=len(text.segments),
            tokens_in=found.tokens_in,
            tokens_out=found.tokens_out,
            called=True,
            latency_s=waited,
            cause=found.cause,
        )

    def _read(self, request: Request) -> Text:
        text, offsets = self._bytes.text(request.response_ids)
        config = self.config
        cut = segment(text, offsets, config.paragraph, config.min_tokens, config.max_tokens_per_segment)
        return Text(text, offsets, cut)

    async def _ask(self, request: Request, text: Text) -> Found:
        try:
            return await self.find(request, text)
        except (TimeoutError, asyncio.TimeoutError):
            waited = self.config.timeout_s * (self.config.retries + 1)
            return Found("timeout", cause=f"no answer in {waited:g} s (opd.credit.annotator.timeout_s, .retries)")
        except ValueError as error:
            _log.warning("annotation skipped: %s", error)
            return Found("skipped", cause=str(error))
        except Exception as error:
            cause = f"{type(error).__name__}: {in_brief(error)}"
            _log.warning("annotation failed: %s", cause)
            return Found("api_error", cause=cause)


_annotators: Registry[type[Annotator]] = Registry("annotator")
register_annotator = _annotators.register
get_annotator = _annotators.get
annotator_names = _annotators.names


def build_annotator(config: AnnotatorConfig, tokenizer: Any, generate: Generate | None = None) -> Annotator:
    """The configured annotator.

    Raises:
        ValueError: unknown kind, an option that does not fit it, or a tokenizer that is not byte-level.
    """
    kind = get_annotator(config.kind)
    kind.check(config)
    return kind(config, tokenizer, generate)
