# SPDX-License-Identifier: Apache-2.0
"""How the synthetic authors of the pre-training corpus write: one grammar, more or less filler.

A solution is the column-by-column working of :mod:`problems`. At the beginning of *every* line the author
may insert a filler instead, with the same probability each time; that single number is all that an
instruction changes. So a verbose and a concise author share their support at every position, as the two
prompts of a real language model do, and a reverse KL between them has a gradient everywhere. Disjoint
formats would not.

Authors also slip: a column gets a wrong result now and then, and the rest of the working builds on it.
They slip rarely, except where two large digits meet; such a shared weakness is what makes a solution in the
prompt, or feedback on the step that failed, worth reading. Looking again is a fresh attempt at the same
column with a slightly higher slip rate, so a long solution is not a better one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from opd_ext.tinymath.problems import ANSWER_OPENING, REWRITE, Step, expression, working

LOOK_AGAIN = "Wait, let me check again."
RESTATE = "The problem asks for {expression}."
MUSINGS = (
    "Hmm, right so far.",
    "I should be careful here.",
    "Okay, the next step.",
    "Let me go on slowly.",
)
VERBOSE = 0.5
MAX_FILLERS = 5
"""A ceiling that keeps all but two solutions in a thousand within 128 tokens."""


@dataclass(frozen=True)
class Author:
    """Habits of a writer: probabilities at each line (filler) and at each column (slips).

    ``look_again_slip`` adds to the rate of the first attempt; ``told`` is a step that feedback has named.
    """

    filler: float
    slip: float = 0.02
    large_digits_slip: float = 0.4
    look_again_slip: float = 0.045
    told: Step | None = None

    def careful(self, factor: float) -> Author:
        """The same style with every slip rate multiplied by ``factor``."""
        return replace(
            self,
            slip=self.slip * factor,
            large_digits_slip=self.large_digits_slip * factor,
            look_again_slip=self.look_again_slip * factor,
        )

    def slip_rate(self, step: Step, again: bool = False) -> float:
        """How probably the author gets ``step`` wrong; never one that feedback has ``told``."""
        if step.result is None or step == self.told:
            return 0.0
        first = self.large_digits_slip if sum(digit in "6789" for digit in step.work) > 1 else self.slip
        return first + again * self.look_again_slip


def write_solution(rng: random.Random, question: str, author: Author) -> str:
    """A solution of ``question`` in the author's style, ending with the answer line (right or wrong)."""
    lines: list[str] = []
    room = MAX_FILLERS
    work, step, stated = working(question), None, None
    while True:
        while room and rng.random() < author.filler:
            room -= 1
            filler = _draw_filler(rng, question, step)
            lines.append(filler)
            if filler is LOOK_AGAIN:
                stated = _attempt(rng, step, author.slip_rate(step, again=True))
                lines.append(step.line(stated))
        try:
            step = next(work) if step is None else work.send(stated)
        except StopIteration as done:
            return "\n".join([*lines, f"{ANSWER_OPENING}{done.value}"])
        stated = _attempt(rng, step, author.slip_rate(step))
        lines.append(step.line(stated))


def _draw_filler(rng: random.Random, question: str, previous: Step | None) -> str:
    """Only a column can be looked at again, so other lines are followed by the other two kinds."""
    kind = rng.random()
    if kind < 0.35 and previous is not None and previous.label != REWRITE:
        return LOOK_AGAIN
    if kind < 0.5:
        return RESTATE.format(expression=expression(question))
    return rng.choice(MUSINGS)


def _attempt(rng: random.Random, step: Step, slip: float) -> int | None:
    """The result stated for a step: right, or one off (digits stay digits in a difference)."""
    if rng.random() >= slip:
        return step.result
    wrong = step.result + rng.choice((-1, 1))
    if wrong < 0 or (wrong > 9 and "-" in step.work):
        wrong = 2 * step.result - wrong
    return wrong
