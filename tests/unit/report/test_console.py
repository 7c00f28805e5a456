# SPDX-License-Identifier: Apache-2.0
"""The line per step: aligned, complete, and plain text where there is no terminal."""

import io

from rich.console import Console

from opd_ext.bridge.console import StepPrinter

METRICS = {
    "opd/loss": 0.01234,
    "opd/divergence": 0.0123,
    "opd/student_entropy": 0.3265,
    "opd/teacher_entropy": 0.2871,
    "opd/grad_norm": 0.4567,
    "rollout/accuracy": 0.84375,
    "rollout/tokens_mean": 61.24,
    "rollout/truncated": 0.03125,
    "teacher/age": 7.0,
    "timing_s/gen": 0.42,
    "timing_s/update_actor": 0.21,
    "timing_s/step": 0.75,
}


def lines(steps=1, metrics=METRICS, **options):
    out = io.StringIO()
    printer = StepPrinter(console=Console(file=out, width=40), **options)
    for step in range(1, steps + 1):
        printer.train(step, metrics)
    printer.validation(steps, {"val/accuracy": 0.9, "val/tokens_mean": 40.0, "val/truncated": 0.0})
    return out.getvalue().splitlines()


def test_a_row_holds_every_number_once_in_plain_text():
    header, row, validation = lines(total_steps=41)
    expected = "1/41 0.0123 0.0123 0.327/0.287 84.4 61.2 3.1 7 0.42/0.21/0.75 0.457 0:00:30"
    assert row.split() == expected.split()
    assert validation.split() == ["val", "1", "90.0", "40.0", "0.0"]
    assert "\x1b" not in "".join((header, row, validation))  # no colour codes in a log


def test_the_rows_of_a_monitor_and_of_some_sets_are_not_taken_for_the_full_protocol():
    out = io.StringIO()
    printer = StepPrinter(console=Console(file=out, width=40))
    printer.validation(20, {"monitor/accuracy": 0.5, "monitor/tokens_mean": 8.0, "monitor/truncated": 0.25}, "monitor")
    printer.validation(20, {"val/a b/accuracy": 0.25, "val/a b/tokens_mean": 9.5, "val/failed": 0.5}, "sets")
    _, monitor, one_set, lost = out.getvalue().splitlines()
    assert monitor.split() == ["mon", "20", "50.0", "8.0", "25.0"]
    assert one_set == "set a b at step 20: 25.0 % correct, 9.5 tokens" and lost == "ALARM, lost: failed 50.0%"


def test_numbers_end_where_their_titles_end():
    header, row, validation = lines()
    for title, number in (("loss", "0.0123"), ("acc %", "84.4"), ("tokens", "61.2"), ("grad", "0.457")):
        assert header.index(title) + len(title) == row.index(number) + len(number)
    assert header.index("acc %") + len("acc %") == validation.index("90.0") + len("90.0")


def test_the_header_returns_every_twenty_rows():
    printed = lines(steps=45)
    assert [number for number, line in enumerate(printed) if "entropy s/t" in line] == [0, 21, 42]
    assert len(printed) == 45 + 1 + 3


def test_missing_metrics_are_dashes_and_broken_ones_are_shown():
    _, row, _ = lines(metrics={"opd/loss": float("nan"), "opd/divergence": 3.2e7})
    assert row.split() == ["1", "nan", "3.2e+07", "-/-", "-", "-", "-", "-", "-/-/-", "-", "-"]


def test_what_a_step_loses_is_a_line_below_its_row_and_an_alarm_where_it_is_much():
    _, _, lost, _ = lines(metrics=METRICS | {"rollout/failed": 0.03125, "rollout/too_long": 0.0})
    assert lost == "lost: failed 3.1%"
    _, _, lost, _ = lines(metrics=METRICS | {"annotation/skipped": 1.0, "annotation/failures": 0.01})
    assert lost == "ALARM, lost: annotations failed 1.0%, annotations skipped 100.0%"


def test_prompts_that_a_filter_dropped_are_told_with_every_header():
    printed = lines(steps=21, metrics=METRICS | {"data/filtered": 0.25})
    told = "ALARM, lost: 25.0% of the prompts to train on, too long or refused by the chat template"
    assert [number for number, line in enumerate(printed) if line == told] == [0, 22]
    assert lines(metrics=METRICS | {"data/filtered": 0.01})[0].startswith("lost: 1.0% of the prompts")
