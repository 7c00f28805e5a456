# SPDX-License-Identifier: Apache-2.0
"""What clips and caps do to a token is read off verl's loss: against its own words and counts."""

import os

import pytest
import torch

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

from verl.trainer.ppo.core_algos import get_policy_loss_fn

from opd_ext.bridge.recorded_policy import RecordedPolicy
from opd_ext.config import schema
from opd_ext.config.compose import compose_config
from opd_ext.inspection.policy import Watched

LENGTHS = (4, 7, 5, 6)
N = sum(LENGTHS)


def applied(*asked):
    config = compose_config(["scale=cpu_tiny", "actor_rollout_ref.rollout.n=2", *asked])
    return RecordedPolicy(config, schema.load(config.opd).policy)


@pytest.fixture(scope="module")
def rows():
    """Two prompts, a right and a wrong sample each; sampled by a policy that is far from the one at hand."""
    draws = torch.Generator().manual_seed(5)
    found = []
    for i, length in enumerate(LENGTHS):
        mask = [1] * length
        mask[1] = int(i != 3)  # the last has a token that is not trained
        logs = (-3 * torch.rand(length, generator=draws)).tolist()
        found.append(
            {"uid": f"p{i // 2}", "sample": i % 2, "step": 1, "responses": [5] * length, "loss_mask": mask,
             "score": float(i % 2 == 0), "rollout_log_probs": logs}
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def log_prob():
    return -3 * torch.rand(N, generator=torch.Generator().manual_seed(6))


def watched(method, rows, log_prob, current, corrected=False, shape=None):
    advantages = method.advantages(rows)
    tokens = sum(sum(row["loss_mask"]) for row in rows)
    term = Watched(method.terms(rows, advantages.weighed, tokens, len(rows), current, corrected))
    loss = term(log_prob, torch.zeros_like(log_prob), shape)
    return loss, term.signals(torch.cat(advantages.plain)), tokens


def packed(rows, name):
    return torch.tensor([value for row in rows for value in row[name]])


def test_a_clip_takes_a_token_out_where_ppo_does(rows, log_prob):
    loss, found, tokens = watched(applied("method=grpo"), rows, log_prob, current=False)
    mask, ratio = packed(rows, "loss_mask").bool(), (log_prob - packed(rows, "rollout_log_probs")).exp()
    torch.testing.assert_close(found.ratio, ratio)
    better = found.advantage > 0
    out = torch.where(better, ratio > 1.28, (ratio < 0.8) | (ratio > 3.0))  # clip-higher, and the dual clip
    assert 3 < (out & mask).sum() < mask.sum() - 3
    torch.testing.assert_close(found.gate, torch.where(out | ~mask, 0.0, ratio))
    torch.testing.assert_close(found.weight * tokens, found.advantage * found.gate)
    # verl counts what its clip has acted on, the dual one apart.
    padded = [torch.nn.utils.rnn.pad_sequence(v.split(LENGTHS), batch_first=True) for v in
              (packed(rows, "rollout_log_probs"), log_prob, found.advantage, mask.float())]  # fmt: skip
    config = applied("method=grpo").actor
    config.global_batch_info.update(dp_size=1, batch_num_tokens=tokens)
    theirs, told = get_policy_loss_fn("vanilla")(*padded, "token-mean", config)
    acted = told["actor/pg_clipfrac"] + told["actor/pg_clipfrac_lower"]
    assert (out & mask).sum() / mask.sum() == pytest.approx(acted, abs=1e-4)
    torch.testing.assert_close(loss, theirs)


def test_a_cap_leaves_every_token_its_gradient(rows, log_prob):
    """CISPO with cap 1.5; each prompt counts the same, which is in the weight and not in the advantage."""
    method = applied("method=cispo", "actor_rollout_ref.actor.clip_ratio_high=0.5")
    _, found, tokens = watched(method, rows, log_prob, current=False)
    mask = packed(rows, "loss_mask").bool()
    assert (found.ratio > 1.5).sum() > 3
    torch.testing.assert_close(found.gate, torch.where(mask, found.ratio.clamp(max=1.5), 0.0))
    group = torch.tensor([sum(sum(r["loss_mask"]) for r in rows if r["uid"] == row["uid"]) for row in rows])
    scale = 1 / (2 * group.repeat_interleave(torch.tensor(LENGTHS)))
    torch.testing.assert_close(found.weight, found.advantage * found.gate * scale)


def test_in_front_of_its_first_update_a_policy_is_its_own_old_one(rows, log_prob):
    method = applied("method=grpo", "algorithm.rollout_correction.rollout_is=token")
    loss, found, tokens = watched(method, rows, log_prob, current=True, corrected=True)
    mask = packed(rows, "loss_mask")
    assert found.ratio.eq(1).all() and torch.equal(found.gate, mask.float())
    # vLLM and the trainer differ: tokens are weighed for that, which is neither a clip nor a cap.
    correction = (log_prob - packed(rows, "rollout_log_probs")).exp().clamp(max=2.0)
    torch.testing.assert_close(found.weight * tokens, found.advantage * correction * mask)
    torch.testing.assert_close(loss, -found.weight.sum())


def test_a_token_without_an_advantage_has_a_gate_all_the_same(rows, log_prob):
    def nothing(advantages):
        return advantages * 0.0

    _, found, _ = watched(applied("method=grpo"), rows, log_prob, current=False, shape=nothing)
    assert not found.weight.any() and not found.advantage.any()
    mask = packed(rows, "loss_mask").bool()
    assert torch.equal(found.gate == 0, (found.ratio > 1.28) | ~mask)  # as a token of positive advantage
