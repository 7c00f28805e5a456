# SPDX-License-Identifier: Apache-2.0
"""Keys below verl's groups that verl does not have: added with ``+`` or by a recipe, nothing would read them.

Hydra refuses a mistyped key only where nothing adds it. verl's own list is the configuration that it generates; what
its dataclasses and a few lookups know beyond that list is added here.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import yaml
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_ext.bridge import sources
from opd_ext.config.verl_values import VALUES
from opd_ext.errors import ConfigError, did_you_mean

# Read by verl, which lists them nowhere: key -> file and the words that read it.
UNLISTED: Mapping[str, tuple[str, str]] = {
    "actor_rollout_ref.model.lora.fully_sharded_loras": (
        "workers/rollout/vllm_rollout/vllm_async_server.py",
        'lora.get("fully_sharded_loras"',
    ),
    "data.cache_dir": ("utils/dataset/rl_dataset.py", 'config.get("cache_dir"'),
    "data.chat_template_func": ("utils/dataset/rl_dataset.py", 'config.get("chat_template_func"'),
    "data.filter_prompts": ("utils/dataset/rl_dataset.py", 'config.get("filter_prompts"'),
    "data.need_tools_kwargs": ("utils/dataset/rl_dataset.py", 'config.get("need_tools_kwargs"'),
    "reward.custom_reward_function.reward_kwargs": ("trainer/ppo/reward.py", 'reward_fn_config.get("reward_kwargs"'),
    "trainer.v1.sync.parameter_sync_step": ("trainer/ppo/v1/trainer_base.py", 'get("parameter_sync_step"'),
    "reward.max_rpm": ("experimental/reward_loop/reward_manager/limited.py", 'rm_cfg.get("max_rpm"'),
    "reward.max_tpm": ("experimental/reward_loop/reward_manager/limited.py", 'rm_cfg.get("max_tpm"'),
    "reward.estimated_tokens_per_request": (
        "experimental/reward_loop/reward_manager/limited.py",
        'rm_cfg.get("estimated_tokens_per_request"',
    ),
    "reward.reward_kwargs": ("experimental/reward_loop/reward_manager/dapo.py", 'config.reward.get("reward_kwargs"'),
    "reward.timeout": ("experimental/reward_loop/reward_manager/limited.py", 'config.reward.get("timeout"'),
}
# Handed on as a whole to somebody who knows more keys than verl lists: Ray, a queue, a profiler.
HANDED_ON = (
    "ray_kwargs.ray_init",
    "transfer_queue.backend",
    "global_profiler.global_tool_config",
    "distillation.teacher_models",
)
# Arguments of something else, by their names: a chat template, vLLM, an optimiser, a reward manager.
_OPEN = re.compile(r"kwargs$|kw_args$|^override_")
# Fields that are mappings for verl's dataclasses, and what verl's engine takes from them.
_UNLISTED_SECTIONS = {"mixed_precision": dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"))}
_NONE: frozenset[str] = frozenset()
# `model_engine` is the choice of a group, which Hydra leaves beside the groups; `opd` has a schema of its own.
OWN = ("opd", "model_engine")


def check_added_keys(config: DictConfig) -> None:
    """Refuse a key that is neither in verl's list nor a field of the dataclass that verl makes of its section.

    Raises:
        ConfigError: one sentence with the key and, where one is near, the key that was meant.
    """
    whole: Any = OmegaConf.to_container(config)
    for section, name, value, beside in _strangers(whole, listed(), ""):
        meant = did_you_mean(name, sorted(beside)).replace("mean ", f"mean {section}")
        shown = json.dumps(value, default=str, ensure_ascii=False)
        raise ConfigError(f"{section}{name}={shown} is no key of verl's, so nothing would read it: take it out.{meant}")


def check_types(config: DictConfig) -> None:
    """Refuse a switch or a number of verl's that is neither; :data:`VALUES` says more of some, and comes later.

    Raises:
        ConfigError: one sentence with the key and its value.
    """
    whole: Any = OmegaConf.to_container(config)
    for key, value, kind in _mistyped(whole, _resolved(), ""):
        if key in VALUES:
            continue
        shown = json.dumps(value, default=str, ensure_ascii=False)
        raise ConfigError(f"{key}={shown} must be {kind}, as verl's own value is.")


@cache
def _resolved() -> dict[str, Any]:
    """verl's own values, those that it takes from other keys included."""
    whole: Any = OmegaConf.create(listed())
    return _values(whole)


def _values(node: DictConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in node:
        try:
            value = node[name]
        except OmegaConfBaseException:  # what it refers to is composed in a run alone
            continue
        found[str(name)] = _values(value) if isinstance(value, DictConfig) else value
    return found


def _mistyped(node: Mapping[str, Any], known: Mapping[str, Any], section: str) -> Iterator[tuple[str, Any, str]]:
    """Every switch and number of verl's whose value here is none; null may mean that verl chooses."""
    for name, value in node.items():
        theirs, key = known.get(name), f"{section}{name}"
        if isinstance(theirs, Mapping) and isinstance(value, Mapping) and key not in (*OWN, *HANDED_ON):
            yield from _mistyped(value, theirs, f"{key}.")
        elif value is not None and isinstance(theirs, bool) and not isinstance(value, bool):
            yield key, value, "true or false"
        elif value is not None and type(theirs) in (int, float) and type(value) not in (int, float):
            yield key, value, "a number"


@cache
def listed() -> dict[str, Any]:
    """verl's whole configuration as its own generator writes it, nothing resolved."""
    text = (sources.folder() / "trainer" / "config" / "_generated_ppo_trainer.yaml").read_text()
    found: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found


def _strangers(
    node: Mapping[str, Any], known: Mapping[str, Any], section: str
) -> Iterator[tuple[str, str, Any, set[str]]]:
    """Every key that nobody knows: its section, its name, its value, and the names that there are beside it."""
    names = {*known, *_fields(node.get("_target_"))}
    names |= {key.removeprefix(section) for key in UNLISTED if key.rpartition(".")[0] == section.rstrip(".")}
    for name, value in node.items():
        key = f"{section}{name}"
        if key in OWN or key in HANDED_ON or _OPEN.search(name):
            continue
        if name not in names and name != "_target_":
            yield section, name, value, names
        elif isinstance(value, Mapping):
            inner = known.get(name, _UNLISTED_SECTIONS.get(name))
            if isinstance(inner, Mapping) or "_target_" in value:  # else a whole mapping in the place of a plain value
                yield from _strangers(value, inner if isinstance(inner, Mapping) else {}, f"{key}.")


@cache
def _fields(target: str | None) -> frozenset[str]:
    """Names that a dataclass of verl's takes."""
    if target and (read := sources.fields(target)) is not None:
        return read
    found = get_class(target) if target else None  # a class of the user's
    return (
        frozenset(entry.name for entry in dataclasses.fields(found)) if dataclasses.is_dataclass(found) else frozenset()
    )
