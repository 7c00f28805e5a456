# SPDX-License-Identifier: Apache-2.0
"""What a run goes on from: a checkpoint that is complete, of this model and this adapter, by however many ranks."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from opd_ext.checkpoints.layout import (
    MODEL,
    OPTIMISER,
    CheckpointError,
    TrainerState,
    latest,
    shard_files,
    teacher_folder,
)
from opd_ext.config.one_step_off import samples_ahead
from opd_ext.config.schema import OPDConfig
from opd_ext.config.teachers import adapter_weights
from opd_ext.errors import ConfigError
from opd_ext.preflight.findings import Findings

_FROM = "trainer.resume_from_path"
_OTHERWISE = f"go on from another one ({_FROM}), or anew (trainer.resume_mode=disable)"


def check_resume(config: DictConfig, opd: OPDConfig, starting: bool, findings: Findings) -> None:
    """Look at the checkpoint that the run would load, if it is on this machine.

    Raises:
        ConfigError: one sentence.
    """
    folder = _checkpoint(config, starting)
    if folder is None or not (folder / "actor").is_dir():
        return
    try:
        state = TrainerState.read(folder)
        saved, files = shard_files(folder / "actor", MODEL)
        _check_whole(folder / "actor", config, files)
    except (CheckpointError, FileNotFoundError) as error:
        raise ConfigError(f"The run cannot go on from {folder}: {str(error).rstrip('.')}; {_OTHERWISE}.") from None
    mode = config.trainer.v1.trainer_mode
    if samples_ahead(state.trainer_mode) != samples_ahead(mode):
        raise ConfigError(
            f"trainer.v1.trainer_mode={mode}, and {folder} was saved with {state.trainer_mode}, which has taken other "
            f"prompts from the data by then: set that (asynchronous=one_step_off, or null), or {_OTHERWISE}."
        )
    _check_adapter(folder / "actor", config.actor_rollout_ref.model)
    _check_teachers(folder, state, opd, config)
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    told = "" if saved == ranks else f"; {saved} trainer ranks saved it, {ranks} go on"
    findings.fact("resume", f"from step {state.global_step}{told}")


def _check_teachers(folder: Path, state: TrainerState, opd: OPDConfig, config: DictConfig) -> None:
    """Every teacher that has moved finds its weights, and weights that have moved find their teacher."""
    moved = {*(name for name, version in state.teacher_versions.items() if version > 0)}
    now = opd.teacher_weights
    if lost := sorted(moved - now.keys()):
        raise ConfigError(
            f"{folder} holds weights of the teacher {lost[0]}, and by that name opd.teachers has none of its own: keep "
            f"names and schedules as they were, or {_OTHERWISE}."
        )
    if opd.teachers and state.teacher_version > 0:
        raise ConfigError(
            f"{folder} was saved with one teacher, which had moved, and opd.teachers now name several: keep "
            f"opd.teacher, or {_OTHERWISE}."
        )
    if opd.schedule(state.global_step + 1)[0] == 0:
        return
    for name, view in adapter_weights(opd, config).items():
        if view.opd.teacher.kind.moves and not (folder / teacher_folder(name)).is_dir():
            raise ConfigError(
                f"{folder} holds no adapter of the teacher{f' {name}' if name else ''}, and {view.key}.weights="
                f"{view.opd.teacher.weights} goes on from one: keep the teacher of the run that saved it, or "
                f"{_OTHERWISE}."
            )
    for name in now:
        if state.version(name) > 0 and not (folder / teacher_folder(name)).is_dir():
            raise ConfigError(
                f"{folder} holds no teacher{f' {name}' if name else ''}, since no later step of the run that saved it "
                f"read one, and opd.credit now asks for one: keep opd.credit as it was, or {_OTHERWISE}."
            )


def _checkpoint(config: DictConfig, starting: bool) -> Path | None:
    trainer = config.trainer
    if trainer.resume_mode == "resume_path":
        folder = Path(str(trainer.resume_from_path)).expanduser()
        if starting and not folder.is_dir():
            raise ConfigError(f"{_FROM}={trainer.resume_from_path} does not exist: name a folder global_step_N.")
        return folder
    if trainer.resume_mode != "auto":
        return None
    root = Path(trainer.default_local_dir)
    step = latest(root)
    return None if step is None else root / f"global_step_{step}"


def _check_whole(actor: Path, config: DictConfig, files: dict[int, Path]) -> None:
    """Weights and moments by the same ranks, of whom none is missing."""
    from opd_ext.checkpoints.shards import Shards

    weights = Shards(actor, MODEL)
    for name in weights:  # says itself what is missing
        weights[name]
    if "optimizer" in (config.actor_rollout_ref.actor.checkpoint.load_contents or ()):
        _, moments = shard_files(actor, OPTIMISER)
        if moments.keys() != files.keys():
            raise CheckpointError(f"{actor} has weights of {len(files)} ranks and moments of {len(moments)}")


def _check_adapter(actor: Path, model: Any) -> None:
    meta = actor / "lora_train_meta.json"
    saved = json.loads(meta.read_text()) if meta.is_file() else {"r": 0}
    if model.get("lora_adapter_path"):  # which brings its own
        return
    now = {"r": model.lora_rank} | ({"lora_alpha": model.lora_alpha} if model.lora_rank else {})
    keys = {"r": "lora_rank", "lora_alpha": "lora_alpha"}
    for name, value in now.items():
        if saved.get(name, value) != value:
            raise ConfigError(
                f"actor_rollout_ref.model.{keys[name]}={value}, and the run was saved with {saved[name]}: set that, or "
                f"{_OTHERWISE}."
            )
