# SPDX-License-Identifier: Apache-2.0
"""Vocabulary projections whose logits are float32 although hidden states and weights are not.

A product of two bfloat16 numbers has 16 significant bits at most, so float32 holds it exactly. Casting both operands to
float32 and multiplying, or multiplying them as they are with float32 sums and a float32 result, therefore add up the
same numbers, and differ by the order of the sum alone. On CUDA the second runs on the tensor cores and needs no float32
copy of the weights (cuBLAS sums splits of a product in the type of the result, so these too are float32); elsewhere the
first is at hand. Gradients of logits are true float32 numbers, so their products are made in float32 everywhere.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_widening(device_type: str, hidden: torch.dtype, weight: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether the device multiplies these operands as they are and gives ``wanted``: bfloat16 to float32, on CUDA."""
    return device_type == "cuda" and hidden == weight == torch.bfloat16 and wanted == torch.float32


def project(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    dtype: torch.dtype,
    out: Float[Tensor, "N V"] | None = None,
) -> Float[Tensor, "N V"]:
    """``hidden @ weight.T`` in ``dtype``, summed in it, written into ``out`` where that is given; no gradient."""
    if is_widening(hidden.device.type, hidden.dtype, weight.dtype, dtype):
        return torch.mm(hidden, weight.T, out_dtype=dtype, out=out)
    return torch.mm(hidden.to(dtype), weight.to(dtype).T, out=out)


def fp32_linear(hidden: Float[Tensor, "*B H"], weight: Float[Tensor, "V H"]) -> Float[Tensor, "*B V"]:
    """``torch.nn.functional.linear(hidden.float(), weight.float())``, differentiable, by :func:`project`."""
    return _FP32Linear.apply(hidden, weight)


class _FP32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            return project(hidden.flatten(0, -2), weight, torch.float32).view(*hidden.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        d_hidden = d_weight = None
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                d_hidden = (grad @ weight.float()).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                rows = grad.flatten(0, -2)
                d_weight = (rows.T @ hidden.flatten(0, -2).float()).to(weight.dtype)
        return d_hidden, d_weight
