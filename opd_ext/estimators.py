# SPDX-License-Identifier: Apache-2.0
"""What samples of a question say: pass@k, the vote of the majority; discovery@k of a search that learns meanwhile."""

from collections import defaultdict
from collections.abc import Sequence
from math import comb


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n independent samples, c of them right, hold a right one (arXiv 2107.03374, eq. 1).

    Unbiased: ``1 - C(n - c, k) / C(n, k)``.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, but n={n}, c={c}, k={k}")
    return 1.0 - comb(n - c, k) / comb(n, k)


def majority(votes: Sequence[str], right: Sequence[float]) -> float:
    """Whether the answer that most samples give is right (self-consistency, arXiv 2203.11171).

    Answers that share the first place count as one drawn among them, equal answers with different verdicts as their
    mean. Who states no answer (``""``) does not vote; without a vote it is wrong.

    >>> majority(["7", "7", "8", ""], [1.0, 1.0, 0.0, 0.0]), majority(["7", "8"], [1.0, 0.0])
    (1.0, 0.5)
    """
    verdicts: dict[str, list[float]] = defaultdict(list)
    for vote, verdict in zip(votes, right, strict=True):
        if vote:
            verdicts[vote].append(verdict)
    most = max(map(len, verdicts.values()), default=0)
    first = [sum(given) / most for given in verdicts.values() if len(given) == most]
    return sum(first) / len(first) if first else 0.0


def discovery_at_k(times: Sequence[int | None], k: int) -> float:
    """Share of searches whose first success was attempt k or earlier (SDPO, arXiv 2601.20802, section 5).

    Args:
        times: attempt of the first success of each search, counted from 1; None: none within its budget.

    Raises:
        ValueError: there is no search.
    """
    if not times:
        raise ValueError("discovery@k needs at least one search")
    return sum(time is not None and time <= k for time in times) / len(times)
