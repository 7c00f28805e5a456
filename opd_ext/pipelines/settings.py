# SPDX-License-Identifier: Apache-2.0
"""The configuration of the pipelines: types, defaults, and what is refused before anything starts.

Composed by Hydra from ``opd_ext/config/pipelines``: ``sft.yaml``, ``ssd.yaml`` or ``t3s.yaml``, a ``scale`` and, if
asked for, a published ``preset`` or a ``recipe``.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from jinja2 import Environment, TemplateSyntaxError, meta
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_ext import home
from opd_ext.config import processor as _processor  # noqa: F401  (its resolver)
from opd_ext.config.assumptions import Assumptions, check_devices
from opd_ext.config.overrides import check_folders, quoted, readable
from opd_ext.config.refusals import refusal
from opd_ext.errors import ConfigError, one_of, positive
from opd_ext.sampling.config import SamplingConfig, VLLMConfig

CONFIG_DIR = Path(__file__).parents[1] / "config" / "pipelines"


@dataclass
class PromptsConfig:
    """A parquet file in verl's format, and what is taken from it."""

    file: str | None = None  # the parquet file
    count: int | None = None  # the first so many, after duplicates are gone; null: all
    deduplicate: bool = True  # one prompt per statement, compared with normalised white space
    system: str | None = None  # a system message put before the conversation
    wording: dict[str, str] = field(default_factory=dict)
    """How programs are asked for, in Jinja's syntax with `question` and `starter_code`: `function` for problems with
    `extra_info.starter_code`, `stdin` for those without; each the text itself, or `file:` and a path. Empty: prompts
    stay as they are."""
    template: dict[str, Any] = field(default_factory=dict)  # options of the chat template


@dataclass
class TrainConfig:
    """Fine-tuning on verl's SFT trainer. ``verl`` holds any further key of its ``sft_trainer_engine.yaml``."""

    steps: int = 50  # optimiser steps
    batch_size: int = 64  # samples, over all ranks
    lr: float = 1e-5  # learning rate; its peak where the schedule is cosine
    min_lr: float = 0.0  # where the learning rate ends; cosine only
    schedule: str = "constant"  # of the learning rate: constant | cosine
    warmup_steps: int = 0  # steps in which the learning rate rises from 0
    weight_decay: float = 0.0  # of AdamW
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # of AdamW
    clip_grad: float = 1.0  # the gradient's norm at most
    max_length: int = 4096  # tokens; what is longer loses its end, and is counted
    tokens_per_gpu: int = 8192  # tokens in one micro-batch
    save_every: int = 25  # steps between checkpoints
    normalisation: str = "kept-token-mean"  # tokens that the loss is divided by: kept-token-mean | all-token-mean
    ranks: int = 1  # data-parallel processes, over all nodes
    nodes: int = 1  # nodes that share them, alike; more than one: of a Ray cluster
    verl: dict[str, Any] = field(default_factory=dict)  # any further key of verl's sft_trainer_engine.yaml


@dataclass
class RewardConfig:
    """A grader with verl's signature; without a path verl's own, chosen by ``data_source``."""

    path: str | None = None  # Python file, or pkg://module; null: verl's own grader
    name: str = "compute_score"  # name of the function in it
    kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of the function

    @classmethod
    def of_run(cls, config: Mapping[str, Any]) -> "RewardConfig":
        """The grader of a run of `opd train`, arguments included; ``config`` is that of the run, plain."""
        custom = config["reward"]["custom_reward_function"]
        return cls(custom["path"], custom["name"], dict(custom.get("reward_kwargs") or {}))

    def described(self) -> dict[str, Any]:
        """What a finished stage remembers of its grader; without arguments as before there were any."""
        return {name: value for name, value in plain(self).items() if name != "kwargs" or value}


@dataclass
class EvaluationConfig:
    """Problems that models are compared on."""

    file: str | None = None  # the problems that are reported
    select_file: str | None = None  # problems on which temperatures are chosen; null: the first temperature is reported
    count: int | None = None  # the first so many problems; null: all
    n: int = 4  # responses per problem and temperature
    max_tokens: int = 1024  # of a response
    temperatures: list[float] = field(default_factory=lambda: [1.0])  # every model is evaluated at each of them
    top_k: int = -1  # -1: all
    top_p: float = 1.0  # 1: all
    wording: dict[str, str] | None = None  # as prompts.wording; null: that of the prompts


@dataclass
class SampledConfig:
    """What samples and grades, in all pipelines."""

    run_dir: str = "runs/offline"  # everything that the pipeline makes; a rerun goes on there
    scale: str = "cpu_tiny"  # name of the preset in config/pipelines/scale that is composed
    device: str = "cuda"  # what samples and trains: cpu | cuda (set by the scale)
    world: str | None = None  # folder of the miniature world, where a scale uses it
    model: str | None = None  # folder or hub id of the model that is fine-tuned, or evaluated
    trust_remote_code: bool = False  # let the model bring Python code of its own
    seed: int = 1  # of samples, batches, random arms
    vllm: VLLMConfig = field(default_factory=VLLMConfig)  # the engines that sample
    reward: RewardConfig = field(default_factory=RewardConfig)  # the grader
    environment: dict[str, str] = field(default_factory=dict)  # of the processes that sample and train
    plan: Assumptions = field(default_factory=Assumptions)  # what a plan reckons with; no stage reads it

    def check(self) -> None:
        """Refuse what cannot work; a pipeline adds what it knows.

        Raises:
            ConfigError: one sentence.
        """
        one_of("device", self.device, ("cpu", "cuda"))
        if not self.model:
            raise ConfigError("model is missing: set it to a folder with a model, or its hub id.")
        positive("vllm.replicas", self.vllm.replicas)
        positive("vllm.shard", self.vllm.shard)
        self.plan.check("plan")
        if self.device == "cuda":
            key = "vllm.replicas x vllm.tensor_parallel_size"
            check_devices(self.plan, key, self.vllm.replicas * self.vllm.tensor_parallel_size)

    def check_limit(self, key: str, tokens: int) -> None:
        """A response must leave room for its prompt."""
        if not 0 < tokens < self.vllm.max_model_len:
            raise ConfigError(
                f"{key}={tokens} must be positive and below vllm.max_model_len={self.vllm.max_model_len}, which holds "
                "the prompt as well."
            )


@dataclass
class PipelineConfig(SampledConfig):
    """What all pipelines that train have in common."""

    prompts: PromptsConfig = field(default_factory=PromptsConfig)  # what is trained on
    train: TrainConfig = field(default_factory=TrainConfig)  # the fine-tuning
    evaluate: EvaluationConfig = field(default_factory=EvaluationConfig)  # what models are compared on

    def check(self) -> None:
        super().check()
        self.prompts.wording = check_wording("prompts.wording", self.prompts.wording)
        if self.evaluate.wording is not None:
            self.evaluate.wording = check_wording("evaluate.wording", self.evaluate.wording)
        check_training("train", self.train)
        if self.device == "cuda":
            check_devices(self.plan, "train.ranks", self.train.ranks)
        if not self.evaluate.temperatures:
            raise ConfigError("evaluate.temperatures=[] must name at least one temperature.")
        for temperature in self.evaluate.temperatures:
            positive("evaluate.temperatures", temperature, zero=True)
        positive("evaluate.n", self.evaluate.n)
        check_share("evaluate.top_p", self.evaluate.top_p)
        self.check_limit("evaluate.max_tokens", self.evaluate.max_tokens)

    @property
    def models(self) -> dict[str, str | None]:
        """Key -> model, for every model that must be there before the first stage."""
        return {"model": self.model}


@dataclass
class TracedConfig(PipelineConfig):
    """What is learnt from traces: a teacher's, or those of a column."""

    teacher: str | None = None  # folder or hub id of the model whose traces are learnt from
    traces: SamplingConfig = field(default_factory=lambda: SamplingConfig(0.6, -1, 1.0, 16, 32768))
    """How the teacher is sampled; one right trace per prompt is kept."""
    traces_column: str | None = None  # of prompts.file: verified traces as text; also `column.field`
    trace_prefix: str = ""  # put before every trace, e.g. the opening think tag that the teacher's template writes

    def check(self) -> None:
        super().check()
        if not self.teacher and not self.traces_column:
            raise ConfigError("teacher is missing: set it to a model, or traces_column to a column with its traces.")
        check_decoding("traces", self.traces)
        if not self.traces_column:
            self.check_limit("traces.max_tokens", self.traces.max_tokens)

    @property
    def models(self) -> dict[str, str | None]:
        return super().models | ({} if self.traces_column else {"teacher": self.teacher})


_HUB_ID = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")
_GROUPS = ("scale", "preset", "tuning", "recipe", "protocol")
_Config = TypeVar("_Config", bound=SampledConfig)


def compose_pipeline(
    name: str, kind: type[_Config], overrides: Sequence[str], config_dirs: Sequence[str | Path] = ()
) -> _Config:
    """The settings of a pipeline, typed and checked.

    Args:
        name: of its primary file.
        kind: of its settings.
        overrides: in Hydra's grammar.
        config_dirs: folders with further recipes and presets.

    Raises:
        ConfigError: one sentence.
    """
    for override in overrides:
        if override.startswith("recipe=") and override[7:].split("/")[0] in _others(name):
            raise ConfigError(f"{override} is one of `opd {override[7:].split('/')[0]}`, not of `opd {name}`.")
    home.settle()
    check_folders(config_dirs)
    folders = ",".join(quoted(f"file://{Path(folder).absolute()}") for folder in config_dirs)
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base=None):
            given = [_addable(readable(each)) for each in overrides]
            composed: DictConfig = compose(name, overrides=[f"hydra.searchpath=[{folders}]", *given])
        read = OmegaConf.masked_copy(composed, _sections(kind, composed, overrides))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), read))
    except (HydraException, OmegaConfBaseException) as error:
        raise refusal(error, overrides, f"opd {name}", CONFIG_DIR / "recipe", f"{name}/") from None
    _make_paths_absolute(config)
    config.check()
    return config


def _sections(kind: type[SampledConfig], composed: DictConfig, overrides: Sequence[str]) -> list[str]:
    """What a pipeline reads of a composed configuration: a scale also says how others train on that machine."""
    asked = {re.split(r"[.=]", each.lstrip("+~"), maxsplit=1)[0] for each in overrides}
    known = {entry.name for entry in fields(kind)}
    return [str(name) for name in composed if name in known or name in asked]


def _others(name: str) -> set[str]:
    """The other pipelines, whose recipes lie beside this one's."""
    return {folder.name for folder in (CONFIG_DIR / "recipe").iterdir()} - {name}


def _addable(override: str) -> str:
    """A key that the files leave at its default can be set like any other; the types say which keys exist."""
    key = override.partition("=")[0]
    return override if key in _GROUPS or override.startswith(("+", "~")) else f"++{override}"


def check_decoding(key: str, decoding: Any) -> None:
    """Temperature, where it has one, and top-p."""
    positive(f"{key}.temperature", decoding.temperature, zero=True)
    check_share(f"{key}.top_p", decoding.top_p)


_WORDINGS = {"function": {"question", "starter_code"}, "stdin": {"question"}}


def check_wording(key: str, wording: dict[str, str]) -> dict[str, str]:
    """The texts of a wording, read from files where it names some.

    Raises:
        ConfigError: a text is missing, or does not use exactly what is filled in.
    """
    if wording and wording.keys() != _WORDINGS.keys():
        raise ConfigError(f"{key} has {', '.join(wording)}: give it function and stdin, or drop it with ~{key}.")
    texts = {}
    for kind, text in wording.items():
        try:
            path = text.removeprefix("file:")
            texts[kind] = text if path == text else Path(path).expanduser().read_text(encoding="utf-8")
            used = meta.find_undeclared_variables(Environment().parse(texts[kind]))
        except (OSError, UnicodeDecodeError, TemplateSyntaxError) as error:
            raise ConfigError(f"{key}.{kind} is no template: {' '.join(str(error).split()).rstrip('.')}.") from None
        if used != _WORDINGS[kind]:
            wanted = " and ".join(f"{{{{ {name} }}}}" for name in sorted(_WORDINGS[kind]))
            raise ConfigError(f"{key}.{kind} must contain {wanted} and no other variable.")
    return texts


def check_share(key: str, value: float) -> None:
    """Raises ConfigError for a share outside (0, 1]."""
    if not 0 < value <= 1:
        raise ConfigError(f"{key}={value} must be in (0, 1].")


def check_training(key: str, train: TrainConfig) -> None:
    """Refuse a fine-tuning that cannot work, ``key`` being where it stands."""
    one_of(f"{key}.schedule", train.schedule, ("constant", "cosine"))
    one_of(f"{key}.normalisation", train.normalisation, ("kept-token-mean", "all-token-mean"))
    for name in ("steps", "save_every", "batch_size", "ranks", "nodes"):
        positive(f"{key}.{name}", getattr(train, name))
    if train.batch_size % train.ranks:
        raise ConfigError(f"{key}.batch_size={train.batch_size} must be a multiple of {key}.ranks={train.ranks}.")
    if train.ranks % train.nodes:
        raise ConfigError(f"{key}.ranks={train.ranks} must be a multiple of {key}.nodes={train.nodes}.")
    if rank := (train.verl.get("model") or {}).get("lora_rank", 0):
        raise ConfigError(
            f"{key}.verl.model.lora_rank={rank} is not supported, since adapters are neither sampled from nor merged "
            "here: set it to 0."
        )
    if not 0 <= train.min_lr <= train.lr:
        raise ConfigError(f"{key}.min_lr={train.min_lr} must be between 0 and {key}.lr={train.lr}.")


def missing_inputs(config: PipelineConfig) -> list[str]:
    """A sentence for every file and folder that the configuration names and that is not on this machine."""
    level = " long" if config.world and config.world.endswith("_long") else ""
    hint = f"opd data tinymath{level} makes the miniature world" if config.world else ""
    files = {"prompts.file": config.prompts.file, "evaluate.file": config.evaluate.file}
    files |= {"evaluate.select_file": config.evaluate.select_file} if config.evaluate.select_file else {}
    found = []
    for key, value in files.items():
        if not value or not Path(value).is_file():
            found.append(f"{key}={value} is not a file{f' ({hint})' if hint else ''}.")
    for key, value in config.models.items():
        hub_id = _HUB_ID.fullmatch(value) and not Path(value).exists()
        if not hub_id and not (Path(value) / "config.json").is_file():
            tail = f"; {hint}" if hint else ""
            found.append(f"{key}={value} is neither a hub id nor a folder with a config.json{tail}.")
    return found


def check_inputs(config: PipelineConfig) -> None:
    """Look for the files and folders that the configuration names.

    Raises:
        ConfigError: naming the first that is missing.
    """
    check_trainable(config)
    for sentence in missing_inputs(config):
        raise ConfigError(sentence)


def check_trainable(config: PipelineConfig) -> None:
    """gpt-oss samples in vLLM and would fail after that: its attention on a GPU is a kernel that is not installed."""
    if config.device == "cuda" and "gpt-oss" in str(config.model).lower():
        raise ConfigError(
            f"model={config.model} cannot be fine-tuned with the pinned packages: transformers takes the attention "
            "of gpt-oss from the package kernels, which is not among them: choose another model and preset."
        )


def _make_paths_absolute(config: SampledConfig) -> None:
    """Processes that sample and train may run elsewhere than here."""
    holders = [(config, name) for name in ("run_dir", "model", "teacher", "against")]
    holders += [(getattr(config, "prompts", None), "file"), (getattr(config, "diffusion", None), "model")]
    holders += [(getattr(config, "evaluate", None), name) for name in ("file", "select_file")]
    for holder, name in holders:
        value = getattr(holder, name, None)
        if value and (name == "run_dir" or Path(value).expanduser().exists()):
            setattr(holder, name, str(Path(value).expanduser().absolute()))


def plain(value: Any) -> Any:
    """A dataclass as what JSON would make of it, so that settings compare equal after a round trip."""
    return json.loads(json.dumps(asdict(value) if hasattr(value, "__dataclass_fields__") else value))
