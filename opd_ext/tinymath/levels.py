# SPDX-License-Identifier: Apache-2.0
"""The levels of the miniature world: what building, measuring and shipping need to know of each.

The first is short problems whose steps are columns of a sum; the second, :mod:`opd_ext.tinymath.long`, is long chains
in which one wrong line spoils the rest; the third, :mod:`opd_ext.tinymath.tools`, is worked through with tools.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

from opd_ext.tinymath import chats, diagnosis, grader, pretrain, problems, tokenizer
from opd_ext.tinymath.long import chats as long_chats
from opd_ext.tinymath.long import diagnosis as long_diagnosis
from opd_ext.tinymath.long import grader as long_grader
from opd_ext.tinymath.long import problems as long_problems
from opd_ext.tinymath.long import specs as long_specs
from opd_ext.tinymath.long import words as long_words
from opd_ext.tinymath.tools import chats as tool_chats
from opd_ext.tinymath.tools import grader as tool_grader
from opd_ext.tinymath.tools import problems as tool_problems
from opd_ext.tinymath.tools import specs as tool_specs
from opd_ext.tinymath.tools import words as tool_words
from opd_ext.tinymath.tools.rollout import play

SIZES = {"val": 256, "test": 512, "train": 20_000}
"""Problems of each split; the held-out ones are drawn first, so that they do not depend on the size of the training."""
LONG_SIZES = {"val": 256, "test": 1_000, "train": 12_000}
TOOL_SIZES = {"val": 256, "test": 1_000, "train": 12_000}


@dataclass(frozen=True)
class Level:
    """One level.

    Attributes:
        name: its data source, and its folder in ``$OPD_HOME``.
        shipped: its folder below those of the models that come with the package; empty for the first.
        specs: the models.
        sizes: problems of each split.
        problems: module with ``DIFFICULTIES``, ``draw_question``, ``concise_solution`` and ``solve``.
        chats: module with ``textbook``, ``chats`` and ``draw_chat``.
        vocabulary: module with ``phrases`` and ``words``.
        compute_score: the grader, with verl's signature.
        decisive_types: of a question, for TRACE's note.
        about: lines of the card that say what the problems are.
        max_new_tokens: of a response that is measured; None: as :mod:`opd_ext.tinymath.measure` has it.
        measured: validation problems for the card; None: all.
        teachers: models of which the card has the student prompt alone.
        play: lets a model work through prompts in several turns; None: it answers at once. Then ``max_new_tokens`` is
            of one turn.
        tools: text of the module that registers the tools with verl; None: there are none.
    """

    name: str
    shipped: str
    specs: dict[str, pretrain.ModelSpec]
    sizes: dict[str, int]
    problems: ModuleType
    chats: ModuleType
    vocabulary: ModuleType
    compute_score: Callable[..., dict]
    decisive_types: Callable[[str], list[str]]
    about: tuple[str, ...]
    max_new_tokens: int | None = None
    measured: int | None = None
    teachers: tuple[str, ...] = ()
    play: Callable[..., list[tuple[list[int], int]]] | None = None
    tools: str | None = None

    @property
    def difficulties(self) -> tuple[int, ...]:
        return tuple(self.problems.DIFFICULTIES)

    def distinct_questions(self, rng: random.Random) -> Iterator[tuple[int, str]]:
        """Endless ``(difficulty, question)`` pairs, none twice."""
        return problems.distinct_questions(rng, set(), self.problems.draw_question, self.difficulties)

    def answer(self, question: str) -> str:
        return str(self.problems.solve(question)[1])

    def make_tokenizer(self):
        """A fresh tokenizer of this level's vocabulary."""
        return tokenizer.make_tokenizer(self.vocabulary.phrases(), self.vocabulary.words())


FIRST = Level(
    name="tinymath",
    shipped="",
    specs=pretrain.SPECS,
    sizes=SIZES,
    problems=problems,
    chats=chats,
    vocabulary=tokenizer,
    compute_score=grader.compute_score,
    decisive_types=diagnosis.decisive_types,
    about=(
        "Column-by-column arithmetic in English sentences, pre-trained from scratch on synthetic chats.",
        "Difficulties: 1 two-digit sums and differences, 2 three-digit ones, 3 three digits times one digit,",
        "4 four-digit sums and differences, 5 two operations.",
    ),
)
LONG = Level(
    name="tinymath_long",
    shipped="long",
    specs=long_specs.SPECS,
    sizes=LONG_SIZES,
    problems=long_problems,
    chats=long_chats,
    vocabulary=long_words,
    compute_score=long_grader.compute_score,
    decisive_types=long_diagnosis.decisive_types,
    about=(
        "Chains of steps on a counter of two digits, some with a branch, pre-trained from scratch on synthetic chats.",
        "Difficulties: 1 twelve to 14 steps, 2 15 or 16, 3 17 or 18, 4 19 or 20.",
    ),
    max_new_tokens=long_specs.MAX_NEW_TOKENS,
    measured=128,
    teachers=("large",),
)
TOOLS = Level(
    name="tinymath_tools",
    shipped="tools",
    specs=tool_specs.SPECS,
    sizes=TOOL_SIZES,
    problems=tool_problems,
    chats=tool_chats,
    vocabulary=tool_words,
    compute_score=tool_grader.compute_score,
    decisive_types=tool_chats.decisive_types,
    about=(
        "Bills made out with a price list and a calculator, in up to six turns, pre-trained from scratch.",
        "Tokens are those that the model wrote, over all turns. Difficulty: items of a basket.",
    ),
    max_new_tokens=tool_specs.MAX_NEW_TOKENS,
    play=play,
    tools=tool_specs.TOOLS_FILE,
)
LEVELS = {"first": FIRST, "long": LONG, "tools": TOOLS}
