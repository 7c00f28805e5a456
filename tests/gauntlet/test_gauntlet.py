# SPDX-License-Identifier: Apache-2.0
"""Situations that broke other projects, by their public reports: each is right here, or one sentence before Ray."""

import inspect
import re

import pytest

from tests.gauntlet.table import BEGIN, END, PAGE, README, ROWS, VERDICTS, page, readme_table, summary


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_gauntlet(row, request):
    row.check(**{name: request.getfixturevalue(name) for name in inspect.signature(row.check).parameters})


def test_the_page_shows_this_table():
    assert PAGE.read_text() == page(), "run: python -m tests.gauntlet.table"
    assert {row.verdict for row in ROWS} <= VERDICTS.keys()


def test_the_readme_shows_this_table():
    text = README.read_text()
    assert summary() in text
    assert text.split(BEGIN)[1].split(END)[0].strip() == readme_table().strip(), "run: python -m tests.gauntlet.table"


def test_every_name_has_a_repository_and_a_number():
    reports = [report for row in ROWS for report in row.reports]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", report) for report in reports), reports
    assert all(re.match(r"[\w.-]+-\d+ \w", str(row)) for row in ROWS)
