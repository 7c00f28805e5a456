# SPDX-License-Identifier: Apache-2.0
"""By which versions of the policy rollouts were sampled, and how far behind the trained one they are.

A version is the number of the step after which its weights were synced; the update of step t starts from t - 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from opd_ext.errors import RunError

LAG = 1
"""Versions between the policy that samples a rollout and the one that is trained on it, at most."""


def measure(tags: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """``policy/version``, ``policy/lag``, ``policy/lag_max`` and ``policy/mixed`` of a batch, within their bounds.

    Args:
        tags: of its rows: ``min_global_steps`` and ``max_global_steps`` are the versions of a row's first and last
            token, None where no server has sampled any.
        step: that trains it.

    Raises:
        RunError: a server has missed a weight sync, or was given new weights in the middle of a rollout.
    """
    spans = [(tag["min_global_steps"], tag["max_global_steps"]) for tag in tags if _version(tag) is not None]
    if not spans:
        return {}
    lags, trained = [step - 1 - first for first, _ in spans], step - 1
    mixed = sum(first != last for first, last in spans) / len(spans)
    if max(lags) > LAG or mixed:
        oldest, newest = min(first for first, _ in spans), max(last for _, last in spans)
        raise RunError(
            f"rollouts of step {step} were sampled by versions {oldest} to {newest} of the policy, {mixed:.0%} of them "
            f"by several, and at most {LAG} version may lie between sampling and training ({trained}): a rollout "
            "server has missed a weight sync."
        )
    return {
        "policy/version": sum(last for _, last in spans) / len(spans),
        "policy/lag": sum(lags) / len(lags),
        "policy/lag_max": float(max(lags)),
        "policy/mixed": mixed,
    }


def is_current(tags: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Whether the policy that step ``step`` updates has sampled all rows, as far as their servers said."""
    return all(version is None or version == step - 1 for version in map(_version, tags))


def _version(tag: Mapping[str, Any]) -> Any:
    return tag.get("min_global_steps")
