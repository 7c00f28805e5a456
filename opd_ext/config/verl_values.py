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

    def takes(self, value: Any) -> bool:
        if value is None:
            return self.null
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        if self.whole and value != int(value):
            return False
        if self.off is not None and value == self.off:
            return True
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        words = ["a whole number" if self.whole else "a number"]
        if self.low > -math.inf:
            words.append(f"above {self.low}" if self.above else f"of at least {self.low}")
        if self.high < math.inf:
            words.append(f"and at most {self.high}")
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


COUNT = Number(1, whole=True)
EVERY = Number(1, whole=True, off=-1)
SHARE = Number(0, 1, above=True)
SWITCH = Choice((True, False))
_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"

VALUES: Mapping[str, Number | Choice] = {
    "opd.seed": Number(0, 2**32 - 1, whole=True),
    "trainer.v1.trainer_mode": Choice(("opd",)),
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
    f"{_ACTOR}.optim.lr": Number(0),
    f"{_ACTOR}.optim.weight_decay": Number(0),
    f"{_ACTOR}.optim.clip_grad": Number(0, above=True, null=True),
    f"{_ACTOR}.optim.lr_warmup_steps": Number(0, whole=True, off=-1),
    f"{_ACTOR}.optim.lr_warmup_steps_ratio": Number(0, 1),
    f"{_ACTOR}.ppo_mini_batch_size": COUNT,
    f"{_ACTOR}.ppo_max_token_len_per_gpu": COUNT,
    f"{_ACTOR}.ppo_epochs": COUNT,
    f"{_ACTOR}.clip_ratio": Number(0),
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": COUNT,
    "actor_rollout_ref.model.lora_rank": Number(0, whole=True),
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
