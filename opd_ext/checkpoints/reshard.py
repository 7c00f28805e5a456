# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of some number of ranks, loaded on another number: every rank takes its rows from whoever saved them.

Weights and moments are equal to the saved ones, bit by bit; what follows differs by the order of sums alone. Nothing
is written and nothing is sent: all ranks read the same files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from opd_ext.checkpoints.layout import EXTRA, OPTIMISER, TEACHER, CheckpointError, shard_files, shard_name
from opd_ext.checkpoints.shards import Sharded, Shards, cut_of, load


def fits(folder: Path, kind: str, world_size: int) -> bool:
    """Whether each of ``world_size`` ranks finds a file of its own: no resharding."""
    return all((folder / shard_name(kind, world_size, rank)).is_file() for rank in range(world_size))


@torch.no_grad()
def load_weights(module: torch.nn.Module, shards: Mapping[str, Sharded]) -> None:
    """Fill this rank's part of every parameter and buffer of an FSDP2 ``module``, in place.

    A checkpoint of an adapter alone (``checkpoint.save_lora_only``) leaves the other weights as they are.

    Raises:
        CheckpointError: other names or shapes; nothing is promised about the module then.
    """
    targets = module.state_dict(keep_vars=True)
    adapter = all("lora_" in name for name in shards)
    wrong = sorted(shards.keys() - targets.keys() if adapter else shards.keys() ^ targets.keys())
    if wrong:
        raise CheckpointError(
            f"The checkpoint is of another model: '{wrong[0]}' ({len(wrong)} names in all) is on one side only."
        )
    for name in shards:
        _local(targets[name]).copy_(shards[name].like(targets[name]))


@torch.no_grad()
def load_teacher(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill this rank's part of the teacher's tensors, in place, from plain shards of any number of ranks.

    Raises:
        CheckpointError: other names or shapes.
    """
    shards = Shards(folder, TEACHER, {name: cut_of(tensor) for name, tensor in tensors.items()})
    if wrong := sorted(shards.keys() ^ tensors.keys()):
        raise CheckpointError(f"The saved teacher is of another model: '{wrong[0]}' is on one side only.")
    for name, target in tensors.items():
        _local(target).copy_(shards[name].like(target))


def load_optimiser(optimiser: torch.optim.Optimizer, folder: Path) -> None:
    """Moments, counts and settings of every parameter.

    Raises:
        CheckpointError: other parameters.
    """
    _, files = shard_files(folder, OPTIMISER)
    ranks = [load(path) for path in files.values()]
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    if (saved := sum(len(group["params"]) for group in ranks[0]["param_groups"])) != len(parameters):
        raise CheckpointError(
            f"The saved optimiser has {saved} parameters, the model {len(parameters)}: it is another."
        )
    state = {}
    for index, entry in ranks[0]["state"].items():
        state[index] = {
            key: _as(
                parameters[index], Sharded.of(f"{key} of parameter {index}", [r["state"][index][key] for r in ranks])
            )
            if isinstance(value, DTensor)
            else value
            for key, value in entry.items()
        }
    optimiser.load_state_dict({"state": state, "param_groups": ranks[0]["param_groups"]})


def load_extra(scheduler: object | None, folder: Path, rank: int) -> dict | None:
    """The learning-rate schedule; returns the RNG states of the rank of that number, None for one that is new.

    A new rank goes on with the RNG that its process began with. No rollout, no loss and no data order depends on it.
    """
    _, files = shard_files(folder, EXTRA)
    # RNG states of NumPy and Python are not tensors; verl reads them so, too.
    states = {
        index: torch.load(files[index], map_location="cpu", weights_only=False) for index in {0, rank} & files.keys()
    }
    if scheduler is not None and states[0]["lr_scheduler"] is not None:
        scheduler.load_state_dict(states[0]["lr_scheduler"])  # type: ignore[attr-defined]
    return states[rank].get("rng") if rank in states else None


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as(parameter: Tensor, moment: Sharded) -> Tensor:
    """This rank's part of a moment, laid out as its parameter is."""
    part = moment.like(parameter).clone()  # of a mapped file
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
