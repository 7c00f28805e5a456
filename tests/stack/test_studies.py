# SPDX-License-Identifier: Apache-2.0
"""`opd compare METHOD` for real: methods and their controls trained, judged, killed and gone on with, and refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from opd_ext.report.controls import STUDY
from opd_ext.run_state import FINISHED, state_of
from tests.stack.conftest import TIMEOUT_S, alone, metrics

pytestmark = pytest.mark.slow  # two to four runs each

STEPS, PROBLEMS = 2, 24
ARMS = ("method", "instruction_alone", "prefix_only", "short_horizon")  # CRISP and its controls
SHORT = [
    "scale=cpu_tiny",
    f"trainer.total_training_steps={STEPS}",
    f"trainer.test_freq={STEPS}",
    "trainer.save_freq=1",
    "data.train_batch_size=8",
    "data.max_response_length=64",
    f"data.val_max_samples={PROBLEMS}",
]


def compare(train, folder, *words, status=0):
    """`opd compare` to its end; its runs join the session's Ray."""
    done = subprocess.run(
        [train.stack.python, "-m", "opd_ext.cli", "compare", *words], env=train.environment, cwd=folder,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3 * TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == status, done.stdout[-4000:]
    return done.stdout


def killed(train, study, *words):
    """`opd compare` as a user types it, killed with all of its processes once its first run has saved a step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "opd_ext.cli", "compare", *words], env=alone(train.world), cwd=study.parent,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline, run = time.monotonic() + TIMEOUT_S, study / "method-seed1"
    while not (run / "checkpoints" / "global_step_1").is_dir():
        assert process.poll() is None and time.monotonic() < deadline, (run / "run.log").read_text()[-4000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert state_of(run) != FINISHED, "the run ended before it could be killed"


def judged(study):
    """The written table, and the validation rows of every arm that it rests on."""
    rows = {}
    for arm in json.loads((study / STUDY).read_text())["arms"]:
        last = max((study / f"{arm}-seed1" / "generations").glob("val_*.jsonl"), key=lambda p: int(p.stem[4:]))
        rows[arm] = [json.loads(line) for line in last.read_text().split("\n") if line]
    return json.loads((study / "controls.json").read_text()), rows


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


@pytest.fixture(scope="module")
def crisp(train, tmp_path_factory):
    """CRISP and all of its controls; killed within its first run, started again, and once more when all is done."""
    base = tmp_path_factory.mktemp("studies")
    study = base / "crisp"
    words = ["crisp", *SHORT, f"--out={study}"]
    killed(train, study, *words)
    said = compare(train, base, *words)
    before = {log: log.stat().st_mtime_ns for log in study.glob("*/run.log")}
    again = compare(train, base, *words)
    assert {log.parent.name for log in before} == {f"{arm}-seed1" for arm in ARMS}
    assert {log: log.stat().st_mtime_ns for log in before} == before, "a finished run was started"
    return study, said, again


def test_a_killed_study_goes_on_where_it_was_and_leaves_finished_runs_alone(crisp):
    study, said, again = crisp
    assert all(f"{arm} seed 1: done" in said for arm in ARMS)
    log = " ".join((study / "method-seed1" / "run.log").read_text().split())
    assert f"resumed from {study}/method-seed1/checkpoints/global_step_" in log, log[-3000:]
    assert [line["step"] for line in metrics(study / "method-seed1")] == list(range(1, STEPS + 1))
    assert "started" not in again and again.split("Written")[0].endswith(said.split("Written")[0][-500:])  # the table


def test_the_table_holds_what_the_arms_validated_paired_by_problem(crisp):
    study, said, _ = crisp
    found, rows = judged(study)
    assert [arm["arm"] for arm in found["arms"]] == ["base", *ARMS]
    for arm in found["arms"][1:]:
        assert len(rows[arm["arm"]]) == PROBLEMS
        assert arm["tokens"] == pytest.approx(mean(rows[arm["arm"]], "response_tokens"))
        assert arm["accuracy"] == pytest.approx(100 * mean(rows[arm["arm"]], "acc"))
    for pair in found["against"]:
        if pair["against"] == "base":
            continue
        name = {"accuracy": "acc", "tokens": "response_tokens"}[pair["outcome"]]
        factor = 100 if name == "acc" else 1
        gap = mean(rows["method"], name) - mean(rows[pair["against"]], name)
        assert pair["difference"] == pytest.approx(factor * gap)
        assert pair["difference_low"] <= pair["difference"] <= pair["difference_high"]
        assert 0 < pair["p"] <= pair["p_holm"] <= 1
    assert len(found["against"]) == 2 * len(ARMS)  # accuracy and tokens, against the base and every control
    assert len(found["verdicts"]) == 2  # one of accuracy, one of tokens
    assert set(found["not_applicable"]) == {"another_problem", "constant_advantage", "constant_weight", "random_places"}
    assert all(sentence in " ".join(said.split()) for sentence in found["verdicts"])
    assert (study / "controls.md").is_file() and (study / "controls.png").stat().st_size > 1000


def test_a_concise_prompt_alone_trains_nothing_and_is_in_every_prompt(crisp):
    study, _, _ = crisp
    alone = study / "instruction_alone-seed1"
    assert not metrics(alone) and not list((alone / "checkpoints").glob("global_step_*"))
    (file,) = (alone / "generations").glob("val_*.jsonl")
    concise = [json.loads(line)["input"] for line in file.read_text().split("\n") if line]
    plain = [json.loads(line)["input"] for line in (study / "method-seed1/generations/val_0.jsonl").open()]
    assert all(len(a) > len(b) for a, b in zip(concise, plain, strict=True))


def test_a_prefix_teaches_in_the_place_of_the_whole_response(crisp):
    """The same rollouts at step 1: the sum of the weights is the method's, and another loss comes of it."""
    method, prefix = (metrics(crisp[0] / f"{arm}-seed1")[0] for arm in ("method", "prefix_only"))
    assert prefix["rollout/tokens_mean"] == method["rollout/tokens_mean"]
    assert prefix["opd/divergence"] == pytest.approx(method["opd/divergence"], rel=1e-4)
    assert prefix["opd/loss"] != pytest.approx(method["opd/loss"], rel=1e-2)


def test_the_weights_of_iw_opd_are_flat_in_its_control(train, tmp_path):
    study = tmp_path / "iw_opd"
    words = ["iw_opd", *SHORT, "opd.max_teacher_entropy=null", "--controls=constant_weight", f"--out={study}"]
    said = compare(train, tmp_path, *words)
    method, flat = (metrics(study / f"{arm}-seed1")[0] for arm in ("method", "constant_weight"))
    assert flat["rollout/tokens_mean"] == method["rollout/tokens_mean"]
    assert 1.05 < flat["opd/credit"] == pytest.approx(method["opd/credit"], rel=1e-5)  # the same sum, placed alike
    assert flat["opd/loss"] != pytest.approx(method["opd/loss"], rel=1e-4)
    found, _ = judged(study)
    assert {pair["against"] for pair in found["against"]} == {"base", "constant_weight"}
    again = compare(train, tmp_path, str(study))  # the table alone
    assert found["verdicts"][0] in " ".join(again.split()) and "started" not in again and "started" in said


def test_another_problem_s_solution_is_what_the_teacher_of_opsd_reads(train, tmp_path):
    study = tmp_path / "opsd"
    compare(train, tmp_path, "opsd", *SHORT, "--controls=another_problem", f"--out={study}")
    own, other = (
        [json.loads(line) for line in (study / f"{arm}-seed1/generations/train_1.jsonl").open()]
        for arm in ("method", "another_problem")
    )
    assert [row["output"] for row in own] == [row["output"] for row in other]  # the same rollouts
    shown = [(a["teacher_prompt"], b["teacher_prompt"]) for a, b in zip(own, other, strict=True)]
    assert all(mine != theirs for mine, theirs in shown)
    losses = [metrics(study / f"{arm}-seed1")[0]["opd/loss"] for arm in ("method", "another_problem")]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "words, said",
    [
        (["crisp", "--controls=another_problem"], "kind=instruction shows the same for every problem"),
        (["grpo", "--controls=prefix_only"], "needs a divergence, whose credit it places"),
        (["crisp", "actor_rollout_ref.model.path=/nowhere"], "method seed 1 was refused: actor_rollout_ref.model.path"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(train, tmp_path, words, said):
    answer = compare(train, tmp_path, *words, *SHORT, f"--out={tmp_path / 'study'}", status=2)
    last = answer.rstrip().split("\n")[-1]
    assert last.startswith("opd compare: ") and said in last
    assert not list((tmp_path / "study").glob("*/checkpoints/global_step_*"))
    assert "prefix_only seed 1" not in answer  # what is refused once would be refused again
