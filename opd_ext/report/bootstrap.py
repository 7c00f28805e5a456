# SPDX-License-Identifier: Apache-2.0
"""Uncertainty of evaluation numbers: the paired bootstrap over problems.

Two evaluations on the same problems are strongly correlated, so the interval that answers "did it change?"
is the one of the difference by problem, not the overlap of two separate intervals. Problems, not samples,
are resampled: several samples of a problem are no independent evidence about other problems. The bootstrap
serves means, differences and ratios (token reduction) alike and assumes no distribution.

It treats the problems as a sample of the task. Measured on 4,000 synthetic evaluations each, a 95 % interval
of a mean holds the truth this often (a Student t interval in brackets): normal values 0.90 (0.95) at 10
problems, 0.94 (0.95) at 30, 0.95 (0.95) at 100; exponential ones, as skewed as lengths may be, 0.87 (0.90),
0.92 (0.93), 0.94 (0.94). Accuracy differences of -1, 0 and 1 are called lower without reason in at most 2.2 %
of cases from 10 problems to 200. What is the same for every problem gets an interval of width 0.
"""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 10_000
SEED = 20260305
LEVEL = 0.95

_BLOCK = 1_000  # resamples per multinomial draw: 1,000 x 5,000 problems of int64 are 40 MB


def resampled_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Means over bootstrap resamples of the problems.

    Args:
        values: ``[problems, columns]``, one row per problem. All columns see the same resample, so functions
            of several columns (differences, ratios) are paired by problem.

    Returns:
        ``[resamples, columns]``, float64; the same for the same arguments.
    """
    values = np.asarray(values, dtype=np.float64)
    problems = len(values)
    rng = np.random.default_rng(seed)
    blocks = [min(_BLOCK, resamples - start) for start in range(0, resamples, _BLOCK)]
    counts = (rng.multinomial(problems, np.full(problems, 1 / problems), size=size) for size in blocks)
    return np.concatenate([block @ values / problems for block in counts])


def estimate(
    values: np.ndarray, means: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], level: float = LEVEL
) -> tuple[float, float, float]:
    """Point estimate of a statistic of column means, with its percentile interval.

    Args:
        values: ``[problems, columns]``.
        means: ``[resamples, columns]`` from :func:`resampled_means`.
        statistic: maps ``[..., columns]`` to ``[...]``.

    Returns:
        ``(value, low, high)``; the bounds are NaN for a single problem, which says nothing about its spread.
    """
    value = float(statistic(np.asarray(values, dtype=np.float64).mean(axis=0)))
    if len(values) < 2:
        return value, float("nan"), float("nan")
    tail = 50 * (1 - level)
    low, high = np.percentile(statistic(means), [tail, 100 - tail])
    return value, float(low), float(high)


def sign_flip_p(differences: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> float:
    """Two-sided p-value of "the paired differences are symmetric about 0", by random changes of their signs.

    The test itself counts as one of the resamples, so the p-value is valid at any number of them (Phipson and Smyth,
    arXiv 1603.05766), and never 0.

    Args:
        differences: ``[problems]``.
    """
    differences = np.asarray(differences, dtype=np.float64)
    rng = np.random.default_rng(seed)
    seen = abs(differences.sum()) * (1 - 1e-12)  # sums in another order differ in their last bits
    counts = (min(_BLOCK, resamples - start) for start in range(0, resamples, _BLOCK))
    signs = (rng.integers(0, 2, size=(count, len(differences)), dtype=np.int8) * 2 - 1 for count in counts)
    extreme = sum(int((np.abs(block @ differences) >= seen).sum()) for block in signs)
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method (Scand. J. Statist. 6, 1979), in their order."""
    corrected, bound = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        bound = max(bound, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = bound
    return corrected
