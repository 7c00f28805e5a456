# SPDX-License-Identifier: Apache-2.0
"""Every method for three real steps, and what its specification says about its teacher.

GRPO has a test of its own (:mod:`tests.stack.test_grpo`), CRISP is the method of :mod:`tests.stack.test_run`.
"""

import json
import math
import os
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from opd_ext.cli import app
from opd_ext.context import prompts
from opd_ext.report.metrics import undescribed
from tests.stack.conftest import ROOT, metrics, shards
from tests.unit.inspection.folder import content, shown_loss, unpacked

STEPS = 3
EXAMPLE = ROOT / "examples" / "custom_method"
SETTINGS = {
    "cispo": ["actor_rollout_ref.rollout.n=4", "data.train_batch_size=4"],
    "opd": ["opd.max_teacher_entropy=null"],
    "exopd": ["opd.max_teacher_entropy=null"],
    "iw_opd": ["opd.max_teacher_entropy=null"],
    "opsd": [],
    "opd-server": ["method=opd", "teacher_server=cpu_tiny", "opd.max_teacher_entropy=null"],
    # The initial model, which an adapter leaves untouched, teaches without a copy of its weights.
    "opsd-lora": [
        "method=opsd",
        "opd.teacher.weights=base",
        "actor_rollout_ref.model.lora_rank=8",
        "actor_rollout_ref.model.lora.merge=true",
        "actor_rollout_ref.actor.optim.lr=1e-3",
    ],
    "sdpo": ["actor_rollout_ref.rollout.n=4", "data.train_batch_size=4"],
    "trace": ["actor_rollout_ref.rollout.n=4", "data.train_batch_size=4", "opd.teacher.interval=2"],
    # The model in training annotates itself on its rollout servers; it has never seen such a request.
    "trace-self": [
        "method=trace",
        "opd.credit.annotator.kind=self",
        "actor_rollout_ref.rollout.max_model_len=2048",
        "actor_rollout_ref.rollout.n=4",
        "data.train_batch_size=4",
    ],
    # A user's own piece of every kind, in one file.
    "surprise": [f"--config-dir={EXAMPLE / 'config'}", "opd.teacher.start=2", "data.train_batch_size=4"],
}


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """``run(method)`` -> the folder of its run; each method runs once."""
    base, done = tmp_path_factory.mktemp("methods"), {}
    path = os.pathsep.join(filter(None, (str(EXAMPLE), os.environ.get("PYTHONPATH"))))

    def of(method):
        if method not in done:
            settings = [f"method={method}"] if "-" not in method else []
            settings += [*SETTINGS[method], f"trainer.total_training_steps={STEPS}"]
            train(base / method, *settings, PYTHONPATH=path)
            done[method] = base / method
        return done[method]

    return of


def generations(run_dir, step):
    return [json.loads(line) for line in (run_dir / "generations" / f"train_{step}.jsonl").read_text().splitlines()]


# Whose pieces others have, or the tests of pieces: GRPO's run has CISPO's path, IW-OPD's has OPD's.
SLOW = {"cispo", "exopd", "opd", "opsd", "opsd-lora", "surprise", "trace-self"}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SETTINGS]
)
def test_three_steps(run, method):
    lines = metrics(run(method))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert math.isfinite(line["opd/loss"]) and line["opd/grad_norm"] >= 0
        assert not undescribed(line)
    trained = [line["step"] for line in lines if not line["opd/skipped"]]
    assert trained, "no step had anything to learn from"
    first, last = (shards(run(method), step, "actor")[0] for step in (1, STEPS))
    assert any(not torch.equal(first[name], last[name]) for name in first) or len(trained) == 1


@pytest.mark.slow
def test_several_updates_per_batch_reach_the_cap_of_cispo(run):
    lines = metrics(run("cispo"))
    assert all("actor/pg_clipfrac" in line for line in lines)
    assert any(line["actor/ppo_kl"] != 0 for line in lines), "the ratio never left 1"


def test_an_external_teacher_sees_what_the_student_saw(run):
    for row in generations(run("iw_opd"), 1):
        assert re.sub(r"<\|im_(start|end)\|>", "", row["teacher_prompt"]) == row["input"]


@pytest.mark.slow
def test_credit_by_position_weighs_the_tokens_that_opd_counts_alike(run):
    uniform, weighted = (metrics(run(method))[0] for method in ("opd", "iw_opd"))
    # The same rollouts, since seeds depend on prompt and step; gamma 0.5 gives weights between 1 and 1.5.
    assert uniform["rollout/tokens_mean"] == weighted["rollout/tokens_mean"]
    assert uniform["opd/credit"] == pytest.approx(1.0) and 1.05 < weighted["opd/credit"] <= 1.5


@pytest.mark.slow
def test_a_served_teacher_says_what_a_colocated_one_says(run):
    """verl's teacher server and our engine score the same rollouts: the log-probs agree to the kernels' rounding."""
    engine, served = (metrics(run(method)) for method in ("opd", "opd-server"))
    # The first step has the same weights on both sides; vLLM's and FSDP's fp32 kernels differ by some 1e-5 nats.
    assert served[0]["opd/teacher_log_prob"] == pytest.approx(engine[0]["opd/teacher_log_prob"], abs=1e-3)
    assert served[0]["opd/divergence"] == pytest.approx(engine[0]["opd/divergence"], abs=1e-3)


@pytest.mark.slow
def test_opsd_shows_the_reference_solution_and_keeps_the_first_weights(run):
    for row in generations(run("opsd"), STEPS):
        assert prompts.OPSD_SOLUTION_OPENING in row["teacher_prompt"]
    assert [line["teacher/version"] for line in metrics(run("opsd"))] == [0] * STEPS
    assert not (run("opsd") / "checkpoints" / f"global_step_{STEPS}" / "teacher").exists()


def test_the_teacher_of_sdpo_follows_the_student_slowly(run):
    run_dir = run("sdpo")
    teacher = {step: shards(run_dir, step, "teacher")[0] for step in (2, 3)}
    student = shards(run_dir, 3, "actor")[0]
    for name, before in teacher[2].items():
        # One product and one sum in float32.
        torch.testing.assert_close(teacher[3][name], 0.95 * before + 0.05 * student[name], atol=1e-6, rtol=1e-5)


def test_sdpo_never_shows_a_rollout_itself(run):
    taught = 0
    for step in range(1, STEPS + 1):
        rows = generations(run("sdpo"), step)
        for row in rows:
            if "teacher_prompt" not in row:
                continue
            taught += 1
            siblings = [other for other in rows if other["uid"] == row["uid"] and other["sample"] != row["sample"]]
            shown = row["teacher_prompt"].partition(prompts.SDPO_SOLUTION_OPENING)[2]
            if shown:
                # A demonstration is cut to max_body_tokens, so its beginning is what must be a sibling's.
                body = shown.partition(prompts.SDPO_CLOSING)[0]
                assert any(other["output"].startswith(body) and other["score"] == 1 for other in siblings)
            else:
                assert prompts.SDPO_FEEDBACK_OPENING in row["teacher_prompt"]
    assert taught


def test_the_teacher_of_trace_knows_the_kind_of_step_and_nothing_else(run):
    """Its prompt is the student's, the sentences of the types, and fixed words: no span text, no answer, no place."""
    seen = 0
    for step in range(1, STEPS + 1):
        for row in generations(run("trace"), step):
            if "teacher_prompt" not in row:
                continue
            seen += 1
            correct = row["acc"] > 0.5
            assert correct, "error spans have no divergence in the preset, so they need no teacher"
            types = row["annotation"]["types"]
            question = re.search(r"What is [^\n]+", row["input"])[0]
            message = prompts.label_prompt(prompts.student_prompt(question), types, correct)
            assert row["teacher_prompt"] == f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
            assert f"Answer: {row['ground_truth']}" not in row["teacher_prompt"]
            assert not any(line in row["teacher_prompt"] for line in row["output"].split("\n") if "=" in line)
    assert seen


def test_the_map_of_a_run_with_a_policy_term_adds_up_to_its_loss(run, tmp_path):
    """At a ratio of 1 the policy term is minus the sum of its tokens' weights, beside weight times divergence."""
    run_dir, out = run("trace"), tmp_path / "map"
    answer = CliRunner().invoke(app, ["inspect", str(run_dir), "--step", "1", "--methods", "trace", "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    trained_on = next(line for line in metrics(run_dir) if line["step"] == 2)
    shown = shown_loss(out, "trace"), -shown_loss(out, "trace", "policy")
    assert all(shown), "one of the two terms has nothing to do in this step: the comparison would be weak"
    assert sum(shown) == pytest.approx(trained_on["opd/loss"], rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_the_map_of_a_run_shows_ratios_to_the_policy_that_sampled(run, tmp_path):
    """Rollouts of step 2 by the weights after its two updates: ratios have left 1, and CISPO's cap is far away."""
    out = tmp_path / "map"
    words = ["--step", "2", "--rollouts", "2", "--methods", "cispo,grpo", "--out", str(out)]
    answer = CliRunner().invoke(app, ["inspect", str(run("cispo")), *words])
    assert answer.exit_code == 0, answer.output
    for method in ("cispo", "grpo"):
        page = content(out, f"{method}_0")
        ratio, gate, reward = (unpacked(page[name]) for name in ("ratio", "gate", "reward"))
        assert np.abs(ratio - 1).max() > 1e-3 and np.abs(reward).max() > 0.1
        kept = gate > 0 if method == "grpo" else np.ones(len(gate), dtype=bool)
        assert gate[kept] == pytest.approx(ratio[kept], abs=1e-3)


def test_trace_annotates_what_it_needs_and_reports_the_cost(run):
    for line, step in zip(metrics(run("trace")), range(1, STEPS + 1), strict=True):
        rows = generations(run("trace"), step)
        finished = [row for row in rows if row["acc"] > 0.5 and not row["truncated"]]
        assert line["annotation/calls"] == len(finished)
        assert line.get("spans/coverage", 0.0) <= 0.25
        for row in rows:
            runs = row.get("annotation", {}).get("runs", [])
            assert sum(end - start for start, end, _ in runs) <= row["response_tokens"] // 4
    assert [line["teacher/version"] for line in metrics(run("trace"))] == [0, 0, 2]


@pytest.mark.slow
def test_self_annotation_asks_the_rollout_servers_and_its_failures_are_grpo(run):
    for line in metrics(run("trace-self")):
        assert line["annotation/ok"] < 1 and line["annotation/skipped"] < 1
        assert line["annotation/calls"] > 0 and line["annotation/tokens_in"] > 500 * line["annotation/calls"] * 0.5
        assert line["annotation/tokens_out"] > 0
        assert not line["opd/skipped"], "without spans the policy term alone trains"


@pytest.mark.slow
def test_pieces_of_a_user_are_at_work_in_all_places(run):
    lines, rows = metrics(run("surprise")), generations(run("surprise"), STEPS)
    # Teacher `warm`: the initial model, a copy after step 2, a moving average from step 3 on.
    assert [line["teacher/version"] for line in lines] == [0, 0, 2]
    assert [line["teacher/refreshed"] for line in lines] == [0, 1, 1]
    assert all("The reader is in a hurry." in row["teacher_prompt"] for row in rows)
    assert all(0 < line["opd/divergence"] <= 1 for line in lines), "a squared Hellinger distance"
    assert all(0 < line["opd/credit"] < 1 for line in lines), "some tokens surprise the teacher, and not all"
    assert any(row["annotation"]["types"] == ["hesitation"] for row in rows)
    assert all(math.isfinite(line["actor/pg_loss"]) for line in lines)
