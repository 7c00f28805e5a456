# SPDX-License-Identifier: Apache-2.0
"""The fp32 head: which product makes its logits, and that both are the same numbers."""

import pytest
import torch

from opd_ext.objective.head import divergence_head
from opd_ext.objective.products import fp32_linear, is_widening, project

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("device", "hidden", "weight", "wanted", "widening"),
    [
        ("cuda", BF16, BF16, FP32, True),
        ("cpu", BF16, BF16, FP32, False),  # PyTorch has no such kernel there
        ("cuda", FP32, BF16, FP32, False),  # rounding the hidden states would be another computation
        ("cuda", BF16, FP32, FP32, False),
        ("cuda", FP32, FP32, FP32, False),
        ("cuda", BF16, BF16, BF16, False),
        ("cuda", BF16, BF16, FP64, False),
    ],
)
def test_operands_stay_bf16_on_cuda_alone(device, hidden, weight, wanted, widening):
    assert is_widening(device, hidden, weight, wanted) is widening


def test_a_product_of_two_bf16_numbers_is_exact_in_fp32():
    """8 + 8 bits of significand: what ``out_dtype`` sums are the numbers that fp32 copies give."""
    numbers = torch.randn(64, generator=torch.Generator().manual_seed(1)).bfloat16()
    pairs = numbers.float()[:, None] * numbers.float()
    assert torch.equal(pairs.double(), numbers.double()[:, None] * numbers.double())


def test_cast_operands_give_what_out_dtype_promises():
    """Against float64 sums of the exact products; 48 roundings of a float32 sum of numbers below 16."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 48, generator=generator).bfloat16() for n in (5, 7))
    exact = hidden.double() @ weight.double().T
    out = torch.empty(5, 7)
    assert project(hidden, weight, FP32, out=out) is out and out.dtype == FP32
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=48 * 16 * 2**-24)
    rounded = (hidden @ weight.T).double()  # a bf16 result loses what the fp32 head is for
    assert (rounded - exact).abs().max() > 100 * (out.double() - exact).abs().max()


def test_pytorch_has_the_product_that_cuda_takes():
    """The call of :func:`project`, by PyTorch's own shape rules: no kernel runs."""
    hidden, weight = (torch.empty(n, 48, dtype=BF16, device="meta") for n in (5, 7))
    found = torch.mm(hidden, weight.T, out_dtype=FP32, out=None)
    assert (found.shape, found.dtype) == ((5, 7), FP32)
    assert torch.mm(hidden, weight.T, out_dtype=FP32, out=torch.empty_like(found)).dtype == FP32


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_linear_layer_is_that_of_fp32_copies_with_its_gradients(dtype):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, 5, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(7, 8, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(1, 5, 7, generator=generator)
    expected = torch.nn.functional.linear(hidden.float(), weight.float())
    with torch.autocast("cpu", BF16):
        found = fp32_linear(hidden, weight)
        gradients = torch.autograd.grad(found, (hidden, weight), upstream)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # another order of 8 summands
    # A float32 gradient rounds to one of two neighbours in bfloat16, 2^-8 apart.
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, (hidden, weight), upstream), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-7 if dtype == BF16 else 1e-5, atol=1e-5)


def test_the_chunked_head_of_bf16_operands_is_that_of_their_fp32_copies():
    generator = torch.Generator().manual_seed(4)
    sides = [torch.randn(n, 8, generator=generator).bfloat16() for n in (6, 11, 6, 11)]
    wide = [side.float() for side in sides]
    rows = {"token_weight": torch.ones(6), "chunk_size": 4}
    found, expected = divergence_head(*sides, matmul_dtype=FP32, **rows), divergence_head(*wide, **rows)
    assert torch.equal(found.divergence, expected.divergence)
