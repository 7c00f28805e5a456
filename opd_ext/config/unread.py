# SPDX-License-Identifier: Apache-2.0
"""Keys that verl's configuration has and that nothing reads: set by a user, they would change nothing without a word.

verl keeps keys of earlier versions and of its other trainers. Which of them a run reads was traced, not guessed:
``tests/stack/test_reads.py`` says how, ``tests/unit/read_keys.txt`` holds the result.
"""

import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd_ext.config.schema import OPDConfig
from opd_ext.errors import ConfigError

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_DISTILLATION = "distillation.distillation_loss"
_OURS = "of verl's servers only the log-probs are taken, and the loss is opd.divergence"
_ROWS = "generations/ of the run folder has every rollout and validation"
_NO_CRITIC = "this trainer has no critic"
_LEGACY = "set reward.{}, verl's place for it"

# Key: its value where nobody sets it (a section: all null), and what to do instead.
Table = dict[str, tuple[Any, str]]
NEVER: Table = {
    f"{_ACTOR}.grad_clip": (None, f"set {_ACTOR}.optim.clip_grad"),
    f"{_ACTOR}.use_torch_compile": (True, f"set {_ACTOR}.fsdp_config.use_torch_compile"),
    f"{_ACTOR}.fsdp_config.dtype": ("bfloat16", f"set {_ACTOR}.fsdp_config.mixed_precision.param_dtype"),
    f"{_ACTOR}.checkpoint.async_save": (False, "verl saves in the background for Megatron alone"),
    f"{_ACTOR}.freeze_vision_tower": (False, "this trainer is for language models"),
    "actor_rollout_ref.model.tiled_mlp.enabled": (False, "verl's FSDP engine has no tiled MLP"),
    "actor_rollout_ref.nccl_timeout": (600, "the worker takes PyTorch's own"),
    "actor_rollout_ref.ref.use_torch_compile": (True, "set actor_rollout_ref.ref.fsdp_config.use_torch_compile"),
    f"{_ACTOR}.use_prefix_grouper": (False, "sequences are packed as they are"),
    f"{_ROLLOUT}.do_sample": (True, f"set {_ROLLOUT}.temperature"),
    f"{_ROLLOUT}.val_kwargs.do_sample": (True, f"for greedy decoding set {_ROLLOUT}.val_kwargs.temperature=0"),
    f"{_ROLLOUT}.multi_stage_wake_up": (False, "it is for SGLang"),
    "algorithm.use_pf_ppo": (False, "opd.policy.loss names the losses that there are"),
    "critic.grad_clip": (None, _NO_CRITIC),
    "trainer.critic_warmup": (0, _NO_CRITIC),
    "trainer.max_critic_ckpt_to_keep": (None, _NO_CRITIC),
    "trainer.balance_batch": (True, "batches are always balanced"),
    "trainer.default_hdfs_dir": (None, "checkpoints stay in trainer.default_local_dir"),
    "trainer.esi_redundant_time": (0, "set trainer.save_freq"),
    "trainer.log_val_generations": (0, _ROWS),
    "trainer.ray_wait_register_center_timeout": (300, "nobody waits for it"),
    "trainer.use_v1": (True, "this trainer is one of verl's v1"),
    "trainer.validation_data_dir": (None, _ROWS),
    "data.tokenizer": (None, "set actor_rollout_ref.model.tokenizer_path"),
    "data.trust_remote_code": (False, "set actor_rollout_ref.model.trust_remote_code"),
    "data.reward_fn_key": ("data_source", "the column is data_source"),
    "data.return_raw_input_ids": (False, "prompts are always kept"),
    "custom_reward_function": (None, _LEGACY.format("custom_reward_function")),
    "reward_model": (None, _LEGACY.format("num_workers, .reward_manager or .reward_model")),
    "sandbox_fusion": (None, _LEGACY.format("sandbox_fusion")),
    f"{_DISTILLATION}.use_task_rewards": (True, "set opd.policy for an RL term"),
    f"{_DISTILLATION}.distillation_loss_coef": (1.0, _OURS),
    f"{_DISTILLATION}.loss_max_clamp": (None, "set opd.divergence.clip"),
    f"{_DISTILLATION}.log_prob_min_clamp": (None, _OURS),
    f"{_DISTILLATION}.use_policy_gradient": (False, _OURS),
    f"{_DISTILLATION}.policy_loss_mode": ("vanilla", "set opd.policy.loss"),
    f"{_DISTILLATION}.clip_ratio": (0.2, "set opd.divergence.ratio_clip"),
    f"{_DISTILLATION}.clip_ratio_low": (0.2, "set opd.divergence.ratio_clip"),
    f"{_DISTILLATION}.clip_ratio_high": (0.2, "set opd.divergence.ratio_clip"),
    "skip.rollout.enable": (False, "every step samples"),
    "skip.async_rollout.enable": (False, "every step samples"),
}
_RL = "only the RL term reads it, and opd.policy is null"
WITHOUT_POLICY: Table = {
    f"{_ACTOR}.use_kl_loss": (False, _RL),
    "algorithm.use_kl_in_reward": (False, _RL),
    "algorithm.rollout_correction.rollout_is": (None, f"{_RL}; the divergence's is opd.credit.rollout_cap"),
    "algorithm.norm_adv_by_std_in_grpo": (True, _RL),
    f"{_ACTOR}.entropy_coeff": (0, _RL),
    f"{_ACTOR}.clip_ratio": (0.2, f"{_RL}; that of support=sampled is opd.divergence.ratio_clip"),
    f"{_ACTOR}.clip_ratio_low": (0.2, f"{_RL}; that of support=sampled is opd.divergence.ratio_clip"),
    f"{_ACTOR}.clip_ratio_high": (0.2, f"{_RL}; that of support=sampled is opd.divergence.ratio_clip"),
    f"{_ACTOR}.clip_ratio_c": (3.0, f"{_RL}; that of support=sampled is opd.divergence.dual_clip"),
    f"{_ACTOR}.loss_agg_mode": ("token-mean", f"{_RL}; the divergence's is opd.reduction"),
}
WITH_TEACHER: Table = {f"{_ACTOR}.shuffle": (False, "a batch with a teacher keeps its order")}


def check_unread(opd: OPDConfig, config: DictConfig) -> None:
    """Refuse what would change nothing.

    Raises:
        ConfigError: one sentence with the keys, what reads them or does their work, and their value when left alone.
    """
    table = NEVER | ({} if opd.policy.present else WITHOUT_POLICY) | (WITH_TEACHER if opd.distils else {})
    found = [set_one for key, (left, _) in table.items() for set_one in _set(config, key, left)]
    if not found:
        return
    key, value = found[0]
    left, instead = next(entry for name, entry in table.items() if key == name or key.startswith(f"{name}."))
    also = f" (likewise {', '.join(name for name, _ in found[1:])})" if found[1:] else ""
    default = json.dumps(left)  # as YAML has it
    raise ConfigError(f"{key}={value} changes nothing in such a run{also}: {instead}; leave it at {default}.")


def _set(config: DictConfig, key: str, left: Any) -> list[tuple[str, Any]]:
    """What is not as ``left`` below ``key``, with its value."""
    value = OmegaConf.select(config, key)
    if isinstance(value, DictConfig):
        return [found for name in map(str, value) for found in _set(config, f"{key}.{name}", left)]
    return [(key, value)] if value != left else []
