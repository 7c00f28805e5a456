# SPDX-License-Identifier: Apache-2.0
"""Tensors that several ranks have saved in parts, whole again or cut anew.

FSDP2 cuts a tensor along one dimension as ``torch.chunk`` does, so parts in the order of ranks, one after another, are
the whole. Files are mapped, not read: what a rank does not ask for does not leave the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from opd_ext.checkpoints.layout import CheckpointError, shard_files
from opd_ext.errors import in_brief


class Sharded:
    """One tensor as the ranks hold it.

    Attributes:
        shape: of the whole.
        dim: along which it is cut; None: every rank has it whole.
    """

    def __init__(self, name: str, parts: Sequence[Tensor], shape: Sequence[int], dim: int | None):
        self.name, self.shape, self.dim = name, tuple(shape), dim
        self._parts: list[Tensor] = []
        rows = 0
        for part in parts:  # what comes after the last row belongs to a replica
            if self._parts and (dim is None or rows == self.shape[dim]):
                break
            self._parts.append(part)
            rows += 0 if dim is None else part.shape[dim]
        whole = self._parts[0].shape == torch.Size(self.shape) if dim is None else rows == self.shape[dim]
        if not whole:
            had = tuple(self._parts[0].shape) if dim is None else f"{rows} of {self.shape[dim]} rows"
            raise CheckpointError(f"'{name}' is incomplete in the checkpoint: {had}, its shape is {self.shape}.")

    @classmethod
    def of(cls, name: str, parts: Sequence[Tensor]) -> Sharded:
        """From what the ranks saved: DTensors know how they were cut, a plain tensor is whole on every rank."""
        first = parts[0]
        if not isinstance(first, DTensor):
            return cls(name, parts, first.shape, None)
        cut = [placement.dim for placement in first.placements if isinstance(placement, Shard)]
        if len(cut) > 1 or not all(p.is_replicate() or isinstance(p, Shard) for p in first.placements):
            raise CheckpointError(f"'{name}' is cut in a way that FSDP2 does not: {first.placements}.")
        return cls(
            name, [part.to_local() for part in parts if isinstance(part, DTensor)], first.shape, cut[0] if cut else None
        )

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` along ``dim``, which must be there."""
        assert self.dim is not None
        pieces, first = [], 0
        for part in self._parts:
            low, high = max(start - first, 0), min(stop - first, part.shape[self.dim])
            if low < high:
                pieces.append(part.narrow(self.dim, low, high - low))
            first += part.shape[self.dim]
        if not pieces:
            return self._parts[0].narrow(self.dim, 0, 0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def whole(self) -> Tensor:
        return self._parts[0] if self.dim is None else self.rows(0, self.shape[self.dim])

    def like(self, target: Tensor) -> Tensor:
        """This rank's part of it, where ``target`` (a DTensor, or a plain tensor) is to hold it.

        Raises:
            CheckpointError: the shapes differ.
        """
        if tuple(target.shape) != self.shape:
            raise CheckpointError(
                f"'{self.name}' has shape {self.shape} in the checkpoint and {tuple(target.shape)} in the model: "
                "resume with the model that was trained."
            )
        if not isinstance(target, DTensor):
            return self.whole()
        where = [(axis, p.dim) for axis, p in enumerate(target.placements) if isinstance(p, Shard)]
        if not where:
            return self.whole()
        ((axis, dim),) = where
        if self.dim != dim:  # of a world of one rank that kept it whole, say
            return Sharded(self.name, [self.whole()], self.shape, dim).like(target)
        rank, ranks = target.device_mesh.get_local_rank(axis), target.device_mesh.size(axis)
        rows = self.shape[dim]
        chunk = -(-rows // ranks)
        return self.rows(min(rank * chunk, rows), min((rank + 1) * chunk, rows))


class Shards(Mapping[str, Sharded]):
    """The weights in ``folder``, by name, however many ranks wrote them.

    Args:
        kind: how the names of their files begin, see :mod:`opd_ext.checkpoints.layout`.
        like: name -> (shape, dim) of shards that do not say so themselves: those of a teacher are plain tensors.
    """

    def __init__(self, folder: Path, kind: str, like: Mapping[str, tuple[Sequence[int], int | None]] | None = None):
        self.world_size, files = shard_files(folder, kind)
        self._ranks = [load(path) for path in files.values()]
        self._like = like

    def __getitem__(self, name: str) -> Sharded:
        parts = [rank[name] for rank in self._ranks]
        if self._like is None:
            return Sharded.of(name, parts)
        return Sharded(name, parts, *self._like[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks[0])

    def __len__(self) -> int:
        return len(self._ranks[0])


def load(path: Path) -> dict[str, Any]:
    """Tensors and plain values of a shard file, mapped into memory; code in it is not run.

    Raises:
        CheckpointError: it is cut off, or no shard.
    """
    log = logging.getLogger("torch.distributed.device_mesh")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of meshes without process groups, which nobody will use
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and torch each raise what they like
        raise CheckpointError(f"{path} cannot be read: {in_brief(error)}") from error
    finally:
        log.setLevel(level)


def cut_of(target: Tensor) -> tuple[tuple[int, ...], int | None]:
    """Shape of the whole, and the dimension along which ranks share it (None: they do not)."""
    dims = [p.dim for p in target.placements if isinstance(p, Shard)] if isinstance(target, DTensor) else []
    return tuple(target.shape), dims[0] if dims else None
