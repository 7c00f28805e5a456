# SPDX-License-Identifier: Apache-2.0
"""The before/after comparison against numbers computed by hand, and the files of the report."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from opd_ext import train
from opd_ext.config import schema
from opd_ext.config.compose import compose_config
from opd_ext.files import write_jsonl
from opd_ext.report.after import after_run
from opd_ext.report.run_report import before_after, load_run, verdict, write_report
from opd_ext.terminal import terminal

PROBLEMS = 40
SAMPLES = 2


def row(index, sample, acc, tokens, output="Answer: 1", **other):
    return {
        "uid": f"p{index}",
        "index": index,
        "sample": sample,
        "data_source": "tinymath",
        "difficulty": 1 + index % 2,
        "input": f"question {index}",
        "output": output,
        "response_tokens": tokens,
        "truncated": False,
        "score": acc,
        "acc": acc,
        "ground_truth": "1",
        **other,
    }


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))


@pytest.fixture
def evaluation():
    """``[problems, samples]`` before and after: 40 % shorter, as many right, but other ones."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 90, size=(PROBLEMS, SAMPLES))
    acc = (rng.random((PROBLEMS, SAMPLES)) < 0.8).astype(float)
    return {"before": (acc, tokens), "after": (acc[::-1], (0.6 * tokens).round().astype(int))}


@pytest.fixture
def run_dir(tmp_path, evaluation):
    folder = tmp_path / "crisp-tiny"
    for step, side in ((0, "before"), (10, "before"), (20, "after")):
        acc, tokens = evaluation[side]
        rows = [
            row(
                index,
                sample,
                float(acc[index, sample]),
                int(tokens[index, sample]),
                output=f"<{side} {index}>",
            )
            for index in reversed(range(PROBLEMS))
            for sample in range(SAMPLES)
        ]
        write_lines(folder / "generations" / f"val_{step}.jsonl", rows)
    log = [
        {"step": step, "phase": "train", "time": 1e9 + step, "opd/loss": 0.02 / step, "rollout/accuracy": 0.8}
        | {"teacher/version": 10 * (step > 10), "opd/student_entropy": 0.3, "opd/teacher_entropy": 0.2}
        for step in range(1, 21)
    ]
    log += [{"step": step, "phase": "val", "time": 1e9, "val/accuracy": 0.8} for step in (0, 20)]
    write_lines(folder / "metrics.jsonl", log)
    (folder / "config.yaml").write_text("method: crisp # <unescaped>\n")
    return folder


def test_values_are_the_means_of_first_and_last_validation(run_dir, evaluation):
    table = before_after(run_dir)
    assert table.attrs == {"first_step": 0, "last_step": 20}
    assert table["group"].tolist() == ["all", "difficulty 1", "difficulty 2"]
    (acc, tokens), (right, after) = evaluation["before"], evaluation["after"]
    odd = np.arange(PROBLEMS) % 2 == 1
    for name, chosen in (("all", odd | True), ("difficulty 1", ~odd), ("difficulty 2", odd)):
        got = table.set_index("group").loc[name]
        assert got["problems"] == chosen.sum() and got["samples_after"] == SAMPLES * chosen.sum()
        expected = {
            "accuracy_before": 100 * acc[chosen].mean(),
            "accuracy_after": 100 * right[chosen].mean(),
            "accuracy_change": 100 * (right[chosen].mean() - acc[chosen].mean()),
            "tokens_before": tokens[chosen].mean(),
            "tokens_after": after[chosen].mean(),
            "tokens_change": after[chosen].mean() - tokens[chosen].mean(),
            "tokens_reduction_pct": 100 * (1 - after[chosen].mean() / tokens[chosen].mean()),
            "truncated_before": 0,
        }
        for key, value in expected.items():
            assert got[key] == pytest.approx(value, abs=1e-9), key


def test_the_interval_of_a_change_is_that_of_the_difference_by_problem(run_dir, evaluation):
    row = before_after(run_dir).iloc[0]
    for key, scale, position in (("tokens_change", 1, 1), ("accuracy_change", 100, 0)):
        before, after = evaluation["before"][position], evaluation["after"][position]
        by_problem = scale * (after.mean(axis=1) - before.mean(axis=1))
        half = 1.96 * by_problem.std(ddof=0) / np.sqrt(PROBLEMS)
        # A percentile bootstrap of forty nearly symmetric differences is within 8 % of the normal interval.
        assert row[f"{key}_low"] == pytest.approx(by_problem.mean() - half, abs=0.08 * half)
        assert row[f"{key}_high"] == pytest.approx(by_problem.mean() + half, abs=0.08 * half)
    width = {key: row[f"{key}_high"] - row[f"{key}_low"] for key in ("tokens_change", "tokens_before")}
    assert width["tokens_change"] < width["tokens_before"]


def test_a_known_constant_difference_has_no_width(tmp_path):
    for step, tokens in ((0, 30), (5, 20)):
        rows = [row(index, 0, 1.0, tokens + index) for index in range(10)]
        write_lines(tmp_path / "generations" / f"val_{step}.jsonl", rows)
    write_lines(tmp_path / "metrics.jsonl", [])
    first = before_after(tmp_path).iloc[0]
    assert first[["tokens_change", "tokens_change_low", "tokens_change_high"]].tolist() == [-10, -10, -10]
    assert first["tokens_before_high"] > first["tokens_before_low"]


def test_a_run_that_changed_nothing_is_not_called_lower(run_dir):
    for step, shift in ((0, 0), (20, 1)):
        rows = [
            row(index, sample, float((sample + shift) % 3 == 0), 10 + (sample + shift) % 3)
            for index in range(PROBLEMS)
            for sample in range(3)
        ]
        write_lines(run_dir / "generations" / f"val_{step}.jsonl", rows)
    assert verdict(before_after(run_dir)).startswith(
        "tokens +0.0 % [+0.0, +0.0]: not significantly different; "
        "accuracy +0.0 points [+0.0, +0.0]: not significantly lower"
    )


def test_verdict_says_what_the_numbers_say(run_dir):
    table = before_after(run_dir)
    assert verdict(table).startswith(f"tokens {-table.loc[0, 'tokens_reduction_pct']:+.1f} % [")
    assert "significantly fewer" in verdict(table) and "not significantly lower" in verdict(table)
    worse = table.copy()
    worse[["accuracy_change", "accuracy_change_low", "accuracy_change_high"]] = [-9.0, -14.0, -4.0]
    assert "accuracy -9.0 points [-14.0, -4.0]: significantly lower" in verdict(worse)
    longer = table.copy()
    longer[["tokens_change_low", "tokens_change_high"]] = [2.0, 4.0]
    assert ": significantly more;" in verdict(longer)


def test_problems_are_matched_by_data_source_and_index_and_others_are_left_out(tmp_path):
    aime = {"data_source": "aime", "difficulty": None}
    write_lines(
        tmp_path / "generations/val_0.jsonl",
        [row(0, 0, 1.0, 10), row(0, 0, 0.0, 50, **aime), row(7, 0, 1.0, 9)],
    )
    write_lines(tmp_path / "generations/val_9.jsonl", [row(0, 0, 1.0, 10, **aime), row(0, 0, 0.0, 4)])
    write_lines(tmp_path / "metrics.jsonl", [])
    table = before_after(tmp_path).set_index("group")
    assert table.index.tolist() == ["all", "aime", "tinymath", "difficulty 1"]
    assert table["problems"].tolist() == [2, 1, 1, 1]
    assert table.loc["aime", "tokens_change"] == -40 and table.loc["tinymath", "tokens_change"] == -6
    assert np.isnan(table.loc["aime", "tokens_change_low"])
    write_report(tmp_path, Console(file=io.StringIO()))  # a group of one problem has no interval, but a report
    assert json.loads((tmp_path / "report/summary.json").read_text())["comparison"][1]["tokens_change_low"] is None


def test_report_files_hold_the_numbers(run_dir):
    out = io.StringIO()
    write_report(run_dir, Console(file=out, width=120))
    table = before_after(run_dir)
    reduction = f"{table.loc[0, 'tokens_reduction_pct']:.1f}"
    summary = json.loads((run_dir / "report/summary.json").read_text())
    assert summary["comparison"][0]["tokens_reduction_pct"] == table.loc[0, "tokens_reduction_pct"]
    assert summary["verdict"] == verdict(table) and summary["last_step"] == 20
    assert reduction in out.getvalue() and verdict(table) in out.getvalue()
    assert (run_dir / "report/curves.png").read_bytes().startswith(b"\x89PNG")
    page = (run_dir / "report/report.html").read_text()
    assert reduction in page and "data:image/png;base64,iVBOR" in page
    assert "&lt;before 0&gt;" in page and "&lt;after 0&gt;" in page and "&lt;unescaped&gt;" in page
    assert "Right before, wrong after" in page
    names = {path.name for path in (run_dir / "report").iterdir()}
    assert names == {"summary.json", "curves.png", "report.html"}  # no temporary file is left


def test_a_report_says_how_to_have_the_model(run_dir):
    console = terminal(file=io.StringIO(), width=200)
    write_report(run_dir, console)
    assert "opd export" not in console.file.getvalue() + (run_dir / "report" / "report.html").read_text()
    (run_dir / "checkpoints" / "global_step_20").mkdir(parents=True)
    write_report(run_dir, console)
    assert f"opd export {run_dir}" in console.file.getvalue()
    assert f"<code>opd export {run_dir}</code>" in (run_dir / "report" / "report.html").read_text()


def test_a_run_that_was_killed_and_resumed_reads_as_one(run_dir):
    log = run_dir / "metrics.jsonl"
    with log.open("a") as handle:
        handle.write(json.dumps({"step": 20, "phase": "train", "time": 2e9, "opd/loss": 7.0}) + "\n")
        handle.write('{"step": 21, "phase": "tr')
    metrics = load_run(run_dir).metrics
    last = metrics[(metrics["phase"] == "train") & (metrics["step"] == 20)]
    assert last["opd/loss"].tolist() == [7.0]


def test_a_line_that_is_not_json_is_named(run_dir):
    dump = run_dir / "generations/val_20.jsonl"
    dump.write_text(dump.read_text() + "oops\n")
    with pytest.raises(ValueError, match=r"line 81 of .*val_20.jsonl is not JSON"):
        before_after(run_dir)


def test_what_is_missing_is_said_in_one_sentence(run_dir):
    with pytest.raises(FileNotFoundError, match="no run folder .*nowhere"):
        before_after(run_dir / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no metrics.jsonl"):
        before_after(run_dir / "generations")
    for step in (10, 20):
        (run_dir / f"generations/val_{step}.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"only one validation dump \(step 0\)"):
        before_after(run_dir)
    (run_dir / "generations/val_0.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="no validation dump"):
        write_report(run_dir)


def test_a_dump_without_the_needed_columns_is_refused(run_dir):
    write_lines(run_dir / "generations/val_20.jsonl", [{"index": 0, "data_source": "tinymath"}])
    with pytest.raises(ValueError, match="has no acc, response_tokens"):
        before_after(run_dir)


def _short_run(folder, change=lambda line: line, problems=6):
    for step, tokens in ((0, 30), (5, 20)):
        rows = [change(row(i, s, 1.0, tokens + i)) for i in range(problems) for s in range(SAMPLES)]
        write_jsonl(folder / "generations" / f"val_{step}.jsonl", rows)
    write_jsonl(folder / "metrics.jsonl", [{"step": 1, "phase": "train", "time": 1.0, "opd/loss": 1.0}])
    return folder


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0c", "\ud800"])
def test_whatever_a_response_holds_a_line_stays_a_line(tmp_path, mark):
    """Valid in JSON, and found in responses of every long validation."""
    run = _short_run(tmp_path / "run", lambda line: {**line, "output": f"a{mark}b"})
    write_report(run, console=quiet())
    assert load_run(run).generations(0)["output"].tolist() == [f"a{mark}b".replace("\ud800", "?")] * 12
    assert "a" in (run / "report" / "report.html").read_text()


def quiet():
    return terminal(file=io.StringIO(), width=160)


def test_difficulties_in_words_are_groups(tmp_path):
    """LiveCodeBench has easy, medium and hard."""
    run = _short_run(tmp_path / "run", lambda line: {**line, "difficulty": ("hard", "easy", None)[line["index"] % 3]})
    assert before_after(run)["group"].tolist() == ["all", "difficulty easy", "difficulty hard"]
    write_report(run, console=quiet())
    assert "difficulty hard" in (run / "report" / "report.html").read_text()


@pytest.mark.parametrize("same_prompt", [False, True])
@pytest.mark.parametrize("name", [None, "absent"])
def test_problems_without_an_index_are_told_apart_and_paired(tmp_path, same_prompt, name):
    def change(line):
        changed = {**line, "index": name, **({"input": "q"} if same_prompt else {})}
        return changed if name is None else {key: value for key, value in changed.items() if key != "index"}

    first = before_after(_short_run(tmp_path / "run", change)).iloc[0]
    assert (first["problems"], first["samples_before"]) == (6, 6 * SAMPLES)
    assert first[["tokens_change", "tokens_change_low", "tokens_change_high"]].tolist() == [-10, -10, -10]


@pytest.mark.parametrize("name", ["run[red]", "run[lr=1e-5]", "run:x:"])
def test_a_name_is_shown_as_it_is(tmp_path, name):
    page = quiet()
    run = _short_run(tmp_path / name, lambda line: {**line, "data_source": (name, "[/math]")[line["index"] % 2]})
    write_report(run, console=page)
    shown = page.file.getvalue()
    assert f"{name}: step 0 to 5" in shown and f" {name} " in shown and " [/math] " in shown
    assert f"{name}/report/report.html" in shown


def test_a_report_that_fails_is_a_warning_with_the_command_that_repeats_it(capsys):
    def fails():
        raise RuntimeError("no\nfigure")

    after_run(fails, "opd report 'runs/a b'")
    said = capsys.readouterr()
    assert said.err == (
        "WARNING: the run is complete, its report is not (RuntimeError: no figure). "
        "To repeat it: opd report 'runs/a b'\n"
    )
    with pytest.raises(KeyboardInterrupt):
        after_run(lambda: (_ for _ in ()).throw(KeyboardInterrupt), "")


def test_a_run_whose_report_fails_has_succeeded(tmp_path, capsys, monkeypatch):
    """`_train` as it is, around a run that left two dumps, one of them broken."""
    run = _short_run(tmp_path / "a b")
    (run / "generations" / "val_0.jsonl").write_text("broken\n")
    config = compose_config(["method=crisp", "scale=cpu_tiny", f"opd.run_dir='{run}'"])
    monkeypatch.setattr(train, "fork_workers", lambda config: None)
    monkeypatch.setattr("opd_ext.bridge.runner.train", lambda config: None)
    train._train(config, schema.load(config.opd))
    assert "is not JSON" in (said := capsys.readouterr().err) and f"To repeat it: opd report '{run}'" in said
