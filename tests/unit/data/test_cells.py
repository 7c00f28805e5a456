# SPDX-License-Identifier: Apache-2.0
"""What a cell of a published file says."""

import pytest

from opd_ext.data.cells import level


@pytest.mark.parametrize(
    "cell, found", [("Level 5", 5), ("Level5", 5), (5.0, 5), (12, 12), ("hard", None), (-3, None), (None, None)]
)
def test_a_level_is_the_number_that_is_named_and_never_below_0(cell, found):
    assert level(cell) == found
