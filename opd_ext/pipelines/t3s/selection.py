# SPDX-License-Identifier: Apache-2.0
"""T3S, training-trajectory-aware token selection (Shen et al., arXiv 2601.10348): which tokens a second run trains.

A pilot fine-tuning loses accuracy on its own training prompts before it regains it. At that bottleneck the response
tokens split: those that the model has become surer of than before training (anchors) and those it is less sure of. The
second run starts again from the base and trains the latter only.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

NOISE = 1e-3  # nats; below it a change of confidence may be rounding


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """Lowest point of the training accuracy.

    ``dip`` is how far below the base it lies; ``has_dip`` whether that is more than the noise asked for; ``at_end``
    whether the run stopped before a recovery could be seen.
    """

    step: int
    dip: float
    has_dip: bool
    at_end: bool


def pick_bottleneck(steps: Sequence[int], accuracy: Sequence[float], min_dip: float = 0.0) -> Bottleneck:
    """The saved step with the lowest accuracy on the training prompts, the earliest of equals.

    Step 0, the base, is what the others are measured against and never the answer: where accuracy only rises, it would
    make every change of confidence 0, no token an anchor, and T3S plain fine-tuning under another name.

    Args:
        steps: increasing, the first of them 0.
        accuracy: in [0, 1], one per step.
        min_dip: the accuracy must fall by more than this, e.g. two standard errors.

    Raises:
        ValueError: step 0 or every later step is missing.
    """
    if len(steps) != len(accuracy) or len(steps) < 2 or steps[0] != 0 or sorted(set(steps)) != list(steps):
        raise ValueError(f"A bottleneck needs accuracies at step 0 and at later, increasing steps; got steps {steps}.")
    lowest = min(range(1, len(steps)), key=lambda index: accuracy[index])
    dip = accuracy[0] - accuracy[lowest]
    return Bottleneck(steps[lowest], dip, has_dip=dip > min_dip, at_end=lowest == len(steps) - 1)


def keep_mask(
    logp_base: Float[Tensor, "*tokens"],
    logp_bottleneck: Float[Tensor, "*tokens"],
    mask: Shaped[Tensor, "*tokens"],
    threshold: float = 0.0,
) -> Bool[Tensor, "*tokens"]:
    """Tokens that stay in the loss: those whose confidence did not rise from base to bottleneck (section 2).

    Args:
        logp_base, logp_bottleneck: natural log-probs of the same tokens under teacher forcing.
        mask: which of them are response tokens, 0/1 or bool.
        threshold: nats; a token is an anchor if its change is strictly greater.

    Returns:
        False outside ``mask``.

    >>> import torch
    >>> base, bottleneck = torch.tensor([-2.0, -2.0, -2.0, -2.0]), torch.tensor([-1.0, -3.0, -2.0, -3.0])
    >>> keep_mask(base, bottleneck, torch.tensor([1, 1, 1, 0]))  # surer: an anchor; the last is no response token
    tensor([False,  True,  True, False])
    """
    return mask.bool() & (logp_bottleneck - logp_base <= threshold)


def restore_mask(
    logp_base: Float[Tensor, "*tokens"],
    logp_bottleneck: Float[Tensor, "*tokens"],
    mask: Shaped[Tensor, "*tokens"],
    tau: float = 0.2,
) -> Bool[Tensor, "*tokens"]:
    """Tokens that a masked-diffusion model must always restore: those that lost more than ``tau`` nats.

    Arguments as for :func:`keep_mask`.
    """
    return mask.bool() & (logp_bottleneck - logp_base < -tau)


def random_keep(keep: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """A random mask that keeps as many tokens of every response as ``keep`` does: the budget-matched control.

    Args:
        keep: per response, [R_i] bool.
    """
    rng = np.random.default_rng(seed)
    return [rng.permutation(row) for row in keep]


def lowest_confidence_keep(keep: Sequence[np.ndarray], logp_base: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The tokens that the base is least sure of, as many per response as ``keep`` does: a control without trajectory.

    Args:
        keep, logp_base: per response, [R_i] bool and float.
    """
    chosen = []
    for row, logp in zip(keep, logp_base, strict=True):
        flags = np.zeros(len(row), dtype=bool)
        flags[np.argsort(logp, kind="stable")[: int(row.sum())]] = True
        chosen.append(flags)
    return chosen


def selection_statistics(
    keep: Sequence[np.ndarray], logp_base: Sequence[np.ndarray], logp_bottleneck: Sequence[np.ndarray]
) -> dict[str, float]:
    """What was selected, over all response tokens: counts, fractions, mean change (nats) and mean base probability.

    ``near_zero_fraction`` counts changes below :data:`NOISE`, where rounding decides.
    """
    kept = np.concatenate([np.asarray(row, dtype=bool) for row in keep])
    base = np.concatenate(list(logp_base)).astype(np.float64)
    change = np.concatenate(list(logp_bottleneck)).astype(np.float64) - base

    def mean(values: np.ndarray) -> float:
        return float(values.mean()) if len(values) else float("nan")

    return {
        "tokens": len(kept),
        "kept": int(kept.sum()),
        "anchor_fraction": mean(~kept),
        "mean_delta_anchor": mean(change[~kept]),
        "mean_delta_kept": mean(change[kept]),
        "mean_base_prob_anchor": mean(np.exp(base[~kept])),
        "mean_base_prob_kept": mean(np.exp(base[kept])),
        "near_zero_fraction": mean(np.abs(change) < NOISE),
    }


def fraction_below_base(logp_base: Sequence[np.ndarray], logp: Sequence[np.ndarray]) -> float:
    """Share of response tokens that a checkpoint is less sure of than the base was."""
    return float((np.concatenate(list(logp)) < np.concatenate(list(logp_base))).mean())


def residual_transfer(
    base: Shaped[Tensor, "*shape"], bottleneck: Shaped[Tensor, "*shape"], final: Shaped[Tensor, "*shape"]
) -> Shaped[Tensor, "*shape"]:
    """Recovering residual transfer of one parameter: ``base + (final - bottleneck)`` in float32, in base's dtype.

    It throws away what training did up to the bottleneck and keeps what it did afterwards. Integer buffers are the
    base's.
    """
    if not base.is_floating_point():
        return base.clone()
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    return (base.to(wide) + (final.to(wide) - bottleneck.to(wide))).to(base.dtype)
