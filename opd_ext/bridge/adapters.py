# SPDX-License-Identifier: Apache-2.0
"""A teacher of a LoRA student, on the student's own base: a copy of its adapter, which is in place while it teaches.

The copy is no parameter of any module: no optimiser, no gradient and no weight sync meets it. For a pass of the teacher
the sharded tensors of the student's adapter hold the copy's values, and afterwards their own again, bit by bit. So a
pass is the student's own in everything but these values, and a second base is never in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opd_ext.teacher.kinds import TeacherOutput
from opd_ext.teacher.weights import copy_shards

if TYPE_CHECKING:
    from opd_ext.bridge.engine import OPDEngine


class TeacherAdapter:
    """The student's base with an adapter of the teacher's own (:class:`opd_ext.teacher.kinds.Engine`).

    Args:
        student: an engine that trains a LoRA adapter, as it was before its first step.
        moves: whether the teacher ever moves. One that does not is the base, since an adapter begins with B = 0, and
            holds nothing.

    Attributes:
        weights: name -> the teacher's value of each trained tensor, cut over the ranks as the student's is. In float32
            or wider, so that a moving average of a bfloat16 adapter does not lose its small changes.
    """

    def __init__(self, student: OPDEngine, moves: bool):
        self.student = student
        self.weights: dict[str, Tensor] = {}
        if moves:
            self.weights = {name: _widened(tensor) for name, tensor in trained_tensors(student.module).items()}

    def teacher_output(self, data: Any, adapter: bool = True) -> TeacherOutput:
        """The base with this adapter on the teacher's sequences; without its ``adapter`` the initial model."""
        if not (adapter and self.weights):
            return self.student.teacher_output(data, adapter=False)
        with self.in_place():
            return self.student.teacher_output(data)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the student's module has this adapter; it is for passes without a gradient."""
        own = local_parts(trained_tensors(self.student.module))
        kept = {name: tensor.clone() for name, tensor in own.items()}
        copy_shards(local_parts(self.weights), own)
        try:
            yield
        finally:
            _drop_gathered(self.student.module)  # else the student's next pass would have the teacher's
            copy_shards(kept, own)


def trained_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """What an FSDP2 module trains, by name (aliases): of a LoRA student its adapter and nothing else.

    Its next pass gathers them anew.
    """
    _drop_gathered(module)
    return {name: tensor.detach() for name, tensor in module.named_parameters() if tensor.requires_grad}


def _drop_gathered(module: torch.nn.Module) -> None:
    """Leave the sharded tensors alone: with ``reshard_after_forward=false`` whole ones outlive a pass."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of each tensor (aliases)."""
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(torch.float32, tensor.dtype), copy=True)
