# SPDX-License-Identifier: Apache-2.0
"""Situations that broke other projects, by their public reports: each is right here, or one sentence before Ray."""

import inspect

import pytest

from tests.gauntlet.table import PAGE, README, ROWS, VERDICTS, page, summary


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_gauntlet(row, request):
    row.check(**{name: request.getfixturevalue(name) for name in inspect.signature(row.check).parameters})


def test_the_page_shows_this_table():
    assert PAGE.read_text() == page(), "run: python -m tests.gauntlet.table"
    assert {row.verdict for row in ROWS} <= VERDICTS.keys()


def test_the_readme_counts_the_rows():
    assert summary() in README.read_text()
