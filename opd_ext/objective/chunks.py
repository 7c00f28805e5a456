# SPDX-License-Identifier: Apache-2.0
"""The pass over rows that both modes of the head share: logits of a chunk, terms of a block, their gradient.

Rows go through the matrix products in *chunks* and through softmax and divergence in smaller *blocks*,
because the former want many rows and the latter hold several [rows, V] intermediates. The gradient of a block
for its logits overwrites these logits; two more products turn a chunk of it into ``d_hidden`` and
``d_weight``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd_ext.divergence.divergences import clipped_fraction, entropy, log_probs

# Bytes of one float32 logits buffer. Chunks: few enough on CPU that the buffers stay a few per cent of a
# dense loss; bounded by chunk_size alone on accelerators, where small products waste the device. Blocks: a
# few of them must fit a cache.
_CHUNK_BYTES = {"cpu": 32 << 20}
_BLOCK_BYTES = {"cpu": 4 << 20}
_BLOCK_BYTES_ACCELERATOR = 64 << 20
# Rows of d_weight per product when its accumulator is wider than the operands: bounds the temporary product.
_WEIGHT_SLICE = 16384


class Inputs(NamedTuple):
    """hidden [N, H], weight [V, H], teacher_hidden [N, Ht], teacher_weight [V, Ht], labels [N]."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    labels: Tensor | None


class Result(NamedTuple):
    """One [N] tensor per output, and the gradients that were asked for."""

    values: dict[str, Tensor]
    d_hidden: Tensor | None
    d_weight: Tensor | None


@dataclasses.dataclass(frozen=True)
class Terms:
    """What to compute from the logits of a block; frozen, so that its compiled form can be cached."""

    outputs: tuple[str, ...]
    divergence: Callable[..., Tensor] | None
    kind: str | None
    kind_args: tuple[tuple[str, Any], ...]
    temperature: float

    def needs_teacher(self) -> bool:
        return any(not name.startswith("student") for name in self.outputs)

    def restricted_to(self, names: tuple[str, ...]) -> Terms:
        return dataclasses.replace(self, outputs=names)

    def __call__(
        self, z: Tensor, w: Tensor | None, labels: Tensor | None, differentiable: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        """Logits [C, V] of both sides and labels [C] -> one [C] tensor per output."""
        return tuple(self._term(name, z if name in differentiable else z.detach(), w, labels) for name in self.outputs)

    def _term(self, name: str, z: Tensor, w: Tensor | None, labels: Tensor | None) -> Tensor:
        if name == "divergence":
            return self.divergence(z, w, **dict(self.kind_args))
        if name == "clipped":
            options = {name: value for name, value in self.kind_args if name != "entry_clip_mode"}
            return clipped_fraction(z, w, self.kind.removeprefix("topk_"), **options)
        logits = z if name.startswith("student") else w
        if name.endswith("entropy"):
            return entropy(logits, self.temperature)
        return log_probs(logits, self.temperature).gather(-1, labels[:, None])[:, 0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to run: rows per chunk, dtype of the products, and which gradients exist."""

    chunk_size: int
    matmul_dtype: torch.dtype
    grad_hidden: bool
    grad_weight: bool


class _Projection:
    """Logits of one side, chunk by chunk, in one buffer: on CPU fresh pages cost more than the softmax."""

    def __init__(self, hidden: Tensor, weight: Tensor, dtype: torch.dtype, rows: int):
        self.hidden = hidden
        self.weight = weight.to(dtype)
        self.buffer = self.weight.new_empty(min(rows, hidden.shape[0]), weight.shape[0])

    def rows(self, chunk: slice) -> Tensor:
        return self.hidden[chunk].to(self.weight.dtype)

    def logits(self, chunk: slice) -> Tensor:
        return torch.mm(self.rows(chunk), self.weight.T, out=self.buffer[: chunk.stop - chunk.start])


def run_chunks(plan: Plan, terms: Terms, inputs: Inputs, upstream: dict[str, Tensor]) -> Result:
    """Values of ``terms`` for all rows and, where ``upstream`` [N] is given, d_hidden and d_weight."""
    hidden, weight = inputs.hidden, inputs.weight
    n, vocabulary, device = hidden.shape[0], weight.shape[0], hidden.device
    wide = torch.float64 if plan.matmul_dtype == torch.float64 else torch.float32
    values = {name: torch.empty(n, dtype=wide, device=device) for name in terms.outputs}
    d_hidden = torch.zeros_like(hidden) if upstream and plan.grad_hidden else None
    d_weight = torch.zeros_like(weight, dtype=wide) if upstream and plan.grad_weight else None
    chunk_rows, block_rows = _rows(plan.chunk_size, vocabulary, device.type)
    student, teacher = _Projection(hidden, weight, plan.matmul_dtype, chunk_rows), None
    if terms.needs_teacher():
        teacher = _Projection(inputs.teacher_hidden, inputs.teacher_weight, plan.matmul_dtype, chunk_rows)
    active = _active_blocks(upstream, block_rows, n)
    compute = _compiled(terms) if device.type == "cuda" else terms

    with torch.autocast(device.type, enabled=False):
        for chunk in _slices(0, n, chunk_rows):
            z, w = student.logits(chunk), teacher.logits(chunk) if teacher else None
            chunk_active = False
            for block in _slices(chunk.start, chunk.stop, block_rows):
                local = slice(block.start - chunk.start, block.stop - chunk.start)
                labels = None if inputs.labels is None else inputs.labels[block]
                block_active = bool(upstream) and active[block.start // block_rows]
                block_upstream = {name: g[block] for name, g in upstream.items()} if block_active else {}
                block_values, d_logits = _block(
                    compute, terms.outputs, z[local], None if w is None else w[local], labels, block_upstream
                )
                for name, value in zip(terms.outputs, block_values, strict=True):
                    values[name][block] = value
                if upstream:
                    z[local] = d_logits if block_active else 0
                    chunk_active |= block_active
            if chunk_active and d_hidden is not None:
                d_hidden[chunk] = z @ student.weight
            if chunk_active and d_weight is not None:
                _accumulate(d_weight, z, student.rows(chunk))
    return Result(values, d_hidden, None if d_weight is None else d_weight.to(weight.dtype))


def _block(
    compute: Callable[..., tuple[Tensor, ...]],
    outputs: tuple[str, ...],
    z: Tensor,
    w: Tensor | None,
    labels: Tensor | None,
    upstream: dict[str, Tensor],
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Values of one block [C] and, for a non-empty ``upstream``, the gradient for its logits [C, V]."""
    if not upstream:
        with torch.no_grad():
            return compute(z, w, labels, ()), None
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        values = compute(z, w, labels, tuple(upstream))
        chosen = [values[outputs.index(name)] for name in upstream]
        weights = [g.to(value.dtype) for g, value in zip(upstream.values(), chosen, strict=True)]
        (d_logits,) = torch.autograd.grad(chosen, z, weights)
    return tuple(value.detach() for value in values), d_logits


@functools.lru_cache(maxsize=32)
def _compiled(terms: Terms) -> Callable[..., tuple[Tensor, ...]]:
    """Fuses softmax, divergence and their backward into few kernels, for any number of rows."""

    def compute(*args: Any) -> tuple[Tensor, ...]:
        return terms(*args)

    # Dynamo counts recompilations per code object; with a shared one, a few divergences reach its limit.
    compute.__code__ = compute.__code__.replace(co_name=f"head_terms_{'_'.join(terms.outputs)}")
    return torch.compile(compute, dynamic=True)


def _accumulate(d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """d_weight [V, H] += d_logits^T [V, C] hidden [C, H]; half-precision products are summed in float32."""
    if d_weight.dtype == d_logits.dtype:
        d_weight.addmm_(d_logits.T, hidden)
        return
    for part in _slices(0, d_weight.shape[0], _WEIGHT_SLICE):
        d_weight[part] += d_logits[:, part].T @ hidden


def _rows(chunk_size: int, vocabulary: int, device_type: str) -> tuple[int, int]:
    """Rows per chunk and per block; a chunk holds whole blocks."""
    row_bytes = 4 * vocabulary
    chunk = min(chunk_size, max(1, _CHUNK_BYTES.get(device_type, chunk_size * row_bytes) // row_bytes))
    block = min(chunk, max(1, _BLOCK_BYTES.get(device_type, _BLOCK_BYTES_ACCELERATOR) // row_bytes))
    return chunk - chunk % block, block


def _active_blocks(upstream: dict[str, Tensor], block_rows: int, n: int) -> list[bool]:
    """Which blocks have a row with a non-zero upstream gradient; one transfer to the host per call."""
    if not upstream or n == 0:
        return []
    rows = torch.stack([g != 0 for g in upstream.values()]).any(dim=0)
    padded = torch.nn.functional.pad(rows, (0, -n % block_rows))
    return padded.view(-1, block_rows).any(dim=1).tolist()


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))
