# SPDX-License-Identifier: Apache-2.0
"""verl's own validation, with its failures told in our words."""

from omegaconf import DictConfig
from verl.plugin.platform.platform_manager import get_platform
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from opd_ext.bridge.known_keys import check_added_keys
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

    check_added_keys(config)
    config = OmegaConf.create(OmegaConf.to_container(config))  # verl writes into what it validates
    try:
        validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
        for name in _DATACLASS_SECTIONS:
            omega_conf_to_dataclass(OmegaConf.select(config, name))
    except Exception as error:  # verl asserts, raises and lets Hydra raise: whatever it is, the run would not start
        cause = error.__cause__ or error
        raise ConfigError(f"verl refuses the configuration: {' '.join(str(cause).split())}") from error


def device_name() -> str:
    """The device that verl has settled on in this process: cpu or cuda."""
    return get_platform().device_name
