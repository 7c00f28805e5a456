# SPDX-License-Identifier: Apache-2.0
"""Golden numbers for every unit test, from a folder that the environment may replace."""

import functools
import json
import os
from pathlib import Path

import pytest

DEFAULT_VECTORS = Path(__file__).parents[1] / "vectors"


@functools.cache
def load_vectors(method: str) -> dict:
    folder = Path(os.environ.get("OPD_VECTORS_DIR", DEFAULT_VECTORS))
    path = folder / f"{method}.json"
    if not path.is_file():
        pytest.fail(f"{path} does not exist; point OPD_VECTORS_DIR at a folder with {method}.json.", pytrace=False)
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def vectors():
    """``vectors("crisp")`` is the content of ``$OPD_VECTORS_DIR/crisp.json`` (default: ``tests/vectors``)."""
    return load_vectors
