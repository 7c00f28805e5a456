# SPDX-License-Identifier: Apache-2.0
"""What plans are made of is composed once."""

import pytest


@pytest.fixture(autouse=True)
def composed_once(presets_composed_once):
    """Plans differ in values; how presets are composed is tested elsewhere."""
