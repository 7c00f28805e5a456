# SPDX-License-Identifier: Apache-2.0
"""Sizes and pre-training of the second level's models."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opd_ext.tinymath.long.chats import LongCorpus, chats, textbook
from opd_ext.tinymath.pretrain import ModelSpec

MAX_NEW_TOKENS = 448
"""One solution in a thousand of the corpus is longer than 400 tokens."""


@dataclass(frozen=True)
class LongSpec(ModelSpec):
    """A model of the second level.

    ``notice`` is how often its authors look again at a slip. ``revision_chats`` are read in a second course, at half
    the rates, by authors with other rates of slips; without it small models lose their place in long chains.
    """

    notice: float = 0.0
    revision_chats: int = 0
    revision_slip_scale: float = 1.0

    def phases(self) -> tuple[tuple[LongCorpus, int], ...]:
        first = (textbook(), self.textbook_chats), (chats(self.slip_scale, self.notice), self.chats)
        if not self.revision_chats:
            return first
        return (*first, (chats(self.revision_slip_scale, self.notice), self.revision_chats))

    def courses(self) -> tuple[tuple[int, ModelSpec], ...]:
        if not self.revision_chats:
            return ((2, self),)
        return (2, self), (1, replace(self, muon_rate=self.muon_rate / 2, adam_rate=self.adam_rate / 2))


SPECS: dict[str, ModelSpec] = {
    "base": LongSpec(
        hidden_size=128,
        layers=3,
        heads=4,
        kv_heads=2,
        intermediate_size=256,
        textbook_chats=10_000,
        chats=16_000,
        revision_chats=4_000,
        revision_slip_scale=0.8,
    ),
    "large": LongSpec(
        hidden_size=128,
        layers=4,
        heads=4,
        kv_heads=2,
        intermediate_size=256,
        textbook_chats=10_000,
        chats=9_000,
        slip_scale=0.25,
        notice=0.8,
        revision_chats=4_500,
        revision_slip_scale=0.25,
    ),
}
