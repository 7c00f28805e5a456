# SPDX-License-Identifier: Apache-2.0
"""What a run needs that samples while it trains, and what it cannot do yet; each refusal is one sentence."""

import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd_ext.config.schema import OPDConfig
from opd_ext.errors import ConfigError

MODE = "opd_one_step_off"
"""Its name in ``trainer.v1.trainer_mode``."""

_NEEDS: dict[str, tuple[Any, str]] = {
    "trainer.v1.colocate_async.num_warmup_batches": (1, "it is one batch ahead, never more"),
    "trainer.v1.sampler.max_off_policy_threshold": (1, "a batch waits for its own rollouts"),
    "trainer.v1.sampler.max_off_policy_strategy": ("wait", "no rollout is dropped"),
    "trainer.v1.sampler.custom_sampler.path": (None, "a sampler decides which version a batch is of"),
    "actor_rollout_ref.rollout.free_cache_engine": (False, "vLLM samples while the student trains"),
    "algorithm.filter_groups.enable": (False, "groups that are dropped would be sampled anew by another version"),
    "skip.rollout_tq.enable": (False, "what is submitted in one step is trained in the next"),
    "data.gen_batch_size": (None, "prompts are fetched batch by batch"),
}
"""Key: the value that it must have, and why."""


def is_one_step_off(config: DictConfig) -> bool:
    """Whether a run samples its next batch while it trains."""
    return bool(config.trainer.v1.trainer_mode == MODE)


def check(opd: OPDConfig, config: DictConfig) -> None:
    """Refuse what does not go with a policy that is one version older than the one that is trained.

    Raises:
        ConfigError: one sentence.
    """
    if not is_one_step_off(config):
        return
    for key, (needed, why) in _NEEDS.items():
        if (value := OmegaConf.select(config, key)) != needed:
            is_now, is_to_be = (json.dumps(each, default=str).strip('"') for each in (value, needed))  # as YAML has it
            raise ConfigError(
                f"{key}={is_now} does not go with trainer.v1.trainer_mode={MODE}, where {why}: set it to {is_to_be}, "
                "as asynchronous=one_step_off does."
            )
    if config.reward.reward_model.enable and not config.reward.reward_model.enable_resource_pool:
        raise ConfigError(
            f"reward.reward_model.enable=true on the trainer's devices needs a vLLM that sleeps, and with "
            f"trainer.v1.trainer_mode={MODE} it never does: set enable_resource_pool=true."
        )
    if opd.credit.annotates:
        raise ConfigError(
            f"opd.credit.annotator does not go with trainer.v1.trainer_mode={MODE} yet: train synchronously "
            "(asynchronous=null)."
        )
    if "server" in opd.backends:
        raise ConfigError(
            f"opd.teacher.backend=server does not go with trainer.v1.trainer_mode={MODE} yet: set backend=engine, or "
            "asynchronous=null."
        )
    _check_correction(opd, config)


def _check_correction(opd: OPDConfig, config: DictConfig) -> None:
    """Means over sampled tokens are means over an older policy's: their gradient needs the ratio of the two.

    A divergence over the vocabulary is computed, not sampled: what is older there is the states alone.
    """
    if opd.samples_tokens and opd.credit.rollout_cap is None and not opd.policy.replaces_divergence:
        raise ConfigError(
            f"opd.divergence.support=sampled with trainer.v1.trainer_mode={MODE} learns from an older policy's tokens: "
            "weigh them by the ratio of both, opd.credit.rollout_cap=5."
        )
    correction = config.algorithm.rollout_correction
    if opd.policy.present and not (correction and (correction.rollout_is is not None or correction.bypass_mode)):
        raise ConfigError(
            f"opd.policy with trainer.v1.trainer_mode={MODE} learns from an older policy's tokens: weigh them by the "
            "ratio of both, algorithm.rollout_correction.rollout_is=token, or anchor it at the older one, "
            "opd.policy.anchor=sampler."
        )
