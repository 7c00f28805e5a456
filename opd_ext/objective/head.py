# SPDX-License-Identifier: Apache-2.0
"""Chunked LM head: from last hidden states to per-token terms and their gradients, without an [N, V] tensor.

A dense loss keeps several [N, V] float32 tensors for its backward pass (about 14 GiB for 8k tokens of a 152k
vocabulary). Here rows pass through the head in *chunks* (sized for the matrix products) and through softmax and
divergence in smaller *blocks* (sized for caches and for autograd's intermediates). The gradient of a block with
respect to its logits overwrites these logits; two more products turn a chunk of it into ``d_hidden`` and ``d_weight``.

The same pass (:func:`_run`) serves two modes. ``forward`` forms the gradients at once, which is possible when the
weight of each token is known beforehand; ``recompute`` returns differentiable per-token terms for a loss that is
computed later, and repeats the chunk in the backward pass. Any registered divergence works in both: its derivative is
taken by autograd, one block at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd_ext.objective.divergence import entropy, get_divergence, log_probs

# Bytes of one float32 logits buffer. Chunks: small enough on CPU that the buffers stay a few per cent of a dense loss;
# bounded by chunk_size alone on accelerators, where small products waste the device. Blocks: a few must fit a cache.
_CHUNK_BYTES = {"cpu": 32 << 20}
_BLOCK_BYTES = {"cpu": 2 << 20}
_BLOCK_BYTES_ACCELERATOR = 64 << 20
# Columns of d_weight per product when its accumulator is wider than the operands: bounds the temporary product.
_WEIGHT_SLICE = 16384

_DIFFERENTIABLE = ("divergence", "student_log_prob", "student_entropy")


class HeadOutput(NamedTuple):
    """Per-token terms [N] in float32 (float64 for float64 inputs); ``None`` where the inputs do not define one.

    ``loss`` is ``sum(token_weight * divergence)``, a differentiable scalar. In mode ``forward`` the other fields are
    detached; in mode ``recompute`` ``divergence``, ``student_log_prob`` and ``student_entropy`` are differentiable.
    Log-probs are those of ``labels``; entropies are in nats.
    """

    loss: Tensor | None
    divergence: Tensor | None
    student_log_prob: Tensor | None
    student_entropy: Tensor | None
    teacher_log_prob: Tensor | None
    teacher_entropy: Tensor | None


def chunked_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weight: Tensor,
    kind: str = "reverse_kl",
    chunk_size: int = 1024,
    **kind_args: Any,
) -> tuple[Tensor, Tensor]:
    """``sum_n token_weight[n] * D(softmax(W h_n), softmax(W_T h_T,n))`` with its gradient formed in the forward pass.

    Args:
        hidden: student's last hidden states [N, H]; the row that predicts response token j.
        weight: student's LM head [V, H]; may be frozen, or tied to the embedding.
        teacher_hidden, teacher_weight: the teacher's [N, Ht] and [V, Ht], constants.
        token_weight: [N], constant; rows with weight 0 add nothing to the loss or to any gradient.
        kind, kind_args: a registered divergence and its keyword arguments.
        chunk_size: upper bound on the rows whose logits exist at once.

    Returns:
        The scalar loss and the detached per-token divergence [N].

    Raises:
        ValueError: for shapes that do not fit together or an unknown ``kind``.
    """
    out = divergence_head(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        token_weight=token_weight,
        kind=kind,
        kind_args=kind_args,
        chunk_size=chunk_size,
        with_entropy=False,
    )
    return out.loss, out.divergence


def divergence_head(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    token_weight: Tensor | None = None,
    kind: str = "reverse_kl",
    kind_args: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    mode: Literal["forward", "recompute"] = "forward",
    with_entropy: bool = True,
    matmul_dtype: torch.dtype | None = None,
) -> HeadOutput:
    """All per-token terms of one micro-batch; see :class:`HeadOutput` and the module's docstring.

    Args:
        hidden, weight, teacher_hidden, teacher_weight: as in :func:`chunked_divergence`. Without a teacher only the
            policy terms are computed (mode ``recompute``). Mode ``recompute`` reads all four again in backward.
        labels: ids of the predicted tokens [N], int64; None for no log-probs.
        token_weight: [N]; None for no loss in mode ``recompute``.
        kind, kind_args: a registered divergence and its keyword arguments (hashable), which may hold a
            ``temperature`` of its own: the loss temperature, independent of the next one.
        temperature: divides the logits for log-probs and entropies only (the rollout temperature).
        chunk_size: upper bound on the rows whose logits exist at once.
        mode: ``forward`` or ``recompute``.
        with_entropy: whether to compute the entropies.
        matmul_dtype: dtype of the products, ``hidden.dtype`` by default; float32 gives an fp32 head at the price of
            one float32 copy of the weights. What follows the product is float32 in any case.

    Raises:
        ValueError: for shapes that do not fit together, an unknown ``kind`` or ``mode``, or a mode that cannot be used
            with what was passed.
    """
    _check(hidden, weight, teacher_hidden, teacher_weight, labels, token_weight, chunk_size, mode)
    terms = _Terms(
        outputs=_outputs(teacher_hidden is not None, labels is not None, with_entropy),
        divergence=None if teacher_hidden is None else get_divergence(kind),
        kind_args=tuple(sorted((kind_args or {}).items())),
        temperature=float(temperature),
    )
    plan = _Plan(
        terms=terms,
        chunk_size=chunk_size,
        matmul_dtype=matmul_dtype or hidden.dtype,
        grad_hidden=torch.is_grad_enabled() and hidden.requires_grad,
        grad_weight=torch.is_grad_enabled() and weight.requires_grad,
    )
    inputs = (hidden, weight, *map(_detached, (teacher_hidden, teacher_weight, labels, token_weight)))
    if mode == "forward":
        loss, *values = _GradientInForward.apply(plan, *inputs)
        return HeadOutput(loss=loss, **_by_name(terms.outputs, values))
    values = _by_name(terms.outputs, _RecomputeInBackward.apply(plan, *inputs[:-1]))
    return HeadOutput(loss=_weighted_sum(values["divergence"], inputs[-1]), **values)


@dataclasses.dataclass(frozen=True)
class _Terms:
    """What to compute from the logits of a block; frozen, so that its compiled form can be cached."""

    outputs: tuple[str, ...]
    divergence: Callable[..., Tensor] | None
    kind_args: tuple[tuple[str, Any], ...]
    temperature: float

    def needs_teacher(self) -> bool:
        return any(name not in ("student_log_prob", "student_entropy") for name in self.outputs)

    def restricted_to(self, names: tuple[str, ...]) -> _Terms:
        return dataclasses.replace(self, outputs=names)

    def __call__(
        self, z: Tensor, w: Tensor | None, labels: Tensor | None, differentiable: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        """Logits [C, V] of both sides and labels [C] -> one [C] tensor per output."""
        return tuple(self._term(name, z if name in differentiable else z.detach(), w, labels) for name in self.outputs)

    def _term(self, name: str, z: Tensor, w: Tensor | None, labels: Tensor | None) -> Tensor:
        if name == "divergence":
            return self.divergence(z, w, **dict(self.kind_args))
        logits = z if name.startswith("student") else w
        if name.endswith("entropy"):
            return entropy(logits, self.temperature)
        return log_probs(logits, self.temperature).gather(-1, labels[:, None])[:, 0]


@dataclasses.dataclass(frozen=True)
class _Plan:
    terms: _Terms
    chunk_size: int
    matmul_dtype: torch.dtype
    grad_hidden: bool
    grad_weight: bool


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, hidden, weight, teacher_hidden, teacher_weight, labels, token_weight):
        ctx.set_materialize_grads(False)
        upstream = {"divergence": token_weight} if plan.grad_hidden or plan.grad_weight else {}
        result = _run(plan, plan.terms, hidden, weight, teacher_hidden, teacher_weight, labels, upstream)
        ctx.save_for_backward(result.d_hidden, result.d_weight)
        values = tuple(result.values[name] for name in plan.terms.outputs)
        ctx.mark_non_differentiable(*values)
        return _weighted_sum(result.values["divergence"], token_weight), *values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 7
        d_hidden, d_weight = (None if d is None else d * grad_loss.to(d.dtype) for d in ctx.saved_tensors)
        return None, d_hidden, d_weight, None, None, None, None


class _RecomputeInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, hidden, weight, teacher_hidden, teacher_weight, labels):
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight, labels)
        values = _run(plan, plan.terms, hidden, weight, teacher_hidden, teacher_weight, labels, {}).values
        ctx.mark_non_differentiable(*(value for name, value in values.items() if name not in _DIFFERENTIABLE))
        return tuple(values[name] for name in plan.terms.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        upstream = {name: g for name, g in zip(ctx.plan.terms.outputs, grads, strict=True) if g is not None}
        if not upstream:
            return (None,) * 6
        terms = ctx.plan.terms.restricted_to(tuple(upstream))
        result = _run(ctx.plan, terms, *ctx.saved_tensors, upstream)
        return None, result.d_hidden, result.d_weight, None, None, None


class _Result(NamedTuple):
    values: dict[str, Tensor]
    d_hidden: Tensor | None
    d_weight: Tensor | None


def _run(
    plan: _Plan,
    terms: _Terms,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None,
    upstream: dict[str, Tensor],
) -> _Result:
    """One pass over all rows: the per-token values and, where ``upstream`` [N] is given, d_hidden and d_weight."""
    n, vocabulary, device = hidden.shape[0], weight.shape[0], hidden.device
    wide = torch.float64 if plan.matmul_dtype == torch.float64 else torch.float32
    values = {name: torch.empty(n, dtype=wide, device=device) for name in terms.outputs}
    d_hidden = torch.zeros_like(hidden) if upstream and plan.grad_hidden else None
    d_weight = torch.zeros_like(weight, dtype=wide) if upstream and plan.grad_weight else None
    chunk_rows, block_rows = _rows(plan.chunk_size, vocabulary, device.type)
    weight_m = weight.to(plan.matmul_dtype)
    logits = _LogitsBuffer(weight_m, min(chunk_rows, n))
    teacher_logits = None
    if terms.needs_teacher():
        teacher_logits = _LogitsBuffer(teacher_weight.to(plan.matmul_dtype), min(chunk_rows, n))
    active = _active_blocks(upstream, block_rows, n)
    compute = _compiled(terms) if device.type == "cuda" else terms

    with torch.autocast(device.type, enabled=False):
        for chunk in _slices(0, n, chunk_rows):
            h = hidden[chunk].to(plan.matmul_dtype)
            z = logits.fill(h)
            w = teacher_logits.fill(teacher_hidden[chunk].to(plan.matmul_dtype)) if teacher_logits else None
            chunk_active = False
            for block in _slices(chunk.start, chunk.stop, block_rows):
                local = slice(block.start - chunk.start, block.stop - chunk.start)
                args = (z[local], None if w is None else w[local], None if labels is None else labels[block])
                is_active = bool(upstream) and active[block.start // block_rows]
                block_upstream = {name: g[block] for name, g in upstream.items()} if is_active else {}
                block_values, d_logits = _block(compute, terms.outputs, args, block_upstream)
                for name, value in zip(terms.outputs, block_values, strict=True):
                    values[name][block] = value
                if upstream:
                    z[local] = d_logits if is_active else 0
                    chunk_active |= is_active
            if chunk_active and d_hidden is not None:
                d_hidden[chunk] = z @ weight_m
            if chunk_active and d_weight is not None:
                _accumulate(d_weight, z, h)
    return _Result(values, d_hidden, None if d_weight is None else d_weight.to(weight.dtype))


def _block(
    compute: Callable[..., tuple[Tensor, ...]],
    outputs: tuple[str, ...],
    args: tuple[Tensor, Tensor | None, Tensor | None],
    upstream: dict[str, Tensor],
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Values of one block [C] and, for a non-empty ``upstream``, the gradient with respect to its logits [C, V]."""
    z, w, labels = args
    if not upstream:
        with torch.no_grad():
            return compute(z, w, labels, ()), None
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        values = compute(z, w, labels, tuple(upstream))
        by_name = _by_name(outputs, values)
        chosen = [by_name[name] for name in upstream]
        weights = [g.to(by_name[name].dtype) for name, g in upstream.items()]
        (d_logits,) = torch.autograd.grad(chosen, z, weights)
    return tuple(value.detach() for value in values), d_logits


@functools.lru_cache(maxsize=32)
def _compiled(terms: _Terms) -> Callable[..., tuple[Tensor, ...]]:
    """Fuses softmax, divergence and their backward into few kernels; rows are dynamic, the last block is shorter."""

    def compute(*args: Any) -> tuple[Tensor, ...]:
        return terms(*args)

    # Dynamo counts recompilations per code object: with a shared one, a few divergences would exhaust its limit.
    compute.__code__ = compute.__code__.replace(co_name=f"head_terms_{'_'.join(terms.outputs)}")
    return torch.compile(compute, dynamic=True)


class _LogitsBuffer:
    """One reused [rows, V] buffer: fresh pages for each chunk cost more on CPU than the softmax over them."""

    def __init__(self, weight: Tensor, rows: int):
        self.weight = weight
        self.buffer = weight.new_empty(rows, weight.shape[0])

    def fill(self, hidden: Tensor) -> Tensor:
        return torch.mm(hidden, self.weight.T, out=self.buffer[: hidden.shape[0]])


def _accumulate(d_weight: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """d_weight [V, H] += d_logits^T [V, C] hidden [C, H]; partial products of half precision are summed in float32."""
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
    """Which blocks have a row with a non-zero upstream gradient; one transfer to the host for the whole call."""
    if not upstream or n == 0:
        return []
    rows = torch.stack([g != 0 for g in upstream.values()]).any(dim=0)
    padded = torch.nn.functional.pad(rows, (0, -n % block_rows))
    return padded.view(-1, block_rows).any(dim=1).tolist()


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


def _weighted_sum(divergence: Tensor | None, token_weight: Tensor | None) -> Tensor | None:
    if divergence is None or token_weight is None:
        return None
    return (token_weight.to(divergence.dtype) * divergence).sum()


def _outputs(teacher: bool, labels: bool, with_entropy: bool) -> tuple[str, ...]:
    wanted = {
        "divergence": teacher,
        "student_log_prob": labels,
        "student_entropy": with_entropy,
        "teacher_log_prob": teacher and labels,
        "teacher_entropy": teacher and with_entropy,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def _by_name(outputs: tuple[str, ...], values: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    return {name: None for name in HeadOutput._fields[1:]} | dict(zip(outputs, values, strict=True))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _check(hidden, weight, teacher_hidden, teacher_weight, labels, token_weight, chunk_size, mode) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 but is {chunk_size}.")
    if mode not in ("forward", "recompute"):
        raise ValueError(f"Unknown mode '{mode}'; allowed: forward, recompute.")
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("Pass both teacher_hidden and teacher_weight, or neither.")
    if mode == "forward" and (teacher_hidden is None or token_weight is None):
        raise ValueError("Mode 'forward' needs a teacher and token_weight; use mode='recompute' for policy terms alone.")
    for name, h, w in (("hidden", hidden, weight), ("teacher_hidden", teacher_hidden, teacher_weight)):
        if h is not None and (h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1]):
            raise ValueError(f"{name} must be [N, H] and its weight [V, H]; got {tuple(h.shape)}, {tuple(w.shape)}.")
    if teacher_hidden is not None and teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"Student and teacher heads must share one vocabulary but have {weight.shape[0]} and "
            f"{teacher_weight.shape[0]} rows; slice padding rows off the larger one."
        )
    for name, per_row in (("teacher_hidden", teacher_hidden), ("labels", labels), ("token_weight", token_weight)):
        if per_row is not None and per_row.shape[0] != hidden.shape[0]:
            raise ValueError(f"{name} has {per_row.shape[0]} rows but hidden has {hidden.shape[0]}; align them first.")
