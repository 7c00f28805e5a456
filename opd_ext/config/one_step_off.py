# SPDX-License-Identifier: Apache-2.0
"""What a run needs that samples while it trains, and what it cannot do yet; each refusal is one sentence."""

import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd_ext.config.schema import OPDConfig
from opd_ext.errors import ConfigError

BESIDE, SEPARATE = "opd_one_step_off", "opd_separate"
"""Names in ``trainer.v1.trainer_mode``: vLLM on the trainer's devices, or on others."""

_NEEDS: dict[str, tuple[Any, str]] = {
    "trainer.v1.sampler.max_off_policy_threshold": (1, "a batch waits for its own rollouts"),
    "trainer.v1.sampler.max_off_policy_strategy": ("wait", "no rollout is dropped"),
    "trainer.v1.sampler.custom_sampler.path": (None, "a sampler decides which version a batch is of"),
    "actor_rollout_ref.rollout.free_cache_engine": (False, "vLLM samples while the student trains"),
    "algorithm.filter_groups.enable": (False, "groups that are dropped would be sampled anew by another version"),
    "skip.rollout_tq.enable": (False, "what is submitted in one step is trained in the next"),
    "data.gen_batch_size": (None, "prompts are fetched batch by batch"),
}
"""Key: the value that it must have, and why."""
_NEEDS_BESIDE = {"trainer.v1.colocate_async.num_warmup_batches": (1, "the run is one batch ahead, never more")}
_NEEDS_APART = {
    "trainer.v1.separate_async.num_warmup_batches": (1, "the run is one batch ahead, never more"),
    "trainer.v1.separate_async.parameter_sync_step": (1, "weights are synced after every step"),
    "trainer.v1.separate_async.hybrid_rollout.enable_switch": (False, "the trainer's devices train"),
    "actor_rollout_ref.hybrid_engine": (False, "the trainer's devices train"),
    "actor_rollout_ref.model.lora_rank": (0, "merged weights have not been tried"),
}


def samples_ahead(trainer_mode: str) -> bool:
    """Whether such a run samples its next batch while it trains."""
    return trainer_mode in (BESIDE, SEPARATE)


def check(opd: OPDConfig, config: DictConfig) -> None:
    """Refuse what does not go with a policy that is one version older than the one that is trained.

    Raises:
        ConfigError: one sentence.
    """
    mode = config.trainer.v1.trainer_mode
    if not samples_ahead(mode):
        return
    for key, (needed, why) in (_NEEDS | (_NEEDS_APART if mode == SEPARATE else _NEEDS_BESIDE)).items():
        if (value := OmegaConf.select(config, key)) != needed:
            is_now, is_to_be = (json.dumps(each, default=str).strip('"') for each in (value, needed))  # as YAML has it
            raise ConfigError(
                f"{key}={is_now} does not go with trainer.v1.trainer_mode={mode}, where {why}: set it to {is_to_be}, "
                "as the presets of asynchronous do."
            )
    if config.reward.reward_model.enable and not config.reward.reward_model.enable_resource_pool:
        raise ConfigError(
            f"reward.reward_model.enable=true on the trainer's devices needs a vLLM that sleeps, and with "
            f"trainer.v1.trainer_mode={mode} it never does: set enable_resource_pool=true."
        )
    if opd.credit.annotates:
        raise ConfigError(
            f"opd.credit.annotator does not go with trainer.v1.trainer_mode={mode} yet: train synchronously "
            "(asynchronous=null)."
        )
    if "server" in opd.backends:
        raise ConfigError(
            f"opd.teacher.backend=server does not go with trainer.v1.trainer_mode={mode} yet: set backend=engine, or "
            "asynchronous=null."
        )
    if mode == SEPARATE:
        _check_devices(opd, config)
    _check_correction(opd, config, mode)


def _check_devices(opd: OPDConfig, config: DictConfig) -> None:
    """vLLM's own, and a way for weights to get there."""
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    if rollout.nnodes < 1 or rollout.n_gpus_per_node < 1:
        raise ConfigError(
            f"trainer.v1.trainer_mode={SEPARATE} samples on devices of its own: set actor_rollout_ref.rollout.nnodes "
            "and n_gpus_per_node to at least 1."
        )
    backend = rollout.checkpoint_engine.backend
    if backend == "naive" or (opd.device == "cpu" and backend != "gloo"):
        usable = "gloo" if opd.device == "cpu" else "nccl"
        raise ConfigError(
            f"actor_rollout_ref.rollout.checkpoint_engine.backend={backend} brings no weights to the devices of "
            f"trainer.v1.trainer_mode={SEPARATE}: set it to {usable}."
        )
    if actor.ppo_mini_batch_size != config.data.train_batch_size:
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} must be data.train_batch_size="
            f"{config.data.train_batch_size} with trainer.v1.trainer_mode={SEPARATE}: verl syncs weights after every "
            "mini-batch that it counts."
        )


def _check_correction(opd: OPDConfig, config: DictConfig, mode: str) -> None:
    """Means over sampled tokens are means over an older policy's: their gradient needs the ratio of the two.

    A divergence over the vocabulary is computed, not sampled: what is older there is the states alone.
    """
    if opd.samples_tokens and opd.credit.rollout_cap is None and not opd.policy.replaces_divergence:
        raise ConfigError(
            f"opd.divergence.support=sampled with trainer.v1.trainer_mode={mode} learns from an older policy's tokens: "
            "weigh them by the ratio of both, opd.credit.rollout_cap=5."
        )
    correction = config.algorithm.rollout_correction
    if opd.policy.present and not (correction and (correction.rollout_is is not None or correction.bypass_mode)):
        raise ConfigError(
            f"opd.policy with trainer.v1.trainer_mode={mode} learns from an older policy's tokens: weigh them by the "
            "ratio of both, algorithm.rollout_correction.rollout_is=token, or anchor it at the older one, "
            "opd.policy.anchor=sampler."
        )
