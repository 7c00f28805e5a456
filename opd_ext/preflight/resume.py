# SPDX-License-Identifier: Apache-2.0
"""What a run goes on from: a checkpoint that is complete, of this model and this adapter, by however many ranks."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from opd_ext.checkpoints.layout import MODEL, OPTIMISER, CheckpointError, TrainerState, latest, shard_files
from opd_ext.config.schema import OPDConfig
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
    _check_adapter(folder / "actor", config.actor_rollout_ref.model)
    if state.teacher_version > 0 and opd.needs_teacher_engine and opd.schedule(state.global_step + 1)[0] > 0:
        if not (folder / "teacher").is_dir():
            raise ConfigError(
                f"{folder} holds no teacher, since no later step of the run that saved it read one, and opd.credit "
                f"now asks for one: keep opd.credit as it was, or {_OTHERWISE}."
            )
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    told = "" if saved == ranks else f"; {saved} trainer ranks saved it, {ranks} go on"
    findings.fact("resume", f"from step {state.global_step}{told}")


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
