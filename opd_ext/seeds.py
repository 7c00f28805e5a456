# SPDX-License-Identifier: Apache-2.0
"""Seeds that depend on what is asked for, and on nothing else that runs beside it."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def request_seed(identity: str, bits: int = 63) -> int:
    """Seed of one request to a sampler, in [0, 2^bits).

    Args:
        identity: everything that tells this request from others of the run, the run's seed included.
        bits: at most 63; 31 where the sampler takes a C int.
    """
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") >> (64 - bits)


class Copies:
    """Counts equal prompts of one set: copies of a row are further draws, not the same draw again.

    A copy's place among its equals is all that enters, so the draws of a set do not depend on the order of its rows.
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def earlier(self, prompts: Iterable[Any]) -> list[int]:
        """For each prompt, anything that JSON can hold, how many equal ones came before it in this set."""
        found = []
        for prompt in prompts:
            identity = canonical(prompt)
            found.append(self._seen.get(identity, 0))
            self._seen[identity] = found[-1] + 1
        return found


def canonical(value: Any) -> str:
    """The same text for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, default=str)
