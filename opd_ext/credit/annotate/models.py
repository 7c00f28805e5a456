# SPDX-License-Identifier: Apache-2.0
"""Annotators that are language models: the model in training itself, any OpenAI-compatible endpoint, kept answers."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd_ext.control_tokens import as_text
from opd_ext.credit.annotate.base import Annotator, Found, Generate, Request, Text, get_annotator, register_annotator
from opd_ext.credit.annotate.config import AnnotatorConfig
from opd_ext.credit.annotate.parse import parse
from opd_ext.credit.annotate.prompts import TEMPLATE_VERSION, annotation_prompt, answer_schema
from opd_ext.errors import in_brief
from opd_ext.files import write_whole

_UNREADABLE = {"parse_error": "holds no JSON", "wrong_schema": "is not of the form that it was asked for"}
_SHOWN = 80
"""Characters of an unreadable answer that are told."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model wrote, and tokens read and written."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0


class AnswerCache:
    """Answers on disk, one file each, so that a run that is resumed or replayed asks nothing twice."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    @staticmethod
    def key(annotator: Sequence[Any], problem: str, segments: Sequence[str], correct: bool) -> str:
        """SHA-256 of everything that decides an answer: who is asked how, and what is shown in which segments."""
        identity = json.dumps([annotator, TEMPLATE_VERSION, problem, segments, bool(correct)])
        return hashlib.sha256(identity.encode()).hexdigest()

    def get(self, key: str) -> Answer | None:
        """The answer kept under ``key``, or None."""
        try:
            return Answer(**json.loads(self._path(key).read_text()))
        except FileNotFoundError:
            return None

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer: whole or not at all."""
        write_whole(self._path(key), json.dumps(dataclasses.asdict(answer)))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


class ModelAnnotator(Annotator):
    """Asks for JSON about numbered segments. A subclass says whom (:meth:`ask`)."""

    def __init__(self, config: AnnotatorConfig, tokenizer: Any, generate: Generate | None = None) -> None:
        super().__init__(config, tokenizer, generate)
        self.cache = AnswerCache(config.cache_dir) if config.cache_dir else None
        self._turns = asyncio.Semaphore(config.max_concurrency)
        self._body = as_text(tokenizer, foreign=True)

    def identity(self, request: Request) -> list[Any]:
        """The annotator in cache keys; the model in training differs from step to step, so the seed stands for it."""
        asked = self.config.base if self.config.kind == "replay" else self.config.kind
        step = request.seed if asked == "self" else None
        return [asked, self.config.model, self.config.max_tokens, step]

    async def ask(self, messages: list[dict], schema: dict) -> Answer:
        """One chat completion at temperature 0; ``schema`` is what the answer should look like."""
        raise NotImplementedError

    async def find(self, request: Request, text: Text) -> Found:
        answer = await self._answer(request, text)
        status, named = parse(answer.text, len(text.segments), request.correct)
        cut = text.segments
        spans = [(cut[span.segment_ids[0]][0], cut[span.segment_ids[-1]][1], span.type) for span in named]
        wrong = _UNREADABLE.get(status)
        cause = f"the answer {_beginning(answer.text)} {wrong}" if wrong else ""
        return Found(status, spans, answer.tokens_in, answer.tokens_out, cause)

    async def _answer(self, request: Request, text: Text) -> Answer:
        shown = [text.text[start:end] for start, end in text.segments]
        key = AnswerCache.key(self.identity(request), request.problem, shown, request.correct)
        if self.cache and (kept := self.cache.get(key)):
            return kept
        async with self._turns:
            bodies = [self._body(text) for text in shown]
            messages = annotation_prompt(self._body(request.problem), bodies, request.correct)
            schema = answer_schema(len(shown), request.correct)
            answer = await asyncio.wait_for(
                self.ask(messages, schema), self.config.timeout_s * (self.config.retries + 1)
            )
        if self.cache:
            self.cache.put(key, answer)
        return answer


@register_annotator("self")
class SelfAnnotator(ModelAnnotator):
    """The model that is being trained, on its own rollout servers while they are awake (TRACE's "online-self")."""

    async def ask(self, messages: list[dict], schema: dict) -> Answer:
        if self.generate is None:
            raise RuntimeError("annotator 'self' has no rollout servers here")
        return Answer(*await self.generate(messages, self.config.max_tokens, 0.0))


@register_annotator("api")
class APIAnnotator(ModelAnnotator):
    """A model behind any OpenAI-compatible endpoint. Its key comes from an environment variable, not from a config."""

    needs_key = True

    @classmethod
    def check(cls, config: AnnotatorConfig) -> None:
        super().check(config)
        if not config.model:
            raise ValueError(f"annotator.kind={config.kind} needs annotator.model, the name at its endpoint")
        if cls.needs_key and not os.environ.get(config.api_key_env):
            raise ValueError(f"annotator.kind={config.kind} reads its key from {config.api_key_env}: set that variable")

    def __init__(self, config: AnnotatorConfig, tokenizer: Any, generate: Generate | None = None) -> None:
        super().__init__(config, tokenizer, generate)
        from openai import AsyncOpenAI

        key = os.environ[config.api_key_env] if self.needs_key else "none"
        self._client = AsyncOpenAI(
            api_key=key, base_url=config.base_url, timeout=config.timeout_s, max_retries=config.retries
        )

    async def ask(self, messages: list[dict], schema: dict) -> Answer:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        question: dict[str, Any] = {
            "model": self.config.model,
            "messages": messages,
            "temperature": 0.0,
            "max_tokens": self.config.max_tokens,
            "extra_body": {**self._without_thinking(), **self.config.extra_body},
            **self._constraint(schema),
        }
        try:
            reply = await self._client.chat.completions.create(**question)
        except APITimeoutError as error:
            raise TimeoutError from error
        except APIConnectionError as error:  # says "Connection error." and no more; what it was raised from knows
            raise ConnectionError(f"{self._client.base_url} cannot be reached: {in_brief(_first(error))}") from error
        except APIStatusError as error:
            raise RuntimeError(f"{self._client.base_url} refuses the question: {in_brief(error)}") from error
        usage = reply.usage
        text = reply.choices[0].message.content or ""
        return Answer(text, usage.prompt_tokens if usage else 0, usage.completion_tokens if usage else 0)

    def _constraint(self, schema: dict) -> Mapping[str, Any]:
        if not self.config.structured:
            return {}
        named = {"name": "annotation", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": named}}

    def _without_thinking(self) -> Mapping[str, Any]:
        return {}  # every provider has its own switch: extra_body


@register_annotator("server")
class ServerAnnotator(APIAnnotator):
    """A frozen model on a vLLM server of one's own, asked without thinking and without a key."""

    needs_key = False

    @classmethod
    def check(cls, config: AnnotatorConfig) -> None:
        if not config.base_url:
            raise ValueError("annotator.kind=server needs annotator.base_url, for example http://host:8000/v1")
        super().check(config)

    def _without_thinking(self) -> Mapping[str, Any]:
        return {"chat_template_kwargs": {"enable_thinking": False}}


@register_annotator("replay")
class ReplayAnnotator(ModelAnnotator):
    """Only answers that ``cache_dir`` holds, of the annotator ``base`` (and ``model``); others are skipped."""

    @classmethod
    def check(cls, config: AnnotatorConfig) -> None:
        super().check(config)
        if not config.cache_dir:
            raise ValueError("annotator.kind=replay needs annotator.cache_dir, the folder with the answers")
        if not config.base or not issubclass(get_annotator(config.base), ModelAnnotator) or config.base == "replay":
            raise ValueError("annotator.kind=replay needs annotator.base, whose answers these are: self, api or server")

    async def ask(self, messages: list[dict], schema: dict) -> Answer:
        raise ValueError("the replayed folder holds no answer for this rollout")


def _beginning(answer: str) -> str:
    return repr(answer if len(answer) <= _SHOWN else f"{answer[:_SHOWN]}...")


def _first(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
