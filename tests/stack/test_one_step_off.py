# SPDX-License-Identifier: Apache-2.0
"""Real runs that sample the next batch while they train: who sampled what, and an exact resume."""

import json
import math
import shutil

import pytest
import torch

from opd_ext.report.metrics import undescribed
from tests.stack.conftest import metrics, shards
from tests.stack.replay import interrupted

STEPS = 4
AHEAD = ["asynchronous=one_step_off", f"trainer.total_training_steps={STEPS}"]
MOVES = "opd.teacher.interval=2"
APART = ["asynchronous=separate_cpu", *AHEAD[1:], MOVES, "trainer.val_before_train=true", "trainer.test_freq=2"]
GROUPS = ["actor_rollout_ref.rollout.n=4", "data.train_batch_size=4"]
METHODS = {
    "iw_opd": ["opd.max_teacher_entropy=null"],
    "sdpo": GROUPS,
    "grpo": [*GROUPS, "algorithm.rollout_correction.rollout_is=token"],
}


def asked(run_dir, step):
    """Names, problems and samples of a step's rollouts."""
    lines = (run_dir / "generations" / f"train_{step}.jsonl").read_text().splitlines()
    return [(row["uid"], row["index"], row["sample"]) for row in map(json.loads, lines)]


@pytest.fixture(scope="module")
def crisp(train, tmp_path_factory):
    """CRISP with a teacher that moves after steps 2 and 4: the run, and its settings."""
    run_dir = tmp_path_factory.mktemp("ahead") / "crisp"
    settings = [*AHEAD, MOVES]
    train(run_dir, *settings)
    return run_dir, settings


def test_every_batch_but_the_first_was_sampled_one_version_earlier(crisp):
    lines = metrics(crisp[0])
    assert [line["policy/lag"] for line in lines] == [0.0, 1.0, 1.0, 1.0]
    assert [line["policy/version"] for line in lines] == [0.0, 0.0, 1.0, 2.0]
    assert all(line["policy/mixed"] == 0.0 and not undescribed(line) for line in lines)
    # Rounding of two engines where the sampler is the student itself, and a policy that has moved where it is not.
    assert lines[0]["opd/rollout_gap"] < 1e-5 < 1e-3 < min(line["opd/rollout_gap"] for line in lines[1:])


def test_the_teacher_moves_on_the_schedule_of_the_trained_policy(crisp):
    assert [line["teacher/version"] for line in metrics(crisp[0])] == [0.0, 0.0, 2.0, 2.0]


def test_the_last_step_leaves_no_batch_behind(crisp):
    """What it would sample nobody would train on; the checkpoint of the one before has the batch of the last."""
    found = {}
    for step in (STEPS - 1, STEPS):
        folder = crisp[0] / "checkpoints" / f"global_step_{step}" / "transfer_queue"
        found[step] = (folder / "controller_state.pkl").read_bytes().count(f"t{step + 1:06d}p00000".encode()) > 0
    assert found == {STEPS - 1: True, STEPS: False}


@pytest.mark.slow
def test_a_step_has_the_prompts_of_a_synchronous_run(train, crisp, tmp_path):
    """Names and seeds are of the step that trains: the first one, whose lag is 0, is the same to the bit."""
    train(tmp_path / "sync", f"trainer.total_training_steps={STEPS}", MOVES)
    for step in range(1, STEPS + 1):
        assert asked(tmp_path / "sync", step) == asked(crisp[0], step)
    first = [(run / "generations" / "train_1.jsonl").read_text() for run in (tmp_path / "sync", crisp[0])]
    assert first[0] == first[1]
    for ours, theirs in zip(*(shards(run, 1, "actor") for run in (tmp_path / "sync", crisp[0])), strict=True):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(train, crisp, tmp_path):
    """What was sampled when it was saved is loaded; the rest is sampled again, by the same seeds and weights."""
    undisturbed, settings = crisp
    killed = tmp_path / "killed"
    interrupted(train, killed, settings, step=2)
    train(killed, *settings)
    for part in ("actor", "teacher"):
        for ours, theirs in zip(shards(killed, STEPS, part), shards(undisturbed, STEPS, part), strict=True):
            assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert [asked(killed, step) for step in (3, 4)] == [asked(undisturbed, step) for step in (3, 4)]
    for name in ("opd/loss", "opd/grad_norm", "opd/rollout_gap", "policy/version", "teacher/version"):
        assert [line[name] for line in metrics(killed)] == [line[name] for line in metrics(undisturbed)], name
    assert "sampled by an earlier version of the policy" in " ".join((killed / "console.log").read_text().split())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_step_on_older_rollouts(train, tmp_path, method):
    run_dir = tmp_path / method
    train(run_dir, f"method={method}", *AHEAD, *METHODS[method])
    lines = metrics(run_dir)
    assert [line["policy/lag_max"] for line in lines] == [0.0, 1.0, 1.0, 1.0]
    assert all(math.isfinite(line["opd/loss"]) and not undescribed(line) for line in lines)
    groups = [asked(run_dir, step) for step in range(1, STEPS + 1)]
    samples = 1 if method == "iw_opd" else 4
    for rows in groups:  # a self-teacher shows a rollout its siblings, so groups are whole
        assert all(sum(row[0] == uid for row in rows) == samples for uid, *_ in rows)
    first, last = (shards(run_dir, step, "actor")[0] for step in (1, STEPS))
    assert any(not torch.equal(first[name], last[name]) for name in first)


@pytest.fixture(scope="module")
def apart(train, tmp_path_factory):
    """The run of ``crisp`` with vLLM on a device of its own."""
    run_dir = tmp_path_factory.mktemp("apart") / "crisp"
    train(run_dir, *APART)
    return run_dir


@pytest.mark.slow
def test_on_devices_of_its_own_vllm_samples_the_same(crisp, apart):
    """Weights that came over gloo are those that came through shared memory, and validation between steps is nothing
    to training."""
    for part in ("actor", "teacher"):
        for ours, theirs in zip(shards(apart, STEPS, part), shards(crisp[0], STEPS, part), strict=True):
            assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    for name in ("opd/loss", "opd/rollout_gap", "policy/version", "policy/lag", "teacher/version"):
        assert [line[name] for line in metrics(apart)] == [line[name] for line in metrics(crisp[0])], name
    assert [line["step"] for line in metrics(apart, "val")] == [0, 2, 4]


@pytest.mark.slow
def test_on_devices_of_its_own_a_resumed_run_ends_with_the_same_bits(train, apart):
    saved = {step: shards(apart, step, "actor") for step in (3, 4)}
    for step in saved:
        shutil.rmtree(apart / "checkpoints" / f"global_step_{step}")
    (apart / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    train(apart, *APART)
    for step, before in saved.items():
        for ours, theirs in zip(shards(apart, step, "actor"), before, strict=True):
            assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
def test_a_served_teacher_goes_with_a_sampler_on_devices_of_its_own(train, tmp_path):
    """Three parts of a run, each with a device: the teacher's answers are those of a synchronous run's first step."""
    served = ["method=opd", "teacher_server=vllm_cpu", "opd.max_teacher_entropy=null", "trainer.total_training_steps=2"]
    train(tmp_path / "apart", *served, "asynchronous=separate_cpu", "opd.credit.rollout_cap=5")
    train(tmp_path / "sync", *served, "opd.credit.rollout_cap=5")
    apart, sync = metrics(tmp_path / "apart"), metrics(tmp_path / "sync")
    assert [line["policy/lag"] for line in apart] == [0.0, 1.0]
    for name in ("opd/loss", "opd/divergence", "opd/teacher_log_prob", "opd/grad_norm"):
        assert apart[0][name] == pytest.approx(sync[0][name], rel=1e-5, abs=1e-7), name
