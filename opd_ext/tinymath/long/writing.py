# SPDX-License-Identifier: Apache-2.0
"""How the synthetic authors of the second level write, slip, and notice that they have slipped.

Lines and filler are those of the first level: filler stands before any line, with one probability. What is new is
which lines go wrong, and that the difference between authors is more than a rate:

* **Eager.** Where the tens of total and threshold are equal, the ordinary author says yes, mostly also when it should
  be no. The mistake is the likelier choice, so sampling at a low temperature does not repair it.
* **Forgetful.** A carry or borrow is sometimes forgotten where it is not a narrow one: the tens are off by one.
* **Noticing.** A careful author who has slipped often looks again at once and gets it right. The ordinary one looks
  again at random and slips as before. So a careful reader of somebody else's working wants to write something that
  the writer would not, right behind the mistake and nowhere else; once the next line stands, it builds on the mistake.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from opd_ext.tinymath.long.problems import MODULUS, Step, answer_line, follow, working

LOOK_AGAIN = "Wait, let me check again."
RESTATE = "The counter shows {total}."
MUSINGS = (
    "Hmm, right so far.",
    "I should be careful here.",
    "Okay, the next step.",
    "Let me go on slowly.",
)
VERBOSE = 0.4
MAX_FILLERS = 14
"""A ceiling that keeps nearly every solution within 400 tokens."""


@dataclass(frozen=True)
class Author:
    """Habits of a writer: probabilities at each line.

    ``eager`` says yes at a close branch that is a no, ``hesitant`` no at a close one that is a yes, ``forgetful``
    loses a heavy carry or borrow, ``slip`` is everything else. ``notice`` is how often a slip is looked at again at
    once, and then got right. ``told`` is the label of a line that feedback has named.
    """

    filler: float
    eager: float = 0.55
    hesitant: float = 0.04
    forgetful: float = 0.06
    slip: float = 0.002
    notice: float = 0.0
    told: str | None = None

    def careful(self, factor: float) -> Author:
        """The same style with every rate of slips multiplied by ``factor``."""
        return replace(
            self,
            eager=self.eager * factor,
            hesitant=self.hesitant * factor,
            forgetful=self.forgetful * factor,
            slip=self.slip * factor,
        )

    def weakness(self, step: Step) -> tuple[float, float]:
        """How probably the wrong branch is taken, and the wrong total written, at the right ``step``."""
        if step.operation.label == self.told:
            return 0.0, 0.0
        wrong_branch = 0.0
        if step.yes is not None:
            wrong_branch = (self.hesitant if step.yes else self.eager) if step.is_close else self.slip
        return wrong_branch, self.forgetful if step.is_heavy else self.slip

    def attempt(self, rng: random.Random, step: Step) -> Step:
        """What the author states where ``step`` is right."""
        wrong_branch, _ = self.weakness(step)
        stated = step
        if rng.random() < wrong_branch:
            stated = follow(step.operation, step.before, not step.yes)
        _, wrong_total = self.weakness(stated)
        if rng.random() < wrong_total:
            stated = replace(stated, after=_miscount(rng, stated))
        return stated


def _miscount(rng: random.Random, step: Step) -> int:
    """The total with a forgotten carry or borrow, or one off."""
    if step.is_heavy:
        return (step.after + (-10 if step.move[0] == "+" else 10)) % MODULUS
    return (step.after + rng.choice((-1, 1))) % MODULUS


def write_solution(rng: random.Random, question: str, author: Author) -> str:
    """A solution of ``question`` in the author's style, ending with the answer line (right or wrong)."""
    lines: list[str] = []
    room = MAX_FILLERS
    work, stated = working(question), None
    while True:
        try:
            step = next(work) if stated is None else work.send(stated)
        except StopIteration as done:
            return "\n".join([*lines, answer_line(done.value)])
        while room and rng.random() < author.filler:
            room -= 1
            lines.append(_filler(rng, step.before))
        stated = author.attempt(rng, step)
        lines.append(stated.line)
        noticed = stated != step and rng.random() < author.notice
        if noticed or (room and rng.random() < 0.25 * author.filler):
            room -= 1
            stated = step if noticed else author.attempt(rng, step)
            lines += [LOOK_AGAIN, stated.line]


def _filler(rng: random.Random, total: int) -> str:
    return RESTATE.format(total=f"{total:02d}") if rng.random() < 0.25 else rng.choice(MUSINGS)
