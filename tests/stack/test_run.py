# SPDX-License-Identifier: Apache-2.0
"""CRISP on the real stack: data parallel 2, teacher refresh, weight sync, and the student that is its own teacher."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from opd_ext.bridge import checkpoint
from opd_ext.cli import app
from opd_ext.report.metrics import undescribed
from tests.stack.conftest import ROOT, finish, metrics, shards
from tests.stack.replay import in_prompt_order, replay
from tests.unit.inspection.folder import shown_loss


@pytest.fixture(scope="module")
def two_ranks(train, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("two_ranks") / "run"
    output = train.alone(
        run_dir,
        "trainer.n_gpus_per_node=2",
        "trainer.total_training_steps=6",
        "opd.teacher.interval=4",
        "data.train_batch_size=16",
    )
    return run_dir, output


def equal(a: list[dict], b: list[dict]) -> bool:
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


def test_the_divergence_falls_while_the_teacher_stands_still(two_ranks):
    values = [line["opd/divergence"] for line in metrics(two_ranks[0])[:4]]
    assert values[-1] < 0.7 * values[0], values


def test_the_teacher_is_used_in_the_version_that_the_schedule_says(two_ranks):
    from opd_ext.teacher.kinds import teacher_version

    lines = metrics(two_ranks[0])
    assert [line["teacher/version"] for line in lines] == [teacher_version(step, 4) for step in range(1, 7)]
    assert [line["teacher/age"] for line in lines] == [0, 1, 2, 3, 0, 1]


def test_a_refreshed_teacher_is_the_student_bit_for_bit(two_ranks):
    run_dir = two_ranks[0]
    refreshed = shards(run_dir, 4, "teacher")
    assert len(refreshed) == 2
    assert equal(refreshed, shards(run_dir, 4, "actor"))
    assert equal(shards(run_dir, 6, "teacher"), refreshed)
    assert not equal(shards(run_dir, 6, "actor"), refreshed)
    assert not (run_dir / "checkpoints" / "global_step_3" / "teacher").exists()  # still the initial model


def test_vllm_samples_from_the_weights_that_the_trainer_has(two_ranks):
    # Both sides compute in fp32 with other kernels; 1e-4 nats per token is far above their noise (1e-6) and far
    # below what one optimiser step does to the log-probs at this learning rate (asserted next).
    gaps = [line["opd/rollout_gap"] for line in metrics(two_ranks[0])]
    assert max(gaps) < 1e-4, gaps
    first, last = (shards(two_ranks[0], step, "actor")[0] for step in (1, 6))
    assert max((first[name] - last[name]).abs().max().item() for name in first) > 1e-3


def test_every_step_reports_what_the_specification_lists(two_ranks):
    names = (
        "opd/loss opd/grad_norm opd/lr opd/response_tokens opd/student_entropy opd/teacher_entropy opd/entropy_diff "
        "opd/divergence opd/divergence_first opd/divergence_eos opd/teacher_log_prob opd/student_log_prob "
        "opd/rollout_gap opd/skipped teacher/version teacher/age teacher/refreshed rollout/accuracy "
        "rollout/tokens_mean rollout/tokens_min rollout/tokens_max rollout/truncated rollout/empty rollout/dropped "
        "timing_s/gen timing_s/update_actor timing_s/refresh_teacher timing_s/update_weights timing_s/step "
        "memory/max_memory_allocated_gb memory/cpu_memory_used_gb training/epoch"
    ).split()
    for line in metrics(two_ranks[0]):
        missing = [name for name in names if not math.isfinite(line.get(name, math.nan))]
        assert not missing, missing
        assert not undescribed(line)


def test_a_run_leaves_its_config_generations_and_readable_console(two_ranks):
    run_dir, output = two_ranks
    assert (run_dir / "config.yaml").exists()
    assert len((run_dir / "generations" / "train_1.jsonl").read_text().splitlines()) == 16
    assert list((run_dir / "tensorboard").rglob("events*"))
    assert "6/6" in output and "entropy" in output
    assert "20,000 prompts to train on, 16 to validate; loading the models" in output
    assert output.index("the stack is up") < output.index("1/6")
    assert not list((run_dir / "checkpoints").glob(".incomplete*"))


VLLM = """
import json, sys
from opd_ext import plugin
plugin.register()
from vllm import LLM, SamplingParams
folder, rows, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
llm = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=256, seed=0, enable_prefix_caching=False)
found = llm.generate([{"prompt_token_ids": ids} for ids in rows], SamplingParams(max_tokens=1, prompt_logprobs=0))
scores = [
    [told[token].logprob for token, told in zip(ids[1:], one.prompt_logprobs[1:])] for ids, one in zip(rows, found)
]
open(out, "w").write(json.dumps(scores))
"""


def test_an_exported_model_answers_like_the_trainer_s_weights(two_ranks, train, tmp_path):
    """In transformers and in vLLM, from the shards of two ranks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir, output = two_ranks
    assert f"Model as a Hugging Face folder: opd export {run_dir}" in output
    assert CliRunner().invoke(app, ["export", str(run_dir), "--out", str(tmp_path / "model")]).exit_code == 0
    ranks = shards(run_dir, 6, "actor")
    trained = {name: torch.cat([rank[name] for rank in ranks]) for name in ranks[0]}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    found = model.state_dict()
    assert found.keys() == trained.keys() and all(torch.equal(found[name], trained[name]) for name in trained)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    sampled = [json.loads(line) for line in (run_dir / "generations" / "train_6.jsonl").read_text().split("\n")[:4]]
    prompts = [tokenizer(row["input"], add_special_tokens=False)["input_ids"] for row in sampled]
    outputs = [tokenizer(row["output"], add_special_tokens=False)["input_ids"] for row in sampled]
    rows = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [train.stack.python, "-c", VLLM, str(tmp_path / "model"), json.dumps(rows), str(tmp_path / "scores.json")]
    finish(command, train.environment | settings, tmp_path)
    gaps = []
    for prompt, ids, scores in zip(prompts, rows, json.loads((tmp_path / "scores.json").read_text()), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = expected[torch.arange(len(ids) - 1), ids[1:]].tolist()
        first = len(prompt) - 1
        assert len(scores) == len(expected) > first
        gaps += [abs(a - b) for a, b in zip(scores[first:], expected[first:], strict=True)]
    # nats, of sampled tokens; other kernels in fp32 (measured: 3e-6)
    assert len(gaps) > 40 and max(gaps) < 1e-5


@pytest.mark.parametrize("step", [2, 4])  # beside the initial model, and beside a teacher that was refreshed
def test_the_map_of_a_run_adds_up_to_the_loss_that_it_trained_on(two_ranks, tmp_path, step):
    """Weight times divergence over all tokens of the next step's rollouts: transformers against FSDP on two ranks."""
    run_dir, out = two_ranks[0], tmp_path / "map"
    words = ["inspect", str(run_dir), "--step", str(step), "--methods", "crisp", "--out", str(out)]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    trained_on = next(line["opd/loss"] for line in metrics(run_dir) if line["training/global_step"] == step + 1)
    assert shown_loss(out, "crisp") == pytest.approx(trained_on, rel=1e-3)


def test_a_self_teacher_is_measured_by_what_it_would_answer(two_ranks, tmp_path, monkeypatch):
    """The model of the first step samples from its teacher's prompts, which ask to be brief."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from self_teacher import main

    main(two_ranks[0], n=2, date="2026-01-01", out=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rollouts"] == found["prompts"] == found["found"]["all"]["problems"] == 16
    student, teacher = (found["found"]["all"][f"tokens of the {who}"][0] for who in ("student", "teacher"))
    rows = [json.loads(row) for row in (two_ranks[0] / "generations" / "train_1.jsonl").read_text().splitlines()]
    assert student == pytest.approx(sum(row["response_tokens"] for row in rows) / 16, abs=0.01)
    assert 5 < teacher < 0.9 * student


@pytest.mark.slow  # a minute of imports
def test_a_run_without_the_warm_python_computes_the_same_bits(train, tmp_path):
    settings = [*replay(tmp_path / "dump", 2), "opd.teacher.interval=1"]
    train(tmp_path / "warm", *settings)
    in_prompt_order(tmp_path / "dump")
    train.alone(tmp_path / "cold", *settings, "opd.warm_python=false")
    for part in ("actor", "teacher"):
        assert equal(shards(tmp_path / "warm", 2, part), shards(tmp_path / "cold", 2, part))
    names = ("opd/loss", "opd/grad_norm", "opd/divergence", "rollout/tokens_mean")
    for warm, cold in zip(metrics(tmp_path / "warm"), metrics(tmp_path / "cold"), strict=True):
        assert [warm[name] for name in names] == [cold[name] for name in names]


def test_a_student_that_is_its_own_teacher_has_no_loss(train, tmp_path, capsys):
    run_dir = tmp_path / "run"
    train(
        run_dir,
        "opd.context.kind=same",
        "~opd.context.text",
        "~opd.context.strip_suffix",
        "opd.teacher.weights=frozen",
        "actor_rollout_ref.actor.optim.lr=0.0",
        "trainer.total_training_steps=2",
        "trainer.save_freq=-1",
    )
    floor = max(abs(line["opd/divergence"]) for line in metrics(run_dir))
    with capsys.disabled():
        print(f"\nnoise floor of the divergence, student = teacher: {floor:.2e} nats per token")
    # Same weights, same prompts, other packing: what is left is fp32 rounding of log-probs (1e-7 each), squared in KL.
    assert floor < 1e-6


@pytest.fixture(scope="module")
def live(train, tmp_path_factory):
    """A live teacher, and pairs that are one token too long if a prompt of 17 tokens meets a full-length response."""
    run_dir = tmp_path_factory.mktemp("live") / "run"
    train(
        run_dir,
        "opd.teacher.weights=live",
        "trainer.total_training_steps=2",
        "data.max_prompt_length=17",  # the teacher's prompt has one token more
        "opd.max_pair_length=81",  # 17 + 64
    )
    return run_dir


def test_a_pair_that_is_too_long_is_dropped_whole(live):
    rows = [json.loads(row) for row in (live / "generations" / "train_1.jsonl").read_text().splitlines()]
    line = metrics(live)[0]
    dropped = round(line["rollout/dropped"] * len(rows))
    assert 0 < dropped < len(rows)
    assert line["opd/response_tokens"] == sum(row["response_tokens"] for row in rows) - 64 * dropped


def test_a_live_teacher_needs_no_second_model(live):
    run_dir, lines = live, metrics(live)
    assert [line["teacher/age"] for line in lines] == [0, 0]
    assert [line["teacher/version"] for line in lines] == [0, 1]
    assert all(line["opd/divergence"] > 1e-4 for line in lines)  # the instruction alone makes the difference
    assert not (run_dir / "checkpoints" / "global_step_2" / "teacher").exists()


@pytest.mark.slow
def test_a_run_that_collapses_ends_and_its_best_checkpoint_is_kept(train, tmp_path):
    """The first step only warms up, so its weights are the initial ones; the next destroy them (lasgroup/SDPO#25)."""
    console = train(
        tmp_path / "run",
        "opd.teacher.weights=live",
        "trainer.total_training_steps=6",
        "actor_rollout_ref.actor.optim.lr=0.1",
        "actor_rollout_ref.actor.optim.lr_warmup_steps=1",
        "data.val_max_samples=64",
        "trainer.val_before_train=true",
        "trainer.test_freq=1",
        "trainer.max_actor_ckpt_to_keep=1",
    )
    found = [line["val/accuracy"] for line in metrics(tmp_path / "run", "val")]
    ended = len(found) - 1
    assert found[1] == found[0] and 1 < ended < 6 and found[-1] < found[0] / 2
    assert f"collapsed: accuracy is {found[-1]:.1%} at step {ended} and was {found[0]:.1%} at step 1" in console
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [1, ended]
    assert (tmp_path / "run" / "report" / "summary.json").exists()
