# SPDX-License-Identifier: Apache-2.0
"""What a run would do: devices, batches, tokens per step, memory per GPU. Printed by ``opd train --dry-run``."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from opd_ext.config.schema import OPDConfig
from opd_ext.report.methods import describe
from opd_ext.terminal import terminal

GiB = 1024**3
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass
class ModelSize:
    """Parameters and the dimensions that memory depends on; ``source`` says where they come from."""

    parameters: float
    layers: int
    hidden: int
    vocabulary: int
    source: str


# Public configs of the models in the recipes: layers, hidden size, vocabulary, parameters in billions.
_KNOWN = {
    "qwen3-0.6b": (28, 1024, 151936, 0.6),
    "qwen3-1.7b": (28, 2048, 151936, 1.7),
    "qwen3-4b": (36, 2560, 151936, 4.0),
    "qwen3-8b": (36, 4096, 151936, 8.2),
    "qwen3-14b": (40, 5120, 151936, 14.8),
    "qwen3-32b": (64, 5120, 151936, 32.8),
    "deepseek-r1-distill-llama-8b": (32, 4096, 128256, 8.0),
}


def model_size(path: str) -> ModelSize | None:
    """Size of a model folder (from its config, on the meta device) or of a hub id known here; else None."""
    if (Path(path).expanduser() / "config.json").exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        count = sum(parameter.numel() for parameter in model.parameters())
        return ModelSize(count, config.num_hidden_layers, config.hidden_size, config.vocab_size, "its config.json")
    name = Path(path).name.lower()
    match = next((known for known in _KNOWN if re.fullmatch(rf"{re.escape(known)}(-base)?", name)), None)
    if match is None:
        return None
    layers, hidden, vocabulary, billions = _KNOWN[match]
    return ModelSize(billions * 1e9, layers, hidden, vocabulary, "its public config")


def memory_per_rank(config: DictConfig, opd: OPDConfig, size: ModelSize) -> dict[str, float]:
    """Estimated bytes per trainer rank while the student trains (vLLM asleep), by use.

    Sharded states follow from the dtypes; gradients and moments are those of what trains. Activations count one
    layer input per token (checkpointing on) or 34 hidden-sized tensors per token and layer (Korthikanti et al.,
    2022, eq. 2 without attention scores). The head counts two logits buffers and softmax intermediates (4) per
    chunk row, the fp32 gradient of the vocabulary projection and both gathered projections.
    """
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    actor, ref = config.actor_rollout_ref.actor, config.actor_rollout_ref.ref
    master = _BYTES[actor.fsdp_config.model_dtype]
    compute = _BYTES[actor.fsdp_config.mixed_precision.param_dtype]
    shard = size.parameters / ranks
    trained = _trained(config.actor_rollout_ref.model.lora_rank, size) / ranks * master
    tokens = actor.ppo_max_token_len_per_gpu
    per_token = size.hidden * compute * size.layers
    if not config.actor_rollout_ref.model.enable_gradient_checkpointing:
        per_token *= 34 / compute
    offloaded = actor.fsdp_config.optimizer_offload
    return {
        "student weights": shard * master,
        "gradients": trained,
        "AdamW moments" + (" (in host memory)" if offloaded else ""): 0 if offloaded else 2 * trained,
        "teacher weights": shard * _BYTES[ref.fsdp_config.model_dtype] if opd.needs_teacher_engine else 0,
        "activations": tokens * per_token,
        "head": opd.head.chunk_size * size.vocabulary * 4 * 6 + size.vocabulary * size.hidden * (4 + 2 * compute),
        "teacher rows": opd.max_pair_length * _pairs_per_rank(config) * size.hidden * compute,
    }


def _trained(rank: int, size: ModelSize) -> float:
    """Parameters that train: all, or adapters of ``rank`` on a layer's seven projections.

    An adapter has rank x (inputs + outputs); in Qwen3 the seven have some 20 hidden sizes of them.
    """
    return min(size.parameters, 20 * rank * size.hidden * size.layers) if rank else size.parameters


def _pairs_per_rank(config: DictConfig) -> int:
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    pairs = config.actor_rollout_ref.actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    return max(1, pairs // ranks)


def print_plan(
    config: DictConfig, opd: OPDConfig, facts: Mapping[str, str] | None = None, notes: Sequence[str] = ()
) -> None:
    """Print the plan as tables; needs neither a GPU nor the model nor the data.

    Args:
        facts: further rows, in the place of those of the same name: what a preflight has seen.
        notes: sentences below the plan.
    """
    console = terminal()
    console.print(_plan_table(config, opd, facts or {}))
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    size = model_size(config.actor_rollout_ref.model.path)
    if size is None:
        console.print("Memory: no estimate, because the model is neither a folder here nor a model known by name.")
    else:
        console.print(_memory_table(config, opd, size))
    console.print("The configuration passes this package's schema and verl's validation. Nothing was started.")


def _plan_table(config: DictConfig, opd: OPDConfig, facts: Mapping[str, str]) -> Table:
    rollout, trainer, data = config.actor_rollout_ref.rollout, config.trainer, config.data
    ranks = trainer.n_gpus_per_node * trainer.nnodes
    pairs = data.train_batch_size * rollout.n
    replicas = ranks // rollout.tensor_model_parallel_size
    places = describe(opd)
    rows: list[tuple[str, Any]] = [
        ("method", f"{opd.method}: divergence {places['divergence']}, credit {places['credit']}"),
        ("teacher", f"{places['teacher weights']} weights, {places['teacher context']}" if opd.distils else "none"),
        ("policy", places["policy"]),
        ("model", config.actor_rollout_ref.model.path),
        (
            "devices",
            f"{trainer.nnodes} node(s) x {trainer.n_gpus_per_node} {opd.device}: {ranks} FSDP2 rank(s) "
            f"and {replicas} vLLM replica(s) of tensor parallel {rollout.tensor_model_parallel_size}",
        ),
        (
            "one step",
            f"{data.train_batch_size} prompts x {rollout.n} rollout(s) = {pairs} pairs, "
            f"{data.train_batch_size // config.actor_rollout_ref.actor.ppo_mini_batch_size} optimiser step(s), "
            f"lr {config.actor_rollout_ref.actor.optim.lr:g}",
        ),
        (
            "tokens per step",
            f"at most {pairs * opd.rollout.train_tokens:,} generated, "
            f"{pairs * opd.max_pair_length:,} through the student"
            + (" and as many through the teacher" if opd.distils else ""),
        ),
        (
            "steps",
            f"{trainer.total_training_steps} (validation every {trainer.test_freq}, "
            f"checkpoint every {trainer.save_freq})",
        ),
        ("train data", data.train_files),
        ("validation data", data.val_files),
        ("run folder", opd.run_dir),
    ]
    table = Table(title="Plan", show_header=False, title_justify="left")
    for name, value in (dict(rows) | dict(facts)).items():
        table.add_row(name, str(value))
    return table


def _memory_table(config: DictConfig, opd: OPDConfig, size: ModelSize) -> Table:
    title = f"Memory per trainer rank, estimate ({size.parameters / 1e9:.3g} B parameters, from {size.source})"
    table = Table(title=title, title_justify="left")
    table.add_column("use")
    table.add_column("GiB", justify="right")
    parts = memory_per_rank(config, opd, size)
    for name, value in parts.items():
        table.add_row(name, f"{value / GiB:.2f}")
    table.add_section()
    table.add_row("sum, while vLLM sleeps", f"{sum(parts.values()) / GiB:.2f}")
    if opd.device == "cuda":
        share = config.actor_rollout_ref.rollout.gpu_memory_utilization
        table.add_row("vLLM, while it generates", f"{share:.0%} of the GPU")
    return table
