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
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd_ext.divergence.divergences import clipped_fraction, entropy, log_probs
from opd_ext.divergence.known import TopK, known_clipped_fraction, known_topk_divergence
from opd_ext.errors import present
from opd_ext.objective.products import is_widening, project

Output = Literal["divergence", "student_log_prob", "student_entropy", "teacher_log_prob", "teacher_entropy", "clipped"]

# Bytes of one float32 logits buffer. Chunks: few enough on CPU that the buffers stay a few per cent of a
# dense loss; bounded by chunk_size alone on accelerators, where small products waste the device. Blocks: a
# few of them must fit a cache.
_CHUNK_BYTES = {"cpu": 32 << 20}
_BLOCK_BYTES = {"cpu": 4 << 20}
_BLOCK_BYTES_ACCELERATOR = 64 << 20
# Rows of d_weight per product when its accumulator is wider than the operands: bounds the temporary product.
_WEIGHT_SLICE = 16384


class Side(NamedTuple):
    """What student or teacher bring along: last hidden states and the vocabulary projection that belongs to them."""

    hidden: Float[Tensor, "N H"]
    weight: Float[Tensor, "V H"]

    @classmethod
    def given(cls, hidden: Tensor | None, weight: Tensor | None) -> Side | None:
        """The teacher's, which may be absent; ``ValueError`` for half of it."""
        if hidden is None and weight is None:
            return None
        both = "Pass both teacher_hidden and teacher_weight, or neither."
        return cls(present(hidden, both), present(weight, both))


class Inputs(NamedTuple):
    """Rows to compare, and the ids whose log-probs are wanted; of a teacher its hidden states, or what is known."""

    student: Side
    teacher: Side | None
    labels: Int[Tensor, " N"] | None
    known: TopK | None = None

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        labels: Tensor | None,
        ids: Tensor | None,
        log_probs: Tensor | None,
    ) -> Inputs:
        """From the flat list that autograd passes on."""
        known = None if ids is None or log_probs is None else TopK(ids, log_probs)
        return cls(Side(hidden, weight), Side.given(teacher_hidden, teacher_weight), labels, known)

    def flat(self) -> tuple[Tensor | None, ...]:
        """For autograd, which sees no tensor inside a tuple."""
        return *self.student, *(self.teacher or (None, None)), self.labels, *(self.known or (None, None))


class Result(NamedTuple):
    """One [N] tensor per output, and the gradients that were asked for; that of the weight is as wide as its sum."""

    values: dict[Output, Tensor]
    d_hidden: Float[Tensor, "N H"] | None
    d_weight: Float[Tensor, "V H"] | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A registered divergence with its options; frozen and hashable, as a part of :class:`Computation`."""

    kind: str
    divergence: Callable[..., Tensor]
    options: tuple[tuple[str, Any], ...]

    @property
    def caps_entries(self) -> bool:
        """Whether a bound takes vocabulary terms their gradient."""
        options = dict(self.options)
        return options.get("entry_clip") is not None and options.get("entry_clip_mode", "vocab_max") == "vocab_max"

    def __call__(self, z: Float[Tensor, "C V"], w: Float[Tensor, "C V"]) -> Float[Tensor, " C"]:
        return self.divergence(z, w, **dict(self.options))

    def clipped(self, z: Float[Tensor, "C V"], w: Float[Tensor, "C V"]) -> Float[Tensor, " C"]:
        """Share of vocabulary terms that ``entry_clip`` caps."""
        options = {name: value for name, value in self.options if name != "entry_clip_mode"}
        return clipped_fraction(z, w, self.kind.removeprefix("topk_"), **options)

    def of_known(self, z: Float[Tensor, "C V"], known: TopK, name: Output) -> Float[Tensor, " C"]:
        """The output ``name``, divergence or clipped, against a teacher of whom the likeliest tokens are known."""
        k = dict(self.options)["k"]
        left_out = ("k", "support") if name == "divergence" else ("k", "support", "entry_clip_mode")
        options = {option: value for option, value in self.options if option not in left_out}
        measure = known_topk_divergence if name == "divergence" else known_clipped_fraction
        return measure(z, TopK(known.ids[:, :k], known.log_probs[:, :k]), self.kind.removeprefix("topk_"), **options)


@dataclasses.dataclass(frozen=True)
class Computation:
    """What to compute from the logits of a block; frozen, so that its compiled form can be cached."""

    outputs: tuple[Output, ...]
    comparison: Comparison | None
    temperature: float

    def needs_teacher(self) -> bool:
        return any(not name.startswith("student") for name in self.outputs)

    def restricted_to(self, names: tuple[Output, ...]) -> Computation:
        return dataclasses.replace(self, outputs=names)

    def __call__(
        self,
        z: Float[Tensor, "C V"],
        w: Float[Tensor, "C VT"] | None,
        labels: Int[Tensor, " C"] | None,
        known: TopK | None,
        differentiable: tuple[Output, ...],
    ) -> tuple[Float[Tensor, " C"], ...]:
        """Logits of both sides and labels -> one tensor per output; ``known`` stands for the teacher's logits.

        Where one head is taller, distributions are compared over the rows that both have; log-probs and entropies are
        those of the whole head.
        """
        return tuple(
            self._term(name, z if name in differentiable else z.detach(), w, labels, known) for name in self.outputs
        )

    def _term(self, name: Output, z: Tensor, w: Tensor | None, labels: Tensor | None, known: TopK | None) -> Tensor:
        if name == "divergence" or name == "clipped":
            comparison = present(self.comparison, f"The output {name} needs a divergence.")
            if known is not None:
                return comparison.of_known(z, known, name)
            teacher = present(w, f"The output {name} needs a teacher.")
            common = min(z.shape[-1], teacher.shape[-1])  # rows beyond are padding of one of the heads
            z, teacher = z[..., :common], teacher[..., :common]
            return comparison(z, teacher) if name == "divergence" else comparison.clipped(z, teacher)
        logits = z if name.startswith("student") else present(w, f"The output {name} needs a teacher.")
        if name.endswith("entropy"):
            return entropy(logits, self.temperature)
        chosen = present(labels, f"The output {name} needs labels.")
        # An id that this head does not have gets a number without meaning; the objective distils no such token.
        chosen = chosen.clamp(max=logits.shape[-1] - 1)
        return log_probs(logits, self.temperature).gather(-1, chosen[:, None])[:, 0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to run: rows per chunk, dtype of the products, and which gradients exist."""

    chunk_size: int
    matmul_dtype: torch.dtype
    grad_hidden: bool
    grad_weight: bool


class _Projection:
    """Logits of one side, chunk by chunk, in one buffer: on CPU fresh pages cost more than the softmax."""

    def __init__(self, side: Side, dtype: torch.dtype, rows: int) -> None:
        self.hidden, self.dtype = side.hidden, dtype
        # A float32 copy of the weights is made once, and where the device needs none only when a gradient asks.
        widening = is_widening(side.hidden.device.type, side.hidden.dtype, side.weight.dtype, dtype)
        self.operand = side.weight if widening else side.weight.to(dtype)
        self.buffer = self.operand.new_empty(min(rows, len(self.hidden)), len(self.operand), dtype=dtype)

    @functools.cached_property
    def weight(self) -> Float[Tensor, "V H"]:
        return self.operand.to(self.dtype)

    def rows(self, chunk: slice) -> Float[Tensor, "C H"]:
        return self.hidden[chunk].to(self.dtype)

    def logits(self, chunk: slice) -> Float[Tensor, "C V"]:
        return project(self.hidden[chunk], self.operand, self.dtype, out=self.buffer[: chunk.stop - chunk.start])


def run_chunks(
    plan: Plan,
    terms: Computation,
    inputs: Inputs,
    upstream: dict[Output, Float[Tensor, " N"]],
    total: Float[Tensor, "V H"] | None = None,
) -> Result:
    """Values of ``terms`` for all rows and, where ``upstream`` [N] is given, d_hidden and d_weight.

    ``total``, in the dtype of :func:`gradient_dtype`, is what d_weight is added to, in place.
    """
    hidden, weight = inputs.student
    n, vocabulary, device = hidden.shape[0], weight.shape[0], hidden.device
    wide = gradient_dtype(plan)
    values = {name: torch.empty(n, dtype=wide, device=device) for name in terms.outputs}
    d_hidden = torch.zeros_like(hidden) if upstream and plan.grad_hidden else None
    d_weight = total
    if d_weight is None and upstream and plan.grad_weight:
        d_weight = torch.zeros_like(weight, dtype=wide)
    chunk_rows, block_rows = _rows(plan.chunk_size, vocabulary, device.type)
    student = _Projection(inputs.student, plan.matmul_dtype, chunk_rows)
    read = inputs.teacher if terms.needs_teacher() else None
    teacher = _Projection(read, plan.matmul_dtype, chunk_rows) if read else None
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
                known = None if inputs.known is None else TopK(*(each[block] for each in inputs.known))
                block_values, d_logits = _block(
                    compute, terms.outputs, z[local], None if w is None else w[local], labels, known, block_upstream
                )
                for name, value in zip(terms.outputs, block_values, strict=True):
                    values[name][block] = value
                if upstream:
                    z[local] = 0 if d_logits is None else d_logits
                    chunk_active |= block_active
            if chunk_active and d_hidden is not None:
                d_hidden[chunk] = z @ student.weight
            if chunk_active and d_weight is not None:
                _accumulate(d_weight, z, student.rows(chunk))
    return Result(values, d_hidden, d_weight)


def gradient_dtype(plan: Plan) -> torch.dtype:
    """In which values are computed, and products are added up to the gradient of a weight."""
    return torch.float64 if plan.matmul_dtype == torch.float64 else torch.float32


def _block(
    compute: Callable[..., tuple[Tensor, ...]],
    outputs: tuple[Output, ...],
    z: Float[Tensor, "C V"],
    w: Float[Tensor, "C VT"] | None,
    labels: Int[Tensor, " C"] | None,
    known: TopK | None,
    upstream: dict[Output, Float[Tensor, " C"]],
) -> tuple[tuple[Float[Tensor, " C"], ...], Float[Tensor, "C V"] | None]:
    """Values of one block and, for a non-empty ``upstream``, the gradient for its logits."""
    if not upstream:
        with torch.no_grad():
            return compute(z, w, labels, known, ()), None
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        values = compute(z, w, labels, known, tuple(upstream))
        chosen = [values[outputs.index(name)] for name in upstream]
        weights = [g.to(value.dtype) for g, value in zip(upstream.values(), chosen, strict=True)]
        (d_logits,) = torch.autograd.grad(chosen, z, weights)
    return tuple(value.detach() for value in values), d_logits


@functools.lru_cache(maxsize=32)
def _compiled(terms: Computation) -> Callable[..., tuple[Tensor, ...]]:
    """Fuses softmax, divergence and their backward into few kernels, for any number of rows."""

    def compute(*args: Any) -> tuple[Tensor, ...]:
        return terms(*args)

    # Dynamo counts recompilations per code object; with a shared one, a few divergences reach its limit.
    compute.__code__ = compute.__code__.replace(co_name=f"head_terms_{'_'.join(terms.outputs)}")
    return torch.compile(compute, dynamic=True)


def _accumulate(d_weight: Float[Tensor, "V H"], d_logits: Float[Tensor, "C V"], hidden: Float[Tensor, "C H"]) -> None:
    """d_weight += d_logits^T hidden; half-precision products are summed in float32."""
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


def _active_blocks(upstream: dict[Output, Float[Tensor, " N"]], block_rows: int, n: int) -> list[bool]:
    """Which blocks have a row with a non-zero upstream gradient; one transfer to the host per call."""
    if not upstream or n == 0:
        return []
    rows = torch.stack([g != 0 for g in upstream.values()]).any(dim=0)
    padded = torch.nn.functional.pad(rows, (0, -n % block_rows))
    return padded.view(-1, block_rows).any(dim=1).tolist()


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))
