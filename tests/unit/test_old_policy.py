# SPDX-License-Identifier: Apache-2.0
"""Where the old log-probs come from: a pass of their own only where somebody reads what the update cannot give."""

import pytest

from opd_ext.config.checks import check
from opd_ext.config.compose import compose_config
from opd_ext.config.old_policy import old_log_probs, sampler_cap, updates
from opd_ext.plan.memory import phases
from opd_ext.plan.run import read_run
from opd_ext.plan.timing import times

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
CORRECTION = "algorithm.rollout_correction"
GRPO = "recipe=grpo/qwen3_8b"
ALONE = "opd.selftest=false"  # what verl splits or fuses leaves the self-test nothing to compare


def composed(*overrides):
    config = compose_config(list(overrides))
    return config, check(config)


@pytest.mark.parametrize(
    "overrides, source",
    [
        ([GRPO], "update"),
        (["recipe=trace/qwen3_8b"], "update"),
        (["recipe=crisp/qwen3_8b"], "nobody"),
        (["recipe=iw_opd/qwen3_0_6b"], "nobody"),
        (["recipe=iw_opd/qwen3_0_6b", f"{ACTOR}.ppo_mini_batch_size=8"], "pass"),
        (["recipe=cispo/qwen3_8b_base"], "pass"),
        ([GRPO, f"{ACTOR}.ppo_mini_batch_size=16"], "pass"),
        ([GRPO, f"{CORRECTION}.rollout_is=null"], "update"),
        ([GRPO, f"{CORRECTION}.rollout_is=sequence"], "pass"),
        ([GRPO, f"{CORRECTION}.rollout_is_threshold=0.5_2.0"], "pass"),
        ([GRPO, f"{CORRECTION}.rollout_is_batch_normalize=true"], "pass"),
        ([GRPO, f"{CORRECTION}.rollout_rs=token_k1", f"{CORRECTION}.rollout_rs_threshold=0.5_2.0"], "pass"),
        ([GRPO, "algorithm.use_kl_in_reward=true"], "pass"),
        ([GRPO, f"{ACTOR}.shuffle=true"], "pass"),
        ([GRPO, f"{ACTOR}.ulysses_sequence_parallel_size=2"], "update"),
        ([GRPO, "actor_rollout_ref.model.use_fused_kernels=true", ALONE], "pass"),
        (
            [GRPO, f"{CORRECTION}.bypass_mode=true", "opd.policy.anchor=sampler", f"{CORRECTION}.rollout_is=null"],
            "sampler",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else value,
)
def test_a_pass_is_made_only_where_the_update_cannot_stand_for_it(overrides, source):
    config, opd = composed(*overrides)
    assert old_log_probs(config, opd, updates(config)) == source
    run = read_run(config, opd)
    assert ("old log-probs" in {phase.name for phase in phases(run)}) == (source == "pass")
    assert ("old log-probs" in times(run).phases) == (source == "pass")


def test_a_second_pass_over_the_batch_leaves_the_old_policy_behind():
    config, opd = composed(GRPO)
    config.actor_rollout_ref.actor.ppo_epochs = 2  # what the checks refuse today
    assert updates(config) == 2 and old_log_probs(config, opd, updates(config)) == "pass"


def test_a_batch_that_is_longer_than_configured_has_its_pass():
    config, opd = composed(GRPO)
    assert old_log_probs(config, opd, 2) == "pass"


def test_the_cap_of_the_sampler_is_the_configured_one():
    assert sampler_cap(composed(GRPO)[0]) == 2.0
    assert sampler_cap(composed(GRPO, f"{CORRECTION}.rollout_is=null")[0]) is None


def test_the_pass_of_a_method_with_a_teacher_holds_a_chunk_of_logits():
    config, opd = composed("recipe=iw_opd/qwen3_0_6b", f"{ACTOR}.ppo_mini_batch_size=8")
    run = read_run(config, opd)
    phase = next(phase for phase in phases(run) if phase.name == "old log-probs")
    assert "whole logits" not in phase.uses
    assert phase.uses["chunked head"] < 0.2 * run.score_budget * run.student.vocabulary * 4
