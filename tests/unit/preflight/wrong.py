# SPDX-License-Identifier: Apache-2.0
"""How a wrong input is written down: the words of a command, and what the sentence that refuses it says."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from .conftest import World

MODEL, BUCKET = "actor_rollout_ref.model.path", "actor_rollout_ref.rollout.checkpoint_engine"
GRADER = "reward.custom_reward_function"
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


@dataclasses.dataclass(frozen=True)
class Case:
    """``words`` of the command, or a function that makes files in a world and returns them; what the sentence says."""

    name: str
    words: tuple[str, ...] | Callable[[World], tuple[str, ...]]
    says: tuple[str, ...]


def wrong(name: str, words: str | Callable[[World], object], *says: str) -> Case:
    """``words``: separated by blanks, or from a function; what that returns beside text is the training file."""
    if isinstance(words, str):
        return Case(name, tuple(words.split()), says)

    def made(world: World) -> tuple[str, ...]:
        found = words(world)
        return (f"data.train_files={found}",) if isinstance(found, Path) else tuple(str(found).split("\n"))

    return Case(name, made, says)


def grader(source: str, name: str = "compute_score") -> Callable[[World], str]:
    return lambda world: f"{GRADER}.path={world.file('grader.py', source)}\n{GRADER}.name={name}"


def model(spoil: Callable[[Path], object]) -> Callable[[World], str]:
    return lambda world: f"{MODEL}={world.model(spoil)}"


def user(text: str | None) -> list[dict]:
    return [{"role": "user", "content": text}]
