# SPDX-License-Identifier: Apache-2.0
"""Alarms are where a user looks: report, curves, list of runs."""

import io
import json

import pytest
from rich.console import Console

from opd_ext.alarms.record import Record, append
from opd_ext.report.run_report import write_report
from opd_ext.report.runs import look, print_runs
from tests.unit.report.test_compare import write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path, "crisp", 1, (0.5, 0.6, 0.5))


def written(run):
    console = Console(file=io.StringIO(), width=200)
    write_report(run, console)
    html, curves = (run / "report" / "report.html").read_text(), (run / "report" / "curves.png").read_bytes()
    return console.file.getvalue(), html, curves, json.loads((run / "report" / "summary.json").read_text())["alarms"]


def test_a_run_without_alarms_shows_none(run, capsys):
    told, html, _, listed = written(run)
    assert "ALARM" not in told and "<h2>Alarms</h2>" not in html and listed == []
    assert look(run).alarms == 0
    print_runs(run.parent)
    assert "alarm" not in capsys.readouterr().out


def test_a_run_with_alarms_shows_them_everywhere(run, capsys):
    _, _, without, _ = written(run)
    append(run, [Record(12, "length", "responses have <900> tokens", "rollback", to=10)])
    append(run, [Record(18, "entropy", "gone", "warn")])
    told, html, curves, listed = written(run)
    assert "ALARM at step 12: responses have <900> tokens (length); back to the checkpoint of step 10" in told
    assert "responses have &lt;900&gt; tokens" in html and "rollback to step 10" in html
    assert curves != without and [record["step"] for record in listed] == [12, 18]
    print_runs(run.parent)
    assert "2 alarms" in capsys.readouterr().out
