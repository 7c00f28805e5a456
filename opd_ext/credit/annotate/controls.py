# SPDX-License-Identifier: Apache-2.0
"""Annotators without a language model: the rule of the miniature world, none at all, and two controls."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from opd_ext.credit.annotate.base import Annotator, Found, Generate, Request, Text, get_annotator, register_annotator
from opd_ext.credit.annotate.config import AnnotatorConfig


@register_annotator("none")
class NoAnnotator(Annotator):
    """Marks nothing."""

    async def find(self, request: Request, text: Text) -> Found:
        return Found("empty")


def _base_of(config: AnnotatorConfig) -> tuple[type[Annotator], AnnotatorConfig]:
    """The annotator whose types a control keeps, and its options.

    Raises:
        ValueError: none is named, or a control itself.
    """
    if not config.base or issubclass(get_annotator(config.base), _Control):
        raise ValueError(f"annotator.kind={config.kind} needs annotator.base, whose types it keeps, e.g. self")
    return get_annotator(config.base), dataclasses.replace(config, kind=config.base, base=None)


class _Control(Annotator):
    """The types of another annotator, at other places: what changes is the location alone."""

    @classmethod
    def check(cls, config: AnnotatorConfig) -> None:
        super().check(config)
        base, options = _base_of(config)
        base.check(options)

    def __init__(self, config: AnnotatorConfig, tokenizer: Any, generate: Generate | None = None) -> None:
        super().__init__(config, tokenizer, generate)
        base, options = _base_of(config)
        self._base = base(options, tokenizer, generate)

    async def find(self, request: Request, text: Text) -> Found:
        return await self._base.find(request, text)

    def _draw(self, request: Request, text: Text, excluded: set[int]) -> list[list[int]]:
        visible = [i for i, (start, end) in enumerate(text.offsets) if end > start and i not in excluded]
        budget = int(self.config.coverage * len(request.response_ids) + 1e-9)
        return [sorted(random.Random(request.seed).sample(visible, min(budget, len(visible))))]


@register_annotator("random25")
class RandomControl(_Control):
    """Uniformly drawn tokens, as many as the coverage allows, in every rollout that ``base`` found spans in."""

    def place(self, request: Request, text: Text, found: Found) -> list[list[int]]:
        return self._draw(request, text, set())


@register_annotator("inverted25")
class InvertedControl(_Control):
    """The same, drawn from the tokens outside the spans."""

    def place(self, request: Request, text: Text, found: Found) -> list[list[int]]:
        inside = {index for group in super().place(request, text, found) for index in group}
        return self._draw(request, text, inside)
