# SPDX-License-Identifier: Apache-2.0
"""verl, vLLM, Ray and TransferQueue do what the bridge relies on: a broken promise fails one test, by its name."""

import importlib
import inspect
from pathlib import Path

import pytest

from .seams import SEAMS

for path in sorted(Path(__file__).parent.glob("of_*.py")):
    pytest.register_assert_rewrite(f"{__package__}.{path.stem}")
    importlib.import_module(f".{path.stem}", __package__)


@pytest.mark.parametrize("seam", SEAMS, ids=str)
def test_contract(seam, request):
    names = inspect.signature(seam.check).parameters
    seam.hold(**{name: request.getfixturevalue(name) for name in names})
