# SPDX-License-Identifier: Apache-2.0
"""The published settings, written down once and compared with what the presets and recipes compose.

Of verl's sections they are read from the dataclasses that verl builds from them and hands to its workers, so that a key
which nobody reads cannot pass for a setting.
"""

import dataclasses
import re
from functools import reduce
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.utils.config import omega_conf_to_dataclass

from opd_ext.config import checks
from opd_ext.config.compose import CONFIG_DIR, compose_config
from opd_ext.config.teachers import model_weights

ADAMW = {
    "optimizer": "AdamW",
    "lr_scheduler_type": "constant",
    "lr_warmup_steps": 0,
    "betas": [0.9, 0.999],
    "weight_decay": 0.01,
    "clip_grad": 1.0,
}


def optimiser(**settings) -> dict:
    """Settings of the update that every paper states; the defaults are the commonest values."""
    adamw = {f"actor_rollout_ref.actor.optim.{key}": value for key, value in (ADAMW | settings).items()}
    return adamw | {"actor_rollout_ref.actor.ppo_epochs": 1}


def batch(prompts: int, rollouts: int, mini: int | None = None) -> dict:
    """Prompts per step, rollouts per prompt, prompts per optimiser step."""
    return {
        "data.train_batch_size": prompts,
        "actor_rollout_ref.rollout.n": rollouts,
        "actor_rollout_ref.actor.ppo_mini_batch_size": mini or prompts,
    }


def sampling(phase: str, temperature: float, top_p: float, top_k: int, n: int | None = None) -> dict:
    """Sampling of `train` or `val`; ``n`` samples per problem in the latter."""
    place = "actor_rollout_ref.rollout" + (".val_kwargs" if phase == "val" else "")
    values = {"temperature": temperature, "top_p": top_p, "top_k": top_k} | ({"n": n, "do_sample": True} if n else {})
    return {f"{place}.{key}": value for key, value in values.items()}


def lengths(train: int, val: int, prompt: int | None = None) -> dict:
    """New tokens at most in training and in validation, and prompt tokens if they are published."""
    return {"opd.rollout.train_tokens": train, "opd.rollout.val_tokens": val} | (
        {"data.max_prompt_length": prompt} if prompt else {}
    )


THINKING = "data.apply_chat_template_kwargs.enable_thinking"
ACTOR = "actor_rollout_ref.actor"

# CRISP, arXiv 2603.05433: the table of hyper-parameters, which it states once for all models.
CRISP = {
    THINKING: True,
    "opd.teacher.weights": "periodic",
    "opd.teacher.interval": 50,
    "opd.context.kind": "instruction",
    "opd.context.text": "v2",
    "opd.divergence.kind": "reverse_kl",
    "opd.divergence.support": "full",
    "opd.divergence.temperature": 1.0,
    "opd.max_pair_length": 10_240,
    "opd.policy": None,
    **batch(32, 1),
    **lengths(train=8192, val=30_000, prompt=1024),
    **sampling("train", 1.0, 1.0, -1),
    **sampling("val", 0.6, 0.95, 20, n=8),
    **optimiser(lr=1e-6),
    "trainer.total_training_steps": 100,
    "trainer.test_freq": 20,
    "trainer.save_freq": 10,
}

# The GRPO run of TRACE (arXiv 2605.10194, table of hyper-parameters); advantages divided by the group's deviation.
GRPO = {
    THINKING: True,
    "opd.divergence": None,
    "opd.policy.loss": "vanilla",
    f"{ACTOR}.policy_loss.loss_mode": "vanilla",
    f"{ACTOR}.clip_ratio_low": 0.2,
    f"{ACTOR}.clip_ratio_high": 0.28,
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.entropy_coeff": 0,
    "algorithm.adv_estimator": "grpo",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.use_kl_in_reward": False,
    "algorithm.rollout_correction.rollout_is": "token",
    "algorithm.rollout_correction.rollout_is_threshold": 2.0,
    "actor_rollout_ref.rollout.calculate_log_probs": True,
    **batch(32, 8),
    **lengths(train=32_768, val=38_912, prompt=2048),
    "actor_rollout_ref.rollout.temperature": 0.6,
    **sampling("val", 0.6, 0.95, 20, n=8),
    **optimiser(lr=1e-5, lr_warmup_steps=10),
    "trainer.total_training_steps": 300,
}

# CISPO, arXiv 2506.13585, equations 4 and 5 and the section on training; cap 5 and DAPO's batch, which it leaves open.
CISPO = {
    "opd.divergence": None,
    "opd.policy.loss": "cispo",
    "opd.policy.prompt_mean": True,
    "opd.head.fp32": True,
    f"{ACTOR}.policy_loss.loss_mode": "cispo",
    f"{ACTOR}.clip_ratio_high": 4.0,
    f"{ACTOR}.clip_ratio_low": 10,
    f"{ACTOR}.loss_agg_mode": "token-sum",
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.entropy_coeff": 0,
    f"{ACTOR}.optim.override_optimizer_config": {"eps": 1e-15},
    "algorithm.adv_estimator": "grpo",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.use_kl_in_reward": False,
    **batch(512, 16, mini=32),
    **sampling("val", 1.0, 0.95, -1, n=32),
    **optimiser(lr=1e-6, betas=[0.9, 0.95]),
}

# The baseline of IW-OPD, arXiv 2606.22600: appendix and released script.
OPD = {
    THINKING: False,
    "opd.teacher.weights": "external",
    "opd.teacher.path": "Qwen/Qwen3-4B-Instruct-2507",
    "opd.context.kind": "same",
    "opd.divergence.kind": "reverse_kl",
    "opd.divergence.support": "sampled",
    "opd.divergence.ratio_clip": 0.2,
    "opd.divergence.dual_clip": 3.0,
    "opd.credit.kind": "uniform",
    "opd.credit.rollout_cap": 5.0,
    "opd.reduction": "seq-mean-token-mean",
    "opd.policy": None,
    "actor_rollout_ref.rollout.calculate_log_probs": True,
    **batch(1024, 1),
    **lengths(train=16_384, val=16_384, prompt=2048),
    **sampling("train", 1.0, 1.0, -1),
    **sampling("val", 1.0, 1.0, -1, n=32),
    **optimiser(lr=1e-5),
    "trainer.total_training_steps": 167,
    "trainer.test_freq": 10,
    "trainer.save_freq": 50,
}
IW_OPD = OPD | {"opd.credit.kind": "position", "opd.credit.gamma": 0.5}

# OPSD, arXiv 2601.18734: the release of March 2026. Its scripts set no scheduler and no maximum of steps, so the
# rate falls linearly over 30 epochs, some 27,600 steps, and is 4.98e-6 at step 100: constant.
OPSD = {
    THINKING: False,
    "opd.teacher.weights": "base",  # the adapter is off for the teacher
    "actor_rollout_ref.model.lora_rank": 64,
    "actor_rollout_ref.model.lora_alpha": 128,
    "actor_rollout_ref.model.target_modules": "all-linear",
    "actor_rollout_ref.model.lora.merge": True,
    "opd.context.kind": "solution",
    "opd.context.thinking": True,
    "opd.divergence.kind": "forward_kl",
    "opd.divergence.support": "full",
    "opd.divergence.clip": 0.05,
    "opd.divergence.clip_mode": "vocab_max",
    "opd.divergence.temperature": 1.1,
    "opd.max_pair_length": 20_000,
    "opd.reduction": "token-mean",
    "opd.policy": None,
    **batch(32, 1),
    **lengths(train=1024, val=38_912),
    **sampling("train", 1.1, 0.95, 20),
    **sampling("val", 1.0, 0.95, -1, n=12),
    **optimiser(lr=5e-6, weight_decay=0.0, clip_grad=0.1),
    "trainer.total_training_steps": 100,
    "trainer.save_freq": 25,
}

# SDPO, arXiv 2601.20802, the column without rich feedback of its table of hyper-parameters.
SDPO = {
    THINKING: False,
    "opd.teacher.weights": "ema",
    "opd.teacher.rate": 0.05,
    "opd.context.kind": "feedback",
    "opd.context.success_threshold": 0.5,
    "opd.context.exclude_own_success": True,
    "opd.context.remove_thinking": True,
    "opd.context.include_feedback": False,
    "opd.divergence.kind": "jsd",
    "opd.divergence.beta": 0.5,
    "opd.divergence.support": "topk",
    "opd.divergence.k": 100,
    "opd.divergence.topk_by": "student",
    "opd.divergence.tail": "bucket",
    "opd.divergence.temperature": 1.0,
    "opd.credit.importance_cap": 2.0,
    "opd.credit.rollout_cap": 2.0,
    "opd.reduction": "seq-mean-token-mean",
    "opd.denominator": "trained",
    "opd.max_pair_length": 512 + 2048 + 8192 + 8192,
    "opd.policy": None,
    "actor_rollout_ref.rollout.calculate_log_probs": True,
    **batch(32, 8),
    **lengths(train=8192, val=8192, prompt=2048),
    **sampling("train", 1.0, 1.0, -1),
    **sampling("val", 0.6, 0.95, -1, n=16),
    **optimiser(lr=1e-5, lr_warmup_steps=10),
    "trainer.test_freq": 5,
}

# TRACE, arXiv 2605.10194: GRPO as above, and the parameters of the distillation beside it.
TRACE = {
    **{key: value for key, value in GRPO.items() if key != "opd.divergence"},
    "opd.teacher.weights": "periodic",
    "opd.teacher.interval": 10,
    "opd.context.kind": "label",
    "opd.context.thinking": True,
    "opd.divergence.key.kind": "forward_kl",
    "opd.divergence.key.support": "topk",
    "opd.divergence.key.k": 100,
    "opd.divergence.key.clip": 0.05,
    "opd.divergence.key.clip_mode": "vocab_max",
    "opd.divergence.error": None,
    "opd.credit.kind": "spans",
    "opd.credit.weight": 0.5,
    "opd.credit.hold": 10,
    "opd.credit.decay": 30,
    "opd.credit.annotator.kind": "self",
    "opd.credit.annotator.coverage": 0.25,
    "opd.policy.gate": "complement",
    "opd.reduction": "seq-mean-token-mean",
    f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean",
    "algorithm.filter_groups.enable": False,
}

PUBLISHED = {
    "crisp": CRISP,
    "grpo": GRPO,
    "cispo": CISPO,
    "opd": OPD,
    "iw_opd": IW_OPD,
    "opsd": OPSD,
    "sdpo": SDPO,
    "trace": TRACE,
}
# What belongs to the model and the data: the GPU recipe of every method, its model, and settings of that run alone.
RUNS = {
    "crisp": ("qwen3_8b", "Qwen/Qwen3-8B", {}),
    "grpo": ("qwen3_8b", "Qwen/Qwen3-8B", {}),
    "cispo": ("qwen3_8b_base", "Qwen/Qwen3-8B-Base", {}),
    "opd": ("qwen3_0_6b", "Qwen/Qwen3-0.6B", {"opd.seed": 42}),
    "iw_opd": ("qwen3_0_6b", "Qwen/Qwen3-0.6B", {"opd.seed": 42}),
    "opsd": ("qwen3_1_7b", "Qwen/Qwen3-1.7B", {}),
    "sdpo": ("qwen3_8b", "Qwen/Qwen3-8B", {}),
    "trace": ("qwen3_8b", "Qwen/Qwen3-8B", {}),
}


def read(config: DictConfig, key: str) -> Any:
    """The setting as its reader gets it: from verl's dataclass of the section, where there is one."""
    section = next((name for name in DATACLASSES if key.startswith(f"{name}.")), None)
    if section is None:
        return OmegaConf.select(config, key, throw_on_missing=True)
    built = omega_conf_to_dataclass(OmegaConf.select(config, section))
    value = reduce(_part, key.removeprefix(f"{section}.").split("."), built)
    if key == f"{ACTOR}.optim.betas":  # a tuple or a list, by the version of OmegaConf
        value = list(value)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _part(built: Any, name: str) -> Any:
    part = getattr(built, name)
    # The one section that verl's YAML does not name a class for, and its trainers take as it is.
    return RolloutCorrectionConfig(**part) if name == "rollout_correction" else part


DATACLASSES = (ACTOR, "actor_rollout_ref.rollout", "algorithm")


@pytest.fixture
def compose(presets_composed_once):
    """``compose("method=crisp", ...)``, for a node."""
    return lambda *overrides: compose_config(list(overrides))


# ---------------------------------------------------------------------- the algorithm: method=


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_preset_is_the_published_algorithm(method, compose):
    config = compose(f"method={method}", "scale=node_8xh200")
    checks.check(config)
    assert {key: read(config, key) for key in PUBLISHED[method]} == PUBLISHED[method]
    assert config.opd.method == method


def test_sdpo_on_a_node_has_the_lengths_of_sdpo_whatever_other_methods_have(compose):
    config = compose("method=sdpo", "scale=node_8xh200")
    assert (config.data.max_prompt_length, config.data.max_response_length) == (2048, 8192)
    assert (config.opd.rollout.train_tokens, config.opd.rollout.val_tokens) == (8192, 8192)
    assert (config.opd.max_pair_length, config.actor_rollout_ref.rollout.max_model_len) == (18_944, 18_944)


@pytest.mark.parametrize("method", PUBLISHED)
def test_every_published_key_of_data_and_trainer_is_one_of_verls_own(method):
    """They have no dataclass: verl's YAML lists the keys that it reads."""
    import verl

    folder = str(Path(verl.__file__).parent / "trainer" / "config")
    with hydra.initialize_config_dir(folder, version_base=None):
        own = hydra.compose("ppo_trainer")
    keys = [key for key in PUBLISHED[method] if key.startswith(("data.", "trainer.")) and key != THINKING]
    assert keys
    for key in keys:
        assert OmegaConf.select(own, key, default="absent") != "absent", key


# ---------------------------------------------------------------------- a model and data: recipe=


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_recipe_keeps_what_is_published_and_adds_model_and_data(method, compose):
    name, model, run = RUNS[method]
    config = compose(f"recipe={method}/{name}")
    checks.check(config)
    published = PUBLISHED[method] | run
    assert {key: read(config, key) for key in published} == published
    assert config.actor_rollout_ref.model.path == model and config.opd.method == method
    grader = config.reward.custom_reward_function
    # CRISP's published rule reads all of a response; where the grade is trained on, that would pay for two guesses.
    trained_on = method in ("grpo", "cispo", "sdpo", "trace")
    assert grader.path == f"pkg://opd_ext.rewards.{'math_strict' if trained_on else 'math_dual'}"
    # None of the papers trains in less than fp32, and all of ours are for one node of eight.
    engine = read(config, f"{ACTOR}.fsdp_config")
    assert (engine.model_dtype, engine.mixed_precision["param_dtype"]) == ("fp32", "bf16")
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (1, 8)
    # Steps, not the size of the training set, end the run: 13,918 problems make so many steps an epoch.
    steps_per_epoch = 13_918 // config.data.train_batch_size
    assert config.trainer.total_training_steps <= config.trainer.total_epochs * steps_per_epoch


def test_opsd_at_8b_has_the_clip_of_that_size_and_all_else_of_opsd(compose):
    config = compose("recipe=opsd/qwen3_8b")
    published = OPSD | {"opd.divergence.clip": 0.06}
    assert {key: read(config, key) for key in published} == published


def test_opsd_of_all_weights_is_what_its_guide_says(compose):
    guide = (CONFIG_DIR.parents[1] / "recipes" / "opsd" / "README.md").read_text()
    (said,) = re.findall(r"recipes/opsd/qwen3_1_7b\.sh (opd\.teacher\.weights=frozen .*?) {2,}#", guide, re.DOTALL)
    config = compose("recipe=opsd/qwen3_1_7b", *said.replace("\\\n", " ").split())
    assert model_weights(checks.check(config), config)
    assert config.actor_rollout_ref.model.lora_rank == 0 and not config.actor_rollout_ref.model.lora.merge


def test_gspo_in_the_guide_of_grpo_has_the_papers_clip(compose):
    """arXiv 2507.18071: 3e-4 and 4e-4, four updates per batch."""
    guide = (CONFIG_DIR.parents[1] / "recipes" / "grpo" / "README.md").read_text()
    (said,) = re.findall(r"recipes/grpo/qwen3_8b\.sh (opd\.policy\.loss=gspo .*?) {2,}#", guide, re.DOTALL)
    config = compose("recipe=grpo/qwen3_8b", *said.replace("\\\n", " ").split())
    checks.check(config)
    actor = read(config, f"{ACTOR}.policy_loss"), read(config, f"{ACTOR}.clip_ratio_low")
    assert (actor[0].loss_mode, actor[1], read(config, f"{ACTOR}.clip_ratio_high")) == ("gspo", 3e-4, 4e-4)
    assert config.data.train_batch_size // config.actor_rollout_ref.actor.ppo_mini_batch_size == 4


def test_the_dataclasses_that_are_read_are_those_that_verl_hands_to_its_workers(compose):
    config = compose("method=cispo", "scale=node_8xh200")
    built = [omega_conf_to_dataclass(OmegaConf.select(config, name)) for name in DATACLASSES]
    assert all(dataclasses.is_dataclass(section) for section in built)
    assert type(built[0].optim).__name__ == "FSDPOptimizerConfig"
    assert type(built[1].val_kwargs).__name__ == "SamplingConfig"
