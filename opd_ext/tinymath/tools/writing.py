# SPDX-License-Identifier: Apache-2.0
"""How the synthetic authors of this level work: what they say before a call, what they call, and how they go wrong.

* **They ramble.** Filler stands before a call or the answer, with one probability; an instruction takes it away.
* **They look twice.** With turns to spare an item is sometimes looked up again.
* **They mix up.** A term of the sum has another price or quantity, mostly where the quantity is large.
* **They guess.** The sum is sometimes not worked out, and the answer made up.
* **They ask for what is not there.** The tool says so, and they ask again.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace

from opd_ext.tinymath.tools.problems import ANSWER_OPENING, MAX_TURNS, calculate, look_up, parse

CALL_LOOK_UP = '<tool_call>{"name": "look_up", "arguments": {"shop": '
CALL_ITEM = ', "item": "'
CALL_CALCULATE = '<tool_call>{"name": "calculate", "arguments": {"expression": "'
CALL_END = '"}}</tool_call>'

NEXT = "I look up the next price."
CHECK = "I should check that again."
RESTATE = "The price of {item} is {price}."
MUSINGS = (
    "Let me think about this.",
    "I should be careful here.",
    "Hmm, right so far.",
    "Okay, what is next?",
)
VERBOSE = 0.6
TWICE = 0.2
LARGE = 7
"""Quantities from here on are mixed up more often."""
ABSENT = "thing"
"""What no shop has."""


def look_up_call(shop: int, item: str) -> str:
    return f"{CALL_LOOK_UP}{shop}{CALL_ITEM}{item}{CALL_END}"


def calculate_call(expression: str) -> str:
    return f"{CALL_CALCULATE}{expression}{CALL_END}"


def tool_says(call: str) -> str:
    """What verl's tool loop answers to a call in this form, errors included."""
    found = json.loads(call.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    tool = {"look_up": look_up, "calculate": calculate}[found["name"]]
    try:
        return str(tool(**found["arguments"]))
    except Exception as error:
        return f"Error executing tool '{found['name']}': {error}"


@dataclass(frozen=True)
class Author:
    """Habits of a writer.

    Attributes:
        filler: probability of a filler before a call or the answer, and of one more behind it.
        twice: probability at every look-up of making it again, while turns are left.
        mix_up: probability that a term with a large quantity is wrong; a fifth of it where that is small.
        guess: probability of an answer without a sum.
        absent: probability of asking for what is not there first, while turns are left.
        told: the term that feedback has named, or -1 if it named the sum itself; such are right.
    """

    filler: float
    twice: float = TWICE
    mix_up: float = 0.35
    guess: float = 0.08
    absent: float = 0.04
    told: int | None = None

    def careful(self, factor: float) -> Author:
        """The same style with every rate of slips multiplied by ``factor``."""
        return replace(self, mix_up=self.mix_up * factor, guess=self.guess * factor, absent=self.absent * factor)

    def brief(self, filler: float) -> Author:
        """The same care with so much filler, and with second looks in proportion."""
        return replace(self, filler=filler, twice=TWICE * filler / VERBOSE)

    def slip(self, term: int, quantity: int) -> float:
        """How probably a term goes wrong."""
        if self.told == term:
            return 0.0
        return self.mix_up if quantity >= LARGE else self.mix_up / 5


@dataclass
class Transcript:
    """What an assistant wrote and what the tools said, in turns: ``said[i]`` answers ``written[i]``."""

    written: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def as_reply(self, turn_start: str, turn_end: str) -> str:
        """All of it behind the opened answer, in the level's chat template, without the last end."""
        parts = []
        for i, turn in enumerate(self.written):
            parts.append(turn)
            if i < len(self.said):
                parts.append(f"{turn_end}\n{turn_start}tool\n{self.said[i]}{turn_end}\n{turn_start}assistant\n")
        return "".join(parts)

    def as_text(self) -> str:
        """The same without special tokens, as a rollout is decoded."""
        return self.as_reply("", "")


def transcript(question: str, author: Author, rng: random.Random) -> Transcript:
    """A way through ``question`` in the author's style, ending with an answer (right or wrong)."""
    shop, terms = parse(question)
    done, prices = Transcript(), []
    spare = MAX_TURNS - len(terms) - 2

    def call(text: str, price_of: str | None = None) -> str:
        done.written.append(_remarks(rng, author, prices, price_of) + text)
        done.said.append(tool_says(text))
        return done.said[-1]

    for _, item in terms:
        if spare and rng.random() < author.absent:
            spare -= 1
            call(look_up_call(shop, ABSENT))
        prices.append((item, call(look_up_call(shop, item), item)))
        if spare and rng.random() < author.twice:
            spare -= 1
            done.written.append(f"{CHECK}\n{look_up_call(shop, item)}")
            done.said.append(tool_says(look_up_call(shop, item)))
    stated = _stated(rng, author, terms, [int(price) for _, price in prices])
    guesses = author.told != -1 and rng.random() < author.guess
    total = str(rng.randint(40, 999)) if guesses else call(calculate_call(stated))
    done.written.append(f"{_remarks(rng, author, prices, None)}{ANSWER_OPENING}{total}")
    return done


def _remarks(rng: random.Random, author: Author, prices: list[tuple[str, str]], wanted: str | None) -> str:
    """Lines of filler, each with its line break."""
    lines: list[str] = []
    while len(lines) < 2 and rng.random() < author.filler:
        choices = [*MUSINGS]
        if wanted:
            choices += [NEXT, NEXT]
        if prices:
            item, price = prices[-1]
            choices += [RESTATE.format(item=item, price=price)] * 2
        lines.append(rng.choice(choices) + "\n")
    return "".join(lines)


def _stated(rng: random.Random, author: Author, terms: list[tuple[int, str]], prices: list[int]) -> str:
    """The sum as the author writes it."""
    written = []
    for i, ((quantity, _), price) in enumerate(zip(terms, prices, strict=True)):
        if rng.random() < author.slip(i, quantity):
            if len(prices) > 1 and rng.random() < 0.5:
                price = rng.choice(prices[:i] + prices[i + 1 :])
            else:
                quantity -= 1
        written.append(f"{quantity}*{price}")
    return "+".join(written)
