# SPDX-License-Identifier: Apache-2.0
"""The configuration of the pipelines: types, defaults, and what is refused before anything starts.

Composed by Hydra from ``opd_ext/config/offline``: ``ssd.yaml`` or ``t3s.yaml``, a ``scale`` and, if asked for, a
published ``preset``.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_ext.config.schema import ConfigError

CONFIG_DIR = Path(__file__).parents[1] / "config" / "offline"


@dataclass
class Decoding:
    """How responses are drawn; nothing is left to a model's own generation defaults."""

    temperature: float = 1.0
    top_k: int = -1  # -1: all
    top_p: float = 1.0

    def __str__(self) -> str:
        return f"{self.temperature:g} / {self.top_k if self.top_k > 0 else '-'} / {self.top_p:g}"


@dataclass
class SamplingConfig(Decoding):
    """A pass over prompts."""

    n: int = 1  # responses per prompt
    max_tokens: int = 1024


@dataclass
class VLLMConfig:
    """The engines that sample. Only ``dtype``, ``shard`` and what ``args`` changes about numbers can change samples."""

    replicas: int = 1
    tensor_parallel_size: int = 1
    dtype: str = "bfloat16"
    max_model_len: int = 4096
    shard: int = 512  # requests that are generated together and stored together: what an interruption can cost
    args: dict[str, Any] = field(default_factory=dict)  # any further argument of vllm.LLM


@dataclass
class PromptsConfig:
    """A parquet file in verl's format, and what is taken from it."""

    file: str | None = None
    count: int | None = None  # the first so many, after duplicates are gone; null: all
    deduplicate: bool = True  # one prompt per statement, compared with normalised white space
    system: str | None = None  # a system message put before the conversation
    template: dict[str, Any] = field(default_factory=dict)  # options of the chat template


@dataclass
class TrainConfig:
    """Fine-tuning on verl's SFT trainer. ``verl`` holds any further key of its ``sft_trainer_engine.yaml``."""

    steps: int = 50  # optimiser steps
    batch_size: int = 64  # samples, over all ranks
    lr: float = 1e-5
    min_lr: float = 0.0  # cosine only
    schedule: str = "constant"  # constant | cosine
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip_grad: float = 1.0
    max_length: int = 4096  # tokens; what is longer loses its end, and is counted
    tokens_per_gpu: int = 8192  # in one micro-batch
    save_every: int = 25  # steps between checkpoints
    normalisation: str = "kept-token-mean"  # kept-token-mean | all-token-mean
    ranks: int = 1  # data-parallel processes
    verl: dict[str, Any] = field(default_factory=dict)


@dataclass
class RewardConfig:
    """A grader with verl's signature; without a path verl's own, chosen by ``data_source``."""

    path: str | None = None
    name: str = "compute_score"


@dataclass
class EvaluationConfig:
    """Problems that models are compared on."""

    file: str | None = None  # reported
    select_file: str | None = None  # where temperatures are chosen; null: the first one is reported as it is
    count: int | None = None
    n: int = 4
    max_tokens: int = 1024
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    top_k: int = -1
    top_p: float = 1.0


@dataclass
class PipelineConfig:
    """What both pipelines have in common."""

    run_dir: str = "runs/offline"
    scale: str = "cpu_tiny"
    device: str = "cuda"
    world: str | None = None
    model: str | None = None  # folder or hub id of the model that is fine-tuned
    trust_remote_code: bool = False
    seed: int = 1
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluate: EvaluationConfig = field(default_factory=EvaluationConfig)
    environment: dict[str, str] = field(default_factory=dict)  # of the processes that sample and train


@dataclass
class SSDConfig(PipelineConfig):
    """Simple self-distillation: one arm per way of sampling."""

    max_tokens: int = 1024  # of a sampled response
    arms: dict[str, Decoding] = field(default_factory=dict)
    sweep: list[float] = field(default_factory=list)  # T_train of further arms without truncation
    diagnose: int = 128  # prompts whose base samples show what happened at locks and forks; 0: none


@dataclass
class BottleneckConfig:
    """Where the pilot's training accuracy is lowest."""

    n: int = 4  # samples per training prompt and checkpoint
    temperature: float = 0.6
    top_k: int = -1
    top_p: float = 0.95
    standard_errors: float = 2.0  # the dip must exceed so many
    step: int | None = None  # name it instead of looking for it


@dataclass
class DiffusionConfig:
    """T3S for a masked-diffusion model: the selection comes from the autoregressive ``model``."""

    model: str | None = None  # folder or hub id
    tau: float = 0.2  # nats that a token must have lost to be restored always
    ratio: list[float] = field(default_factory=lambda: [0.3, 0.8])  # of masked response tokens, drawn per sample
    mask_token_id: int | None = None  # null: what the model's config says; so for the next two
    attention: str | None = None  # full (LLaDA) | block (LLaDA-2.0)
    block_size: int | None = None
    threshold: float = 0.95  # confidence from which a token is written
    batch_size: int = 32  # prompts that are denoised at a time; each step holds a [batch, length, length] mask
    max_tokens: int | None = None  # of an answer; null: evaluate.max_tokens
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class T3SConfig(PipelineConfig):
    """Training-trajectory-aware token selection."""

    teacher: str | None = None
    traces: SamplingConfig = field(default_factory=lambda: SamplingConfig(0.6, -1, 1.0, 16, 32768))
    traces_column: str | None = None  # of prompts.file: verified traces as text; also `column.field`
    trace_prefix: str = ""  # put before every trace, e.g. the opening think tag that the teacher's template writes
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    threshold: float = 0.0  # nats; an anchor's confidence rose by more
    always_keep_eos: bool = False
    arms: list[str] = field(default_factory=lambda: ["t3s", "inverse", "random", "lowest"])
    rrt: bool = True
    diffusion: DiffusionConfig | None = None


_HUB_ID = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")
_GROUPS = ("scale", "preset", "tuning")
T3S_ARMS = ("t3s", "inverse", "random", "lowest")
_Config = TypeVar("_Config", bound=PipelineConfig)


def compose_pipeline(name: str, kind: type[_Config], overrides: Sequence[str]) -> _Config:
    """The settings of a pipeline, typed and checked.

    Args:
        name: of its primary file.
        kind: of its settings.
        overrides: in Hydra's grammar.

    Raises:
        ConfigError: one sentence.
    """
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            composed: DictConfig = compose(name, overrides=[_addable(override) for override in overrides])
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), composed))
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"The configuration does not compose: {reason}") from None
    _make_paths_absolute(config)
    _check(config)
    return config


def _addable(override: str) -> str:
    """A key that the files leave at its default can be set like any other; the types say which keys exist."""
    key = override.partition("=")[0]
    return override if key in _GROUPS or override.startswith(("+", "~")) else f"++{override}"


def _check(config: PipelineConfig) -> None:
    _require(config.device in ("cpu", "cuda"), "device", config.device, "cpu or cuda")
    _require(bool(config.model), "model", config.model, "a folder with a model, or its hub id")
    _require("base" not in getattr(config, "arms", ()), "arms", "base", "another name: that is the model itself")
    _require(config.vllm.replicas > 0, "vllm.replicas", config.vllm.replicas, "at least 1")
    _check_training("train", config.train)
    decodings = {"evaluate": config.evaluate}
    for temperature in config.evaluate.temperatures:
        _require(temperature >= 0, "evaluate.temperatures", temperature, "0 or more")
    _require(len(config.evaluate.temperatures) > 0, "evaluate.temperatures", "[]", "a list of at least one")
    _require(config.evaluate.n > 0, "evaluate.n", config.evaluate.n, "at least 1")
    _require(config.vllm.shard > 0, "vllm.shard", config.vllm.shard, "at least 1")
    limits = {"evaluate.max_tokens": config.evaluate.max_tokens}
    if isinstance(config, SSDConfig):
        _require("control" in config.arms, "arms", list(config.arms), "one of them `control` (T 1, no truncation)")
        control = config.arms["control"]
        _require(control == Decoding(1.0, control.top_k, 1.0) and control.top_k <= 0, "arms.control", control, "T 1, -")
        decodings |= {f"arms.{arm}": decoding for arm, decoding in config.arms.items()}
        for arm, decoding in config.arms.items():
            _require(decoding.temperature > 0, f"arms.{arm}.temperature", decoding.temperature, "above 0")
        limits["max_tokens"] = config.max_tokens
        for temperature in config.sweep:
            _require(temperature > 0, "sweep", temperature, "above 0")
    if isinstance(config, T3SConfig):
        for arm in config.arms:
            _require(arm in T3S_ARMS, "arms", arm, f"any of {', '.join(T3S_ARMS)}")
        _require(bool(config.teacher or config.traces_column), "teacher", None, "a model, unless traces_column is set")
        _require(
            config.train.save_every < config.train.steps, "train.save_every", config.train.save_every, "below steps"
        )
        decodings |= {"traces": config.traces, "bottleneck": config.bottleneck}
        if not config.traces_column:
            limits["traces.max_tokens"] = config.traces.max_tokens
        if config.diffusion is not None:
            attention = config.diffusion.attention
            _require(attention in (None, "full", "block"), "diffusion.attention", attention, "full or block")
            _require(bool(config.diffusion.model), "diffusion.model", None, "a folder with a model, or its hub id")
            low, high = config.diffusion.ratio
            _require(0 <= low <= high <= 1, "diffusion.ratio", [low, high], "[low, high] within 0 and 1")
            _check_training("diffusion.train", config.diffusion.train)
    for name, decoding in decodings.items():
        _require(0 < decoding.top_p <= 1, f"{name}.top_p", decoding.top_p, "in (0, 1]")
        temperature = getattr(decoding, "temperature", 0.0)
        _require(temperature >= 0, f"{name}.temperature", temperature, "0 or more")
    for name, limit in limits.items():
        _require(
            0 < limit < config.vllm.max_model_len, name, limit, f"below vllm.max_model_len={config.vllm.max_model_len}"
        )


def _check_training(name: str, train: TrainConfig) -> None:
    _require(train.schedule in ("constant", "cosine"), f"{name}.schedule", train.schedule, "constant or cosine")
    reductions = ("kept-token-mean", "all-token-mean")
    _require(train.normalisation in reductions, f"{name}.normalisation", train.normalisation, " or ".join(reductions))
    _require(train.batch_size % train.ranks == 0, f"{name}.batch_size", train.batch_size, f"a multiple of {name}.ranks")
    rank = (train.verl.get("model") or {}).get("lora_rank", 0)
    _require(not rank, f"{name}.verl.model.lora_rank", rank, "0: adapters are neither sampled from nor merged here")
    _require(train.steps > 0 and train.save_every > 0, f"{name}.steps", train.steps, "at least 1, as is save_every")
    _require(0 <= train.min_lr <= train.lr, f"{name}.min_lr", train.min_lr, f"between 0 and lr={train.lr}")


def _require(fine: bool, key: str, value: Any, wanted: str) -> None:
    if not fine:
        raise ConfigError(f"{key}={value} cannot be: it must be {wanted}.")


def check_inputs(config: PipelineConfig) -> None:
    """Look for the files and folders that the configuration names.

    Raises:
        ConfigError: naming the first that is missing.
    """
    files = {"prompts.file": config.prompts.file, "evaluate.file": config.evaluate.file}
    files |= {"evaluate.select_file": config.evaluate.select_file or config.evaluate.file}
    for key, value in files.items():
        if not value or not Path(value).is_file():
            hint = " (opd data tinymath makes the miniature world)" if config.world else ""
            raise ConfigError(f"{key}={value} is not a file{hint}.")
    models = {"model": config.model}
    if isinstance(config, T3SConfig):
        if not config.traces_column:
            models["teacher"] = config.teacher
        if config.diffusion is not None:
            models["diffusion.model"] = config.diffusion.model
    for key, value in models.items():
        hub_id = _HUB_ID.fullmatch(value) and not Path(value).exists()
        if not hub_id and not (Path(value) / "config.json").is_file():
            hint = "; opd data tinymath makes the miniature world" if config.world else ""
            raise ConfigError(f"{key}={value} is neither a hub id nor a folder with a config.json{hint}.")


def _make_paths_absolute(config: PipelineConfig) -> None:
    """Processes that sample and train may run elsewhere than here."""
    holders = [(config, "run_dir"), (config, "model"), (config.prompts, "file")]
    holders += [(config.evaluate, "file"), (config.evaluate, "select_file"), (config, "teacher")]
    holders += [(getattr(config, "diffusion", None), "model")]
    for holder, name in holders:
        value = getattr(holder, name, None)
        if value and (name == "run_dir" or Path(value).expanduser().exists()):
            setattr(holder, name, str(Path(value).expanduser().absolute()))


def plain(value: Any) -> Any:
    """A dataclass as what JSON would make of it, so that settings compare equal after a round trip."""
    return json.loads(json.dumps(asdict(value) if hasattr(value, "__dataclass_fields__") else value))
