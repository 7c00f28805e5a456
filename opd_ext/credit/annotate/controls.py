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


def _of_base(config: AnnotatorConfig) -> AnnotatorConfig:
    return dataclasses.replace(config, kind=config.base, base=None)


class _Control(Annotator):
    """The types of another annotator, at other places: what changes is the location alone."""

    @classmethod
    def check(cls, config: AnnotatorConfig) -> None:
        super().check(config)
        if not config.base or issubclass(get_annotator(config.base), _Control):
            raise ValueError(f"annotator.kind={config.kind} needs annotator.base, whose types it keeps, e.g. self")
        get_annotator(config.base).check(_of_base(config))

    def __init__(self, config: AnnotatorConfig, tokenizer: Any, generate: Generate | None = None):
        super().__init__(config, tokenizer, generate)
        self._base = get_annotator(config.base)(_of_base(config), tokenizer, generate)

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
