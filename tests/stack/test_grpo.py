# SPDX-License-Identifier: Apache-2.0
"""Without a teacher our trainer is verl's, bit for bit: GRPO against ``verl.trainer.main_ppo`` on the same rollouts."""

import json

import pytest
import torch

from tests.stack.conftest import ROOT, SMALL, finish, metrics, shards
from tests.stack.replay import in_prompt_order, replay

STEPS = 2
GROUPS = [
    "data.train_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",  # two updates per batch, so that ratios leave 1
    "actor_rollout_ref.rollout.temperature=1.0",
    "actor_rollout_ref.actor.loss_agg_mode=token-mean",
    "actor_rollout_ref.actor.calculate_entropy=false",
    "algorithm.rollout_correction.rollout_is=null",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
]


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    base = tmp_path_factory.mktemp("grpo")
    settings = [*GROUPS, *replay(base / "dump", STEPS)]
    train(base / "ours", "method=grpo", *settings)
    in_prompt_order(base / "dump")
    log = base / "stock.jsonl"
    stock = [train.stack.python, "-m", "tests.stack.stock_cpu", *SMALL, "method=grpo", f"opd.run_dir={base / 'stock'}"]
    stock += ["trainer.logger=[file]", f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={log}"]
    finish([*stock, *settings], train.environment | {"PYTHONPATH": str(ROOT)}, base)
    # TRACE whose distillation has weight 0: the same policy gradient.
    train(base / "trace", "method=trace", "opd.credit.weight=0.0", *settings)
    return base, [json.loads(line)["data"] for line in log.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("other", ["stock", "trace"])
def test_the_updated_weights_are_the_same_bits(runs, other):
    base, _ = runs
    for step in range(1, STEPS + 1):
        for a, b in zip(shards(base / "ours", step, "actor"), shards(base / other, step, "actor"), strict=True):
            different = [name for name in a if not torch.equal(a[name], b[name])]
            assert a.keys() == b.keys() and not different, (step, different)


@pytest.mark.slow
def test_the_weights_do_change(runs):
    first, last = (shards(runs[0] / "ours", step, "actor")[0] for step in (1, STEPS))
    assert any(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.slow
def test_loss_gradient_norm_and_clip_fraction_are_the_same_numbers(runs):
    base, stock = runs
    names = ("actor/loss", "actor/pg_loss", "actor/grad_norm", "actor/entropy", "actor/pg_clipfrac", "actor/ppo_kl")
    trace = metrics(base / "trace")
    for i, line in enumerate(metrics(base / "ours")):
        assert [line[name] for name in names] == [stock[i][name] for name in names]
        assert [line[name] for name in names] == [trace[i][name] for name in names]
    assert any(line["actor/ppo_kl"] != 0 for line in stock), "the ratio never left 1: the comparison would be weak"


ONCE = [
    *(setting for setting in GROUPS if "ppo_mini_batch_size" not in setting and "rollout_is" not in setting),
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",  # all of the batch: one update
    "actor_rollout_ref.rollout.calculate_log_probs=true",
    "algorithm.rollout_correction.rollout_is=token",
    "algorithm.rollout_correction.rollout_is_threshold=1.01",  # so low that it acts
]


@pytest.fixture(scope="module")
def once(train, tmp_path_factory):
    """One update per batch: verl with its pass for old log-probs, and ours without."""
    base = tmp_path_factory.mktemp("once")
    settings = [*ONCE, *replay(base / "dump", STEPS)]
    train(base / "ours", "method=grpo", *settings)
    in_prompt_order(base / "dump")
    log = base / "stock.jsonl"
    stock = [train.stack.python, "-m", "tests.stack.stock_cpu", *SMALL, "method=grpo", f"opd.run_dir={base / 'stock'}"]
    stock += ["trainer.logger=[file]", f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={log}"]
    finish([*stock, *settings], train.environment | {"PYTHONPATH": str(ROOT)}, base)
    return base, [json.loads(line)["data"] for line in log.read_text().splitlines()]


def test_the_only_update_of_a_batch_needs_no_pass_for_old_log_probs(once):
    base, _ = once
    assert not any("timing_s/old_log_prob" in line for line in metrics(base / "ours"))
    for step in range(1, STEPS + 1):
        for a, b in zip(shards(base / "ours", step, "actor"), shards(base / "stock", step, "actor"), strict=True):
            assert max((a[name].float() - b[name].float()).abs().max().item() for name in a) <= 1e-6


def test_what_verl_makes_of_old_log_probs_is_told_all_the_same(once):
    base, stock = once
    told = ("rollout_corr/", "training/rollout_", "actor/")
    for line, theirs in zip(metrics(base / "ours"), stock, strict=True):
        names = [name for name in theirs if name.startswith(told) and not name.startswith("actor/perf")]
        assert any(name.startswith("rollout_corr/") for name in names) and "actor/entropy" in names
        assert {name: line[name] for name in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-4, abs=1e-5)
