# SPDX-License-Identifier: Apache-2.0
"""verl's own validation, with its failures told in our words."""

import importlib
import traceback

from omegaconf import DictConfig
from verl.plugin.platform.platform_manager import get_platform
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from opd_ext.errors import ConfigError

# Sections that the run will turn into verl's dataclasses; a key that a dataclass does not know fails here.
_DATACLASS_SECTIONS = (
    "actor_rollout_ref.actor",
    "actor_rollout_ref.ref.fsdp_config",
    "actor_rollout_ref.rollout",
    "actor_rollout_ref.rollout.checkpoint_engine",
    "algorithm",
)


def validate_verl(config: DictConfig) -> None:
    """Run verl's config checks and build its dataclasses from every section that the run uses.

    The model section is left out: building it loads a tokenizer, which a dry run may not have.

    Raises:
        ConfigError: with verl's reason, or a key that verl does not have.
    """
    from omegaconf import OmegaConf

    config = OmegaConf.create(OmegaConf.to_container(config))  # verl writes into what it validates
    try:
        validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
        for name in _DATACLASS_SECTIONS:
            omega_conf_to_dataclass(OmegaConf.select(config, name))
    except Exception as error:  # verl asserts, raises and lets Hydra raise: whatever it is, the run would not start
        cause = error.__cause__ or error
        raise ConfigError(f"verl refuses the configuration: {_in_words(cause)}") from error
    _check_names(config)


def _in_words(error: BaseException) -> str:
    """Its message on one line; of an assertion that has none, the line that asserts."""
    if words := " ".join(str(error).split()):
        return words
    frames = traceback.TracebackException.from_exception(error).stack
    return f"{type(error).__name__} at {frames[-1].line}" if frames else type(error).__name__


def _check_names(config: DictConfig) -> None:
    """Names that verl looks up when a step needs them, minutes after the start."""
    name = config.algorithm.adv_estimator
    try:
        get_adv_estimator_fn(name)
    except ValueError:
        raise ConfigError(f"algorithm.adv_estimator={name} does not exist in verl: set it to grpo.") from None
    optim = config.actor_rollout_ref.actor.optim
    try:
        getattr(importlib.import_module(optim.optimizer_impl), optim.optimizer)
    except (ImportError, AttributeError):
        raise ConfigError(
            f"actor_rollout_ref.actor.optim.optimizer={optim.optimizer} does not exist in optimizer_impl="
            f"{optim.optimizer_impl}: set AdamW and torch.optim, or install what has it."
        ) from None


def device_name() -> str:
    """The device that verl has settled on in this process: cpu or cuda."""
    return get_platform().device_name
