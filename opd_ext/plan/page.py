# SPDX-License-Identifier: Apache-2.0
"""The plan as a page and as JSON: what runs, then per GPU and phase memory and time, disk, hours, advice."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from opd_ext.config.devices import SAMPLE, pools
from opd_ext.config.one_step_off import SEPARATE, samples_ahead
from opd_ext.config.schema import OPDConfig
from opd_ext.config.sequence_parallel import sequence_parallel
from opd_ext.config.teachers import adapter_weights
from opd_ext.plan.advice import FULL, advice
from opd_ext.plan.disk import checkpoint_bytes, on_disk
from opd_ext.plan.machines import GiB
from opd_ext.plan.memory import machine_uses, phases
from opd_ext.plan.run import Run, read_run
from opd_ext.plan.shapes import UNKNOWN
from opd_ext.plan.teachers import told_bytes, unsized
from opd_ext.plan.timing import Times, times
from opd_ext.report.methods import describe
from opd_ext.terminal import terminal

WIDTH = 100
GB = 1e9


def print_plan(
    config: DictConfig, opd: OPDConfig, facts: Mapping[str, str] | None = None, notes: Sequence[str] = ()
) -> None:
    """Print the plan as tables; needs neither a GPU nor the model nor the data.

    Args:
        facts: further rows, in the place of those of the same name: what a preflight has seen.
        notes: sentences below the plan.
    """
    console = terminal(WIDTH)
    console.print(_settings(config, opd, facts or {}))
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    run = read_run(config, opd)
    if run is None:
        told = " and ".join(unsized(config.actor_rollout_ref.model.path, opd))
        console.print(f"Memory and time: no estimate, because {told} {UNKNOWN}.", highlight=False, soft_wrap=True)
    else:
        taken = times(run)
        console.print(_phases(run, taken))
        console.print(_whole(run, taken))
        for sentence in advice(run, taken):
            console.print(f"advice: {sentence}", highlight=False, soft_wrap=True)
        console.print(f"assumed: {_assumed(run)}", highlight=False, soft_wrap=True)
    console.print("The configuration passes this package's schema and verl's validation. Nothing was started.")


def as_json(config: DictConfig, opd: OPDConfig) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, tokens; ``run`` is null where a model's size is not known."""
    run = read_run(config, opd)
    if run is None:
        return {"run": None}
    taken = times(run)
    size, count = on_disk(run)
    return {
        "gpus": run.gpus,
        "student": dataclasses.asdict(run.student),
        "machine": dataclasses.asdict(run.machine),
        "memory": {phase.name: phase.uses for phase in phases(run)},
        "machine_memory": machine_uses(run) if run.device == "cpu" else None,
        "host_memory_per_gpu": {phase.name: phase.host for phase in phases(run)},
        "seconds": taken.phases | {"step": taken.step, "validation": taken.validation, "run": taken.total},
        "tokens_per_step": taken.tokens,
        "teacher_bytes_per_token": told_bytes(opd),
        "checkpoint": checkpoint_bytes(run),
        "disk": {"bytes": size, "checkpoints": count},
        "advice": advice(run, taken),
        "assumed": dataclasses.asdict(run.assumed) | {"mean_response": run.mean},
    }


def _ahead(config: DictConfig) -> str:
    told = "of the next batch are sampled during the update, by the policy one version before the one that they train; "
    if config.trainer.v1.trainer_mode == SEPARATE:
        rollout = config.actor_rollout_ref.rollout
        told += f"on {rollout.nnodes} node(s) x {rollout.n_gpus_per_node} devices beside those of the trainer; "
    return f"{told}below, both are counted one after the other"


def _told(opd: OPDConfig, pairs: int, prompt: int) -> str:
    """What verl's servers tell of a teacher, through Ray and the queue."""
    tokens = "its sampled token" if opd.served_topk is None else f"the teacher's {opd.served_topk} likeliest tokens"
    most = pairs * (prompt + opd.rollout.train_tokens) * told_bytes(opd)
    return (
        f"{told_bytes(opd):,} bytes per token of prompt and response, id and log-prob of {tokens}: at most "
        f"{most / 1e6:,.1f} MB a step"
    )


def _settings(config: DictConfig, opd: OPDConfig, facts: Mapping[str, str]) -> Table:
    rollout, trainer, data = config.actor_rollout_ref.rollout, config.trainer, config.data
    ranks = trainer.n_gpus_per_node * trainer.nnodes
    pairs = data.train_batch_size * rollout.n
    first, *others = pools(opd, config)
    sampler = next((pool for pool in others if pool.does == SAMPLE), first)
    replicas = sampler.total // rollout.tensor_model_parallel_size
    together = sequence_parallel(config.actor_rollout_ref.actor)
    shared = f", {together} of which share every sequence (Ulysses)" if together > 1 else ""
    more = "".join(f"; {pool.total} more {pool.does}" for pool in others)
    places = describe(opd)
    weights = f"{places['teacher weights']} weights"
    weights += ", an adapter on the student's base" if adapter_weights(opd, config) else ""
    controlled = f", control {opd.control}" if opd.control else ""
    rows: list[tuple[str, Any]] = [
        ("method", f"{opd.method}{controlled}: divergence {places['divergence']}, credit {places['credit']}"),
        ("teacher", f"{weights}, {places['teacher context']}" if opd.distils else "none"),
        ("policy", places["policy"]),
        *([("horizon", str(opd.horizon))] if opd.horizon.limited else []),
        *([("rollouts", _ahead(config))] if samples_ahead(trainer.v1.trainer_mode) else []),
        ("model", config.actor_rollout_ref.model.path),
        (
            "devices",
            f"{trainer.nnodes} node(s) x {trainer.n_gpus_per_node} {opd.device}: {ranks} FSDP2 rank(s){shared} "
            f"and {replicas} vLLM replica(s) of tensor parallel {rollout.tensor_model_parallel_size}{more}",
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
            f"{pairs * (opd.max_pair_length or 0):,} through the student"
            + (" and as many through the teacher" if opd.distils else ""),
        ),
        *([("teacher's answers", _told(opd, pairs, data.max_prompt_length))] if told_bytes(opd) else []),
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


def _phases(run: Run, taken: Times) -> Table:
    room = run.machine.memory
    table = Table(title=f"Per GPU and phase of a step ({run.machine.name}, {room / GiB:.0f} GiB)", title_justify="left")
    for name in ("phase", "GiB", "of it", "s", "tokens/s", "made of, GiB"):
        table.add_column(name, justify="left" if name in ("phase", "made of, GiB") else "right")
    memory = {phase.name: phase for phase in phases(run)}
    order = ["generation", "old log-probs", "teacher", "teacher servers", "update", "weight sync", "driver"]
    for name in (name for name in order if name in memory or name in taken.phases):
        phase, seconds = memory.get(name), taken.phases.get(name)
        speed = f"{taken.tokens / seconds:,.0f}" if seconds and name not in ("weight sync", "driver") else ""
        uses = sorted(phase.uses.items(), key=lambda item: -item[1]) if phase else []
        made = ", ".join(f"{use} {size / GiB:.1f}" for use, size in uses if size >= 0.05 * GiB)
        if phase and phase.host:
            made += f"; host {phase.host / GiB:.1f}"
        full = " !" if phase and phase.bytes > FULL * room else ""
        share = f"{phase.bytes / room:.0%}{full}" if phase else ""
        size = f"{phase.bytes / GiB:.1f}" if phase else ""
        table.add_row(name, size, share, f"{seconds:.1f}" if seconds is not None else "", speed, made)
    return table


def _whole(run: Run, taken: Times) -> Table:
    checkpoint = checkpoint_bytes(run)
    size, count = on_disk(run)
    samples = sum(each.samples for each in run.validation)
    share = taken.validating / taken.total if taken.total else 0.0
    table = Table(title="Whole run", show_header=False, title_justify="left")
    table.add_row("GPUs", f"{run.gpus}" + (f" of {run.gpus_there}" if run.gpus_there else ""))
    table.add_row("one step", f"{taken.step:.0f} s, {taken.tokens:,.0f} tokens generated")
    said = f"{run.validations} x {taken.validation / 60:.1f} min ({samples:,} samples)"
    if between := sum(count for count, _ in run.meanwhile):
        asked = sum(count * each.samples for count, sets in run.meanwhile for each in sets) / between
        said += f", in between {between} x {taken.meanwhile / 60 / between:.1f} min ({asked:,.0f} samples)"
    table.add_row("validation", f"{said}: {share:.0%} of the run")
    parts = " + ".join(f"{name} {part / GB:.1f}" for name, part in checkpoint.items())
    table.add_row("checkpoint", f"{sum(checkpoint.values()) / GB:.1f} GB ({parts}), {taken.checkpoint:.0f} s each")
    table.add_row("disk", f"{size / GB:.0f} GB: at most {count} checkpoints at a time, in {run.run_dir}")
    if run.device == "cpu":
        uses = machine_uses(run)
        made = ", ".join(f"{name} {size / GiB:.1f}" for name, size in uses.items())
        table.add_row("memory", f"{sum(uses.values()) / GiB:.1f} GiB of this machine ({made})")
    table.add_row("whole run", f"{taken.total / 3600:.1f} h, {taken.total / 3600 * run.gpus:.0f} GPU hours")
    return table


def _assumed(run: Run) -> str:
    a = run.assumed
    unknown = [each.name for each in run.validation if not each.known]
    shapes = dict.fromkeys([run.student, *run.teachers])
    parts = [
        *(f"{shape.name}, which is not here, has the size of {shape.source}" for shape in shapes if shape.guessed),
        f"mean_response={run.mean:.0f} of {run.limit:,} tokens",
        "validation " + ", ".join(f"{each.name} {each.mean:.0f}" for each in run.validation),
        f"mean_prompt={run.mean_prompt}",
        f"mfu_train={a.mfu_train:g}",
        f"mfu_forward={a.mfu_forward:g}",
        f"bandwidth_share={a.bandwidth_share:g}",
        f"allreduce_us={a.allreduce_us:g}",
        f"disk_gb_s={a.disk_gb_s:g}",
        f"sync_gb_s={a.sync_gb_s:g}",
    ]
    rows = f"; rows of {', '.join(unknown)} are guessed" if unknown else ""
    return f"{', '.join(parts)}{rows}. Change them with opd.plan.NAME=VALUE; times are good to a factor of 1.5."
