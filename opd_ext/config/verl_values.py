# SPDX-License-Identifier: Apache-2.0
"""Types and ranges of the keys of verl that people set: verl itself finds out in a worker, or never."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from opd_ext.errors import ConfigError


@dataclass(frozen=True)
class Number:
    """A number within bounds, both included unless ``above`` is set."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    above: bool = False  # `low` itself is refused
    null: bool = False
    off: int | None = None  # a value below `low` that switches the thing off
    below: float = math.inf  # this itself is refused

    def takes(self, value: Any) -> bool:
        if value is None:
            return self.null
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        if self.whole and not isinstance(value, int):
            return False
        if self.off is not None and value == self.off:
            return True
        enough = value > self.low if self.above else value >= self.low
        return enough and value <= self.high and value < self.below

    def __str__(self) -> str:
        words = ["a whole number" if self.whole else "a number"]
        if self.low > -math.inf:
            words.append(f"above {self.low}" if self.above else f"of at least {self.low}")
        if self.high < math.inf:
            words.append(f"and at most {self.high}")
        if self.below < math.inf:
            words.append(f"and below {self.below}")
        words += [f"or {self.off} for off"] if self.off is not None else []
        return " ".join([*words, *(["or null"] if self.null else [])])


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Any, ...]

    def takes(self, value: Any) -> bool:
        return any(value is known or (value == known and type(value) is type(known)) for known in self.values)

    def __str__(self) -> str:
        return " or ".join({True: "true", False: "false", None: "null"}.get(value, str(value)) for value in self.values)


@dataclass(frozen=True)
class Pair:
    """Two numbers, each as ``each`` says."""

    each: Number

    def takes(self, value: Any) -> bool:
        return isinstance(value, (list, tuple, ListConfig)) and len(value) == 2 and all(map(self.each.takes, value))

    def __str__(self) -> str:
        return f"two numbers, each {self.each}"


class Section:
    """Keys with values, or null."""

    def takes(self, value: Any) -> bool:
        return value is None or isinstance(value, DictConfig)

    def __str__(self) -> str:
        return "a section, such as {enable_thinking: false}"


class Text:
    """A text of one character or more."""

    def takes(self, value: Any) -> bool:
        return isinstance(value, str) and bool(value.strip())

    def __str__(self) -> str:
        return "a text"


COUNT = Number(1, whole=True)
EVERY = Number(1, whole=True, off=-1)
SHARE = Number(0, 1, above=True)
SWITCH = Choice((True, False))
_STORED = Choice(("fp32", "float32", "bf16", "bfloat16", "fp16", "float16"))
_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"

VALUES: Mapping[str, Number | Choice | Pair | Section | Text] = {
    "actor_rollout_ref.model.path": Text(),
    "opd.seed": Number(0, 2**32 - 1, whole=True),
    "trainer.v1.trainer_mode": Choice(("opd", "opd_one_step_off", "opd_separate")),
    "trainer.nnodes": COUNT,
    "trainer.n_gpus_per_node": COUNT,
    "trainer.total_training_steps": Number(1, whole=True, null=True),
    "trainer.total_epochs": COUNT,
    "trainer.test_freq": EVERY,
    "trainer.save_freq": EVERY,
    "trainer.max_actor_ckpt_to_keep": Number(1, whole=True, null=True),
    "trainer.val_before_train": SWITCH,
    "trainer.val_only": SWITCH,
    "trainer.resume_mode": Choice(("auto", "disable", "resume_path")),
    "data.train_batch_size": COUNT,
    "data.gen_batch_size": Number(1, whole=True, null=True),
    "data.val_batch_size": Number(1, whole=True, null=True),
    "data.train_max_samples": EVERY,
    "data.val_max_samples": EVERY,
    "data.max_prompt_length": COUNT,
    "data.max_response_length": COUNT,
    "data.dataloader_num_workers": Number(0, whole=True),
    "data.seed": Number(0, 2**32 - 1, whole=True),
    "data.shuffle": SWITCH,
    "data.filter_overlong_prompts_workers": Number(1, whole=True, null=True),
    "data.apply_chat_template_kwargs": Section(),
    f"{_ACTOR}.optim.lr": Number(0),
    f"{_ACTOR}.optim.weight_decay": Number(0),
    f"{_ACTOR}.optim.clip_grad": Number(0, above=True, null=True),
    f"{_ACTOR}.optim.lr_warmup_steps": Number(0, whole=True, off=-1),
    f"{_ACTOR}.optim.lr_warmup_steps_ratio": Number(0, 1),
    f"{_ACTOR}.optim.lr_scheduler_type": Choice(("constant", "cosine")),
    f"{_ACTOR}.optim.min_lr_ratio": Number(0, 1, null=True),
    f"{_ACTOR}.optim.betas": Pair(Number(0, below=1)),
    f"{_ACTOR}.ppo_mini_batch_size": COUNT,
    f"{_ACTOR}.ppo_max_token_len_per_gpu": COUNT,
    f"{_ACTOR}.ppo_epochs": COUNT,
    f"{_ACTOR}.clip_ratio": Number(0),
    f"{_ACTOR}.clip_ratio_low": Number(0, null=True),
    f"{_ACTOR}.clip_ratio_high": Number(0, null=True),
    f"{_ACTOR}.clip_ratio_c": Number(1, above=True),
    f"{_ACTOR}.fsdp_config.model_dtype": _STORED,
    "actor_rollout_ref.ref.fsdp_config.model_dtype": _STORED,
    "algorithm.rollout_correction.rollout_is": Choice((None, "token", "sequence")),
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": COUNT,
    "actor_rollout_ref.model.lora_rank": Number(0, whole=True),
    "actor_rollout_ref.model.lora_alpha": Number(0, above=True),
    f"{_ROLLOUT}.dtype": Choice(("auto", "bfloat16", "float16", "float32", "half", "float")),
    f"{_ROLLOUT}.mode": Choice(("async",)),
    f"{_ROLLOUT}.load_format": Choice(("auto", "dummy", "hf", "safetensors", "pt", "fastsafetensors", "sharded_state")),
    "data.truncation": Choice(("error", "left", "right", "middle")),
    "global_profiler.tool": Choice((None, "nsys", "npu", "torch", "torch_memory", "precision_debugger")),
    f"{_ROLLOUT}.n": COUNT,
    f"{_ROLLOUT}.temperature": Number(0, above=True),
    f"{_ROLLOUT}.top_p": SHARE,
    f"{_ROLLOUT}.top_k": Number(1, whole=True, off=-1),
    f"{_ROLLOUT}.max_model_len": Number(1, whole=True, null=True),
    f"{_ROLLOUT}.max_num_seqs": COUNT,
    f"{_ROLLOUT}.max_num_batched_tokens": COUNT,
    f"{_ROLLOUT}.tensor_model_parallel_size": COUNT,
    f"{_ROLLOUT}.gpu_memory_utilization": SHARE,
    f"{_ROLLOUT}.agent.num_workers": COUNT,
    f"{_ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes": COUNT,
    f"{_ROLLOUT}.val_kwargs.n": COUNT,
    f"{_ROLLOUT}.val_kwargs.temperature": Number(0),
    f"{_ROLLOUT}.val_kwargs.top_p": SHARE,
    f"{_ROLLOUT}.val_kwargs.top_k": Number(1, whole=True, off=-1),
    "reward.num_workers": COUNT,
}
"""Key -> what it may be; ``train_batch_size=0`` and the like are refused before anybody divides by them."""

_WHY = {
    "trainer.v1.trainer_mode": "verl's other trainers know nothing of a teacher",
    "trainer.total_epochs": "epochs end a run whose trainer.total_training_steps is null",
}


def check_values(config: DictConfig) -> None:
    """Refuse a value of the wrong type, or out of range.

    Raises:
        ConfigError: naming the key, its value and what it may be.
    """
    for key, kind in VALUES.items():
        value = OmegaConf.select(config, key, default=...)
        if value is ... or kind.takes(value):
            continue
        shown = "null" if value is None else str(list(value) if isinstance(value, ListConfig) else value)
        why = f": {_WHY[key]}" if key in _WHY else ""
        raise ConfigError(f"{key}={shown} must be {kind}{why}.")
