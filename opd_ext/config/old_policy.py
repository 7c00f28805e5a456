# SPDX-License-Identifier: Apache-2.0
"""What a batch's updates look like: trainer and plan ask the same functions, above all for the old policy."""

from typing import Literal

from omegaconf import DictConfig

from opd_ext.config.schema import OPDConfig

Source = Literal["nobody", "sampler", "update", "pass"]
"""nobody reads them · the sampler's stand for them · the update's own, detached · a pass of their own in front of it"""


def updates(config: DictConfig) -> int:
    """Optimiser steps on a batch of rollouts."""
    actor = config.actor_rollout_ref.actor
    return -(-config.data.train_batch_size // actor.ppo_mini_batch_size) * actor.ppo_epochs


def old_log_probs(config: DictConfig, opd: OPDConfig, steps: int) -> Source:
    """Where a batch of ``steps`` optimiser steps has its old log-probs from.

    In front of its only step the policy is the one that the step starts from: a pass would compute, by the same
    weights, what the update computes anyway.

    A pass goes through the head by which the update goes: the chunked one beside a teacher, verl's own without one
    (GRPO, CISPO). The chunked head in front of verl's update would save no memory, of which the update needs more, and
    the ratio would not begin at 1: its logits are float32, and verl's bfloat16, which has steps of 1/8 from 16 on.
    """
    read = opd.distils and (opd.samples_tokens or opd.credit.reads_old_log_probs)
    if not opd.policy.present and not (read and steps > 1):
        return "nobody"
    correction = config.algorithm.rollout_correction
    if correction and correction.bypass_mode:
        return "sampler"
    return "pass" if steps > 1 or _read_before_the_update(config) else "update"


def whole_entropies(config: DictConfig, old: Source) -> bool:
    """Whether verl's own update computes entropies of whole logits: for a bonus, or for a metric.

    Where the update keeps old log-probs it keeps entropies, too, of a few rows at a time, and the metric is theirs.
    """
    actor = config.actor_rollout_ref.actor
    return bool(actor.entropy_coeff != 0 or (actor.calculate_entropy and old != "update"))


def sampler_cap(config: DictConfig) -> float | None:
    """Cap of the weights by which tokens are corrected for the sampler; None: there is no such correction."""
    correction = config.algorithm.rollout_correction
    if not config.actor_rollout_ref.rollout.calculate_log_probs or not correction or correction.rollout_is is None:
        return None
    return float(correction.rollout_is_threshold)


def _read_before_the_update(config: DictConfig) -> bool:
    """Whether the batch's advantages or weights rest on old log-probs, or the update keeps none that could be asked."""
    ref, algorithm = config.actor_rollout_ref, config.algorithm
    return (
        algorithm.use_kl_in_reward
        or "optimal_token_baseline" in algorithm.adv_estimator
        or (ref.rollout.calculate_log_probs and corrects_beyond_tokens(config))
        or ref.actor.shuffle  # the order of rows would be lost
        or ref.model.use_fused_kernels
    )


def corrects_beyond_tokens(config: DictConfig) -> bool:
    """Whether the sampler is corrected for by more than a capped weight of each token, which the loss itself can make.

    Rejection needs the whole batch, and so does a normalised weight; a weight of sequences, or one with a lower
    bound ("0.5_2"), is left to verl.
    """
    correction = config.algorithm.rollout_correction
    if not correction:
        return False
    if correction.rollout_rs is not None or correction.rollout_is_batch_normalize:
        return True
    if correction.rollout_is is None:
        return False
    return correction.rollout_is != "token" or "_" in str(correction.rollout_is_threshold)
