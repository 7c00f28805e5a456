# SPDX-License-Identifier: Apache-2.0
"""The `opd` section of the configuration: its types, its defaults and the combinations that are refused.

Everything here runs before Ray starts. A wrong key, value or combination becomes one sentence (:class:`ConfigError`).
"""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_ext.objective.divergence import divergence_names
from opd_ext.objective.objective import REDUCTIONS
from opd_ext.teacher.context import build_context, context_names

TEACHER_WEIGHTS = ("live", "frozen", "periodic", "ema")
SUPPORTS = ("full",)
CREDITS = ("uniform",)
DEVICES = ("cpu", "cuda")
CONSOLES = ("table", "full")


class ConfigError(ValueError):
    """One sentence: which key is wrong and what it may be."""


@dataclass
class TeacherConfig:
    """Whose weights the teacher has, and when they are refreshed."""

    weights: str = "periodic"
    interval: int = 50  # optimiser steps between refreshes of `periodic`; 0: never
    rate: float = 0.05  # share of the student that `ema` mixes in after every step (1 - decay)


@dataclass
class ContextConfig:
    """What the teacher sees that the student does not."""

    kind: str = "instruction"
    text: str = "v2"  # id of an instruction (v1 ... v5, pct-20, words-100, ...)
    strip_suffix: bool = True  # False doubles the closing reminder, as the published preparation script does


@dataclass
class DivergenceConfig:
    """What is compared, and on which part of the vocabulary."""

    kind: str = "reverse_kl"
    support: str = "full"
    beta: float | None = None  # jsd only, in (0, 1)
    clip: float | None = None  # forward_kl only: cap of each vocabulary entry before the sum over the vocabulary
    temperature: float = 1.0  # divides both logits in the loss, whatever the rollout temperature was


@dataclass
class CreditConfig:
    """Which tokens count, and how much."""

    kind: str = "uniform"


@dataclass
class HeadConfig:
    """The chunked LM head (memory and precision, never the result)."""

    chunk_size: int = 1024
    fp32: bool = False


@dataclass
class RolloutConfig:
    """Limits of generation per phase (tokens) and the polling of finished rollouts (seconds)."""

    train_tokens: int = 8192
    val_tokens: int = 8192
    poll_interval: float = 0.05


@dataclass
class OPDConfig:
    """Everything under `opd`: the five places of a method and the settings of a run."""

    run_dir: str = "runs/opd"
    method: str = "crisp"
    scale: str = "cpu_tiny"
    device: str = "cuda"
    world: str | None = None  # folder of the miniature world, where a scale uses it
    seed: int = 1
    external_lib: Any = None
    console: str = "table"
    reduction: str = "token-mean"
    max_pair_length: int | None = None
    max_teacher_entropy: float | None = 0.95
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    policy: Any = None
    head: HeadConfig = field(default_factory=HeadConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    @property
    def external_libs(self) -> list[str]:
        """Module names of `external_lib` as a list."""
        if self.external_lib is None:
            return []
        return [self.external_lib] if isinstance(self.external_lib, str) else list(self.external_lib)

    def import_external_libs(self) -> None:
        """Import the user's modules in this process, so that their registered classes exist.

        Raises:
            ConfigError: naming the module that cannot be imported.
        """
        for library in self.external_libs:
            try:
                importlib.import_module(library)
            except ImportError as error:
                raise ConfigError(f"opd.external_lib: {library} cannot be imported ({error}).") from None

    @property
    def needs_teacher_engine(self) -> bool:
        """A live teacher is the student itself; every other one has weights of its own."""
        return self.teacher.weights != "live"


def load(section: DictConfig) -> OPDConfig:
    """Typed view of the `opd` section.

    Raises:
        ConfigError: for a key that does not exist or a value of the wrong type.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OPDConfig), section))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"opd.{error.full_key}: {reason}; see `opd train --cfg` for the keys that exist.") from None


def _one_of(key: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value} does not exist; choose one of: {', '.join(sorted(allowed))}.")


def _positive(key: str, value: float, zero: bool = False) -> None:
    if value < 0 or (value == 0 and not zero):
        raise ConfigError(f"{key}={value} must be {'zero or ' if zero else ''}positive.")


def check(config: DictConfig) -> OPDConfig:
    """Refuse what cannot work, before any process is started, and return the typed `opd` section.

    Args:
        config: the whole composed configuration.

    Raises:
        ConfigError: one sentence that names the key and the allowed values.
    """
    opd = load(config.opd)
    opd.import_external_libs()  # they may register what the next check looks up
    _check_choices(opd)
    _check_lengths(opd, config)
    _check_engine(opd, config)
    return opd


def _check_choices(opd: OPDConfig) -> None:
    _one_of("opd.device", opd.device, DEVICES)
    _one_of("opd.console", opd.console, CONSOLES)
    _one_of("opd.reduction", opd.reduction, REDUCTIONS)
    _one_of("opd.teacher.weights", opd.teacher.weights, TEACHER_WEIGHTS)
    _one_of("opd.context.kind", opd.context.kind, context_names())
    try:
        build_context(opd.context)
    except ValueError as error:
        raise ConfigError(f"opd.context: {error}") from None
    full = [name for name in divergence_names() if not name.startswith("topk_")]
    _one_of("opd.divergence.kind", opd.divergence.kind, full)
    _one_of("opd.divergence.support", opd.divergence.support, SUPPORTS)
    _one_of("opd.credit.kind", opd.credit.kind, CREDITS)
    _positive("opd.teacher.interval", opd.teacher.interval, zero=True)
    _positive("opd.divergence.temperature", opd.divergence.temperature)
    _positive("opd.head.chunk_size", opd.head.chunk_size)
    if opd.teacher.weights == "ema" and not 0 < opd.teacher.rate <= 1:
        raise ConfigError(f"opd.teacher.rate={opd.teacher.rate} must be in (0, 1]: the share of the student mixed in.")
    if (opd.divergence.kind == "jsd") != (opd.divergence.beta is not None):
        raise ConfigError("opd.divergence.beta belongs to kind=jsd and to no other: set both or neither.")
    if opd.divergence.beta is not None and not 0 < opd.divergence.beta < 1:
        raise ConfigError(
            f"opd.divergence.beta={opd.divergence.beta} must lie strictly between 0 and 1; for an end choose "
            "kind=forward_kl or kind=reverse_kl."
        )
    if opd.divergence.clip is not None and opd.divergence.kind != "forward_kl":
        raise ConfigError(f"opd.divergence.clip is defined for kind=forward_kl, not for {opd.divergence.kind}.")
    if opd.policy is not None:
        raise ConfigError("opd.policy must be null: policy-gradient terms are not part of this version.")
    if opd.context.kind == "same" and opd.teacher.weights == "live":
        raise ConfigError(
            "opd.context.kind=same with opd.teacher.weights=live compares the student with itself (loss 0); choose "
            "another context or other teacher weights."
        )


def _check_lengths(opd: OPDConfig, config: DictConfig) -> None:
    data, rollout = config.data, config.actor_rollout_ref.rollout
    for key in ("train_tokens", "val_tokens"):
        tokens = getattr(opd.rollout, key)
        _positive(f"opd.rollout.{key}", tokens)
        if tokens > data.max_response_length:
            raise ConfigError(
                f"opd.rollout.{key}={tokens} exceeds data.max_response_length={data.max_response_length}; raise the "
                "latter, it bounds both phases."
            )
    longest = data.max_prompt_length + data.max_response_length
    if rollout.max_model_len is None or rollout.max_model_len < longest:
        raise ConfigError(
            f"actor_rollout_ref.rollout.max_model_len={rollout.max_model_len} is shorter than prompt + response "
            f"({data.max_prompt_length} + {data.max_response_length}); set it to at least {longest}."
        )
    shortest = data.max_prompt_length + opd.rollout.train_tokens
    if opd.max_pair_length is None or opd.max_pair_length < shortest:
        raise ConfigError(
            f"opd.max_pair_length={opd.max_pair_length} would drop full-length training rollouts; set it to at least "
            f"{shortest} (data.max_prompt_length + opd.rollout.train_tokens), better with room for the teacher's."
        )
    for part, key in (("actor", "ppo_max_token_len_per_gpu"), ("ref", "log_prob_max_token_len_per_gpu")):
        section = config.actor_rollout_ref[part]
        if section[key] < opd.max_pair_length:
            raise ConfigError(
                f"actor_rollout_ref.{part}.{key}={section[key]} cannot hold one sequence of opd.max_pair_length="
                f"{opd.max_pair_length} tokens; raise the former or lower the latter."
            )


def _check_engine(opd: OPDConfig, config: DictConfig) -> None:
    actor, ref, rollout = (config.actor_rollout_ref[part] for part in ("actor", "ref", "rollout"))
    if actor.strategy != "fsdp2" or ref.strategy != "fsdp2":
        raise ConfigError("actor_rollout_ref.actor.strategy and .ref.strategy must both be fsdp2.")
    for part, section in (("actor", actor), ("ref", ref)):
        size = max(section.ulysses_sequence_parallel_size, section.fsdp_config.ulysses_sequence_parallel_size)
        if size > 1:
            raise ConfigError(
                f"actor_rollout_ref.{part}.ulysses_sequence_parallel_size={size} is not supported: teacher and student "
                "prompts differ in length, so their slices of a packed sequence do not align; set it to 1."
            )
    model = config.actor_rollout_ref.model
    if not model.use_remove_padding:
        raise ConfigError("actor_rollout_ref.model.use_remove_padding must be true: there is one packed path only.")
    if model.use_fused_kernels:
        raise ConfigError("actor_rollout_ref.model.use_fused_kernels must be false: the chunked head replaces them.")
    if model.lora_rank > 0 or model.lora.rank > 0 or model.lora_adapter_path is not None:
        raise ConfigError("LoRA is not supported by this version: set actor_rollout_ref.model.lora_rank=0.")
    if ref.fsdp_config.model_dtype != actor.fsdp_config.model_dtype and opd.teacher.weights == "ema":
        raise ConfigError(
            "opd.teacher.weights=ema accumulates small changes: set actor_rollout_ref.ref.fsdp_config.model_dtype to "
            f"{actor.fsdp_config.model_dtype}, the student's."
        )
    if actor.ppo_epochs != 1:
        raise ConfigError(f"actor_rollout_ref.actor.ppo_epochs={actor.ppo_epochs} must be 1: rollouts train once.")
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if actor.ppo_mini_batch_size * rollout.n % ranks:
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size x rollout.n = {actor.ppo_mini_batch_size * rollout.n} must "
            f"be divisible by the {ranks} trainer ranks."
        )
    if data_too_small := config.data.train_batch_size % actor.ppo_mini_batch_size:
        raise ConfigError(
            f"data.train_batch_size={config.data.train_batch_size} must be a multiple of "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} (remainder {data_too_small})."
        )
    if rollout.name != "vllm":
        raise ConfigError(f"actor_rollout_ref.rollout.name={rollout.name} is not supported: set it to vllm.")


def check_inputs(config: DictConfig) -> None:
    """Refuse a run whose model or data files do not exist on this machine (remote paths are left to verl).

    Raises:
        ConfigError: naming the missing path and how to get it.
    """
    hint = " Build it with `opd data tinymath`." if config.opd.get("world") else ""
    paths = [("actor_rollout_ref.model.path", config.actor_rollout_ref.model.path)]
    for key in ("train_files", "val_files"):
        files = config.data[key]
        paths += [(f"data.{key}", file) for file in ([files] if isinstance(files, str) else files)]
    for key, path in paths:
        local = str(path).startswith(("/", "~", "."))
        if local and not Path(path).expanduser().exists():
            raise ConfigError(f"{key}={path} does not exist.{hint}")
