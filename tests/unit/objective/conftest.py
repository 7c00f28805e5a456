# SPDX-License-Identifier: Apache-2.0
"""Precisions in which the golden numbers must be met, and the comparison that knows their tolerances."""

from typing import NamedTuple

import pytest
import torch


class Precision(NamedTuple):
    """``tolerance`` is both absolute and relative: values reach 100 nats, gradients vanish."""

    dtype: torch.dtype
    tolerance: float

    def tensor(self, numbers) -> torch.Tensor:
        return torch.tensor(numbers, dtype=self.dtype)

    def leaf(self, numbers) -> torch.Tensor:
        return self.tensor(numbers).requires_grad_()

    def assert_close(self, actual, expected, where=None) -> None:
        actual = torch.as_tensor(actual).detach().to(self.dtype)
        expected = torch.as_tensor(expected, dtype=self.dtype)
        if where is not None:
            actual, expected = actual[where], expected[where]
        torch.testing.assert_close(actual, expected, atol=self.tolerance, rtol=self.tolerance)


@pytest.fixture(
    # Tolerances of the vectors' own metadata: their numbers have 12 digits; float32 keeps about 7 of them
    # through a softmax and a sum.
    params=[Precision(torch.float64, 1e-9), Precision(torch.float32, 2e-5)],
    ids=["float64", "float32"],
)
def precision(request) -> Precision:
    return request.param
