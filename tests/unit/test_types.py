# SPDX-License-Identifier: Apache-2.0
"""A type checker has nothing to say about the five places, the objective and the configuration."""

import subprocess
import sys

import pytest

from tests.conftest import TESTS


@pytest.mark.slow
def test_the_rooms_that_rest_on_torch_alone_are_typed():
    """`[tool.mypy]` in pyproject.toml names them; a minute, since it reads what they import."""
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
