# SPDX-License-Identifier: Apache-2.0
"""What a policy term does to every token: read off verl's loss by its gradient, whatever that loss is.

The term is a function of log-probs. Its gradient is what a token weighs; that gradient, divided by the one at a ratio
of 1, is what clips and caps have made of the ratio.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from opd_ext.config.old_policy import corrects_beyond_tokens, old_log_probs, sampler_cap, updates
from opd_ext.inspection.methods import CannotApply, Method
from opd_ext.objective.batch import PolicyTerm, Shape
from opd_ext.ratios import importance_clip

if TYPE_CHECKING:
    from opd_ext.bridge.recorded_policy import RecordedPolicy, Terms

Row = Mapping[str, Any]


class PolicySignals(NamedTuple):
    """Per response token, detached.

    Attributes:
        advantage: of the reward, after what the teacher has made of it (``opd.policy.gate``, ``.shaping``).
        ratio: of the policy at hand to the old one.
        gate: what the loss multiplies the advantage with: the ratio, 0 where a clip is active, the cap where one is.
        weight: minus the gradient of the term for the token's log-prob: advantage, gate, correction for the sampler,
            reduction and ``opd.policy.weight``.
    """

    advantage: Float[Tensor, " N"]
    ratio: Float[Tensor, " N"]
    gate: Float[Tensor, " N"]
    weight: Float[Tensor, " N"]


class Watched:
    """A policy term that keeps what the objective calls it with."""

    def __init__(self, terms: "Terms") -> None:
        self.terms = terms
        self.seen: tuple[Tensor, Tensor, Shape | None] | None = None

    def __call__(
        self, log_prob: Float[Tensor, " N"], entropy: Float[Tensor, " N"], shape: Shape | None
    ) -> Float[Tensor, ""]:
        self.seen = (log_prob.detach(), entropy.detach(), shape)
        return self.terms.full(log_prob, entropy, shape)

    def signals(self, plain: Float[Tensor, " N"]) -> PolicySignals:
        """Of the micro-batch that it was called with.

        Args:
            plain: the advantages without weights of the method.
        """
        assert self.seen is not None, "the objective has called its policy term"
        log_prob, entropy, shape = self.seen
        shaped = _unchanged if shape is None else shape

        def never_zero(advantages: Tensor) -> Tensor:
            """A token whose advantage is 0 has a ratio, too, and is clipped or not as one that is rewarded."""
            found = shaped(advantages)
            return torch.where(found == 0, torch.ones_like(found), found)

        weight = -_gradient(self.terms.full, log_prob, entropy, shape)
        free = _gradient(self.terms.neutral, log_prob, entropy, never_zero)
        bound = _gradient(self.terms.uncorrected, log_prob, entropy, never_zero)
        gate = bound / torch.where(free == 0, torch.ones_like(free), free)  # both are 0 where nothing is trained
        old = self.terms.old_log_prob
        ratio = torch.ones_like(log_prob) if old is None else importance_clip(log_prob, old, math.inf)
        return PolicySignals(shaped(plain), ratio, gate, weight)


def _unchanged(advantages: Tensor) -> Tensor:
    return advantages


def _gradient(term: PolicyTerm, log_prob: Tensor, entropy: Tensor, shape: Shape | None) -> Tensor:
    leaf = log_prob.clone().requires_grad_()
    (found,) = torch.autograd.grad(term(leaf, entropy, shape), leaf)
    return found


class AppliedPolicy:
    """The policy term of a method, ready for the rollouts of some steps.

    Args:
        step: of the weights that are looked from.
        rollouts: all of every step; a step is taken to be one batch with one update.

    Raises:
        CannotApply: its advantages need what these rollouts do not have.
    """

    def __init__(self, method: Method, step: int, rollouts: Sequence[Row], device: str, own: bool) -> None:
        self.step, self.device, config = step, device, method.config
        by_step: dict[int, list[Row]] = {}
        for row in rollouts:
            by_step.setdefault(row["step"], []).append(row)
        if not own and all(len({row["uid"] for row in rows}) == len(rows) for rows in by_step.values()):
            raise CannotApply("its advantages compare several rollouts of a prompt, and this run sampled one of each.")
        self.recorded = _recorded(method)
        self.plain: dict[tuple, Tensor] = {}
        self.weighed: dict[tuple, Tensor] = {}
        for rows in by_step.values():
            try:
                found = self.recorded.advantages(rows)
            except (KeyError, AssertionError, TypeError):
                estimator = config.algorithm.adv_estimator
                raise CannotApply(
                    f"its advantages ({estimator}) need more than the rollouts that a run keeps."
                ) from None
            for row, plain, weighed in zip(rows, *found, strict=True):
                self.plain[_key(row)], self.weighed[_key(row)] = plain.to(device), weighed.to(device)
        self.counts = {step: (sum(sum(row["loss_mask"]) for row in rows), len(rows)) for step, rows in by_step.items()}
        self.sampled = all("rollout_log_probs" in row for row in rollouts)
        self.to_sampler = old_log_probs(config, method.opd, updates(config)) == "sampler"
        self.corrected = sampler_cap(config) is not None if not corrects_beyond_tokens(config) else False
        method.notes += self._notes(method)

    def _notes(self, method: Method) -> list[str]:
        config, found = method.config, []
        current = any(self._current(step) for step in self.counts)
        if not self.sampled and (self.to_sampler or not all(map(self._current, self.counts))):
            found.append("The sampler's log-probs were not recorded, so every importance ratio is taken to be 1.")
        elif current and not self.to_sampler:
            several = updates(config)
            more = f", as before the first of the {several} updates of a step" if several > 1 else ""
            found.append(f"These weights sampled these rollouts{more}: every ratio is 1, and nothing is clipped.")
        if not all(map(self._current, self.counts)) and self.sampled and not self.to_sampler:
            found.append("Rollouts of older weights: ratios are to the sampler's log-probs.")
        if corrects_beyond_tokens(config):
            found.append("Its correction for the sampler needs whole batches and is not shown.")
        if config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward:
            found.append("Its KL penalty is not shown.")
        return found

    def _current(self, step: int) -> bool:
        return step == self.step + 1

    def watched(self, rows: Sequence[Row]) -> Watched:
        """The term of a micro-batch of rollouts of one step."""
        current = (self._current(rows[0]["step"]) and not self.to_sampler) or not self.sampled
        corrected = current and self.corrected and self.sampled
        advantages = [self.weighed[_key(row)] for row in rows]
        tokens, sequences = self.counts[rows[0]["step"]]
        return Watched(self.recorded.terms(rows, advantages, tokens, sequences, current, corrected))

    def advantages(self, rows: Sequence[Row]) -> Float[Tensor, " N"]:
        """Of a micro-batch, packed, without weights of the method."""
        return torch.cat([self.plain[_key(row)] for row in rows])


def _recorded(method: Method) -> "RecordedPolicy":
    """verl is imported where something needs it, and what it says of engines that it does not find is no news here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="verl")
        from opd_ext.bridge.recorded_policy import RecordedPolicy
    return RecordedPolicy(method.config, method.opd.policy)


def _key(row: Row) -> tuple:
    return row["step"], row["uid"], row["sample"]
