# SPDX-License-Identifier: Apache-2.0
"""Reference numbers of CISPO against the loss that runs: verl's own, with the bounds that our preset chooses."""

import os

import pytest
import torch

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig

from opd_ext.policy.advantages import prompt_mean_scale

# verl computes in float64 here but adds 1e-8 to the lengths that it divides by.
EXACT = {"rtol": 1e-8, "atol": 1e-9}
RANGES = ["upper_only_eps_high_0.2", "two_sided_0.2_0.2", "range_0_5", "range_0_4"]
REDUCTIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def loss_of(name, inputs, low, high, reduction="token-mean", advantages=None, weights=None, batch=None):
    """verl's loss and the gradient in the current log-probs."""
    config = ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=0.2,
        clip_ratio_low=low,
        clip_ratio_high=high,
    )
    config.global_batch_info.update(batch or {})
    log_prob = tensor(inputs["log_prob"]).requires_grad_()
    loss, metrics = get_policy_loss_fn(name)(
        old_log_prob=tensor(inputs["old_log_prob"]),
        log_prob=log_prob,
        advantages=tensor(inputs["advantages"]) if advantages is None else advantages,
        response_mask=tensor(inputs["response_mask"]),
        loss_agg_mode=reduction,
        config=config,
        rollout_is_weights=weights,
    )
    loss.backward()
    return loss.detach(), log_prob.grad, metrics


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", RANGES)
def test_loss_and_gradient_for_every_range_of_the_weight(vectors, case, reduction):
    data = vectors("cispo")
    expected, inputs = data["cases"][case], data["inputs"]
    low, high = expected["config"]["clip_ratio_low"], expected["config"]["clip_ratio_high"]
    loss, gradient, metrics = loss_of("cispo", inputs, low, high, reduction)
    torch.testing.assert_close(loss, tensor(expected[reduction]["loss"]), **EXACT)
    torch.testing.assert_close(gradient, tensor(expected[reduction]["grad"]), **EXACT)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(expected["clipfrac"])
    assert metrics["actor/ppo_kl"] == pytest.approx(expected["ppo_kl"])


def test_weights_for_the_rollout_engine(vectors):
    data = vectors("cispo")
    expected = data["cases"]["range_0_5_with_rollout_is_weights"]
    weights = tensor(expected["rollout_is_weights"])
    loss, gradient, _ = loss_of("cispo", data["inputs"], 1.0, 4.0, weights=weights)
    torch.testing.assert_close(loss, tensor(expected["token-mean"]["loss"]), **EXACT)
    torch.testing.assert_close(gradient, tensor(expected["token-mean"]["grad"]), **EXACT)


def test_one_update_per_batch_is_reinforce(vectors):
    data = vectors("cispo")
    inputs = {**data["inputs"], "log_prob": data["inputs"]["old_log_prob"]}
    expected = data["cases"]["on_policy_ratio_1"]["token-mean"]
    loss, gradient, _ = loss_of("cispo", inputs, 1.0, 4.0)
    torch.testing.assert_close(loss, tensor(expected["loss"]), **EXACT)
    torch.testing.assert_close(gradient, tensor(expected["grad"]), **EXACT)
    _, of_ppo, _ = loss_of("vanilla", inputs, 0.2, 0.2)
    torch.testing.assert_close(of_ppo, gradient, **EXACT)


def test_a_mean_per_prompt_through_the_advantages(vectors):
    data = vectors("cispo")
    inputs, expected = data["inputs"], data["cases"]["normalisation_two_groups_range_0_5"]
    scale = prompt_mean_scale([str(group) for group in expected["group"]], tensor(inputs["response_mask"]))
    scaled = tensor(inputs["advantages"]) * scale.double()[:, None]
    loss, gradient, _ = loss_of("cispo", inputs, 1.0, 4.0, "token-sum", advantages=scaled)
    # The scale is a float32 number.
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(loss, tensor(expected["prompt_mean"]["loss"]), **close)
    torch.testing.assert_close(gradient, tensor(expected["prompt_mean"]["grad"]), **close)


def test_every_prompt_weighs_the_same_however_the_batch_is_cut():
    """Two prompts of 2 and 18 tokens, together or each in a mini-batch of its own: the same share of an update each."""
    mask = (torch.arange(18)[None, :] < torch.tensor([2, 18])[:, None]).float()
    for mini_batches, share in ((1, 0.5), (2, 1.0)):
        weights = prompt_mean_scale(["a", "b"], mask, mini_batches)[:, None] * mask
        torch.testing.assert_close(weights.sum(-1), torch.full((2,), share))


def test_ranks_average_to_the_loss_of_the_batch(vectors):
    data = vectors("cispo")
    expected = data["cases"]["data_parallel_range_0_5"]
    batch = {"dp_size": expected["dp_size"], "batch_num_tokens": expected["batch_num_tokens"]}
    losses = []
    for rows in expected["rank_rows"]:
        part = {
            name: [data["inputs"][name][row] for row in rows]
            for name in ("log_prob", "old_log_prob", "advantages", "response_mask")
        }
        losses.append(loss_of("cispo", part, 1.0, 4.0, batch=batch)[0])
    torch.testing.assert_close(torch.stack(losses), tensor(expected["rank_losses"]), **EXACT)
    torch.testing.assert_close(torch.stack(losses).mean(), tensor(expected["mean_over_ranks"]), **EXACT)


def test_broken_ratios_stay_finite(vectors):
    case = vectors("cispo")["cases"]["saturation_range_0_5"]
    loss, gradient, _ = loss_of("cispo", case, 1.0, 4.0)
    torch.testing.assert_close(loss, tensor(case["token-mean"]["loss"]), **EXACT)
    torch.testing.assert_close(gradient, tensor(case["token-mean"]["grad"]), **EXACT)


def test_tokens_that_ppo_would_silence_keep_a_gradient(vectors):
    """Equation 7's mask is PPO's silenced set; with it CISPO would lose what it is for."""
    data = vectors("cispo")
    inputs, cases = data["inputs"], data["cases"]
    mask = tensor(inputs["response_mask"]).bool()
    ratio, advantages = tensor(cases["range_0_5"]["ratio"]), tensor(inputs["advantages"])
    silenced = ((advantages > 0) & (ratio > 1.2) | (advantages < 0) & (ratio < 0.8)) & mask
    assert silenced.int().tolist() == data["properties"]["ppo_silenced_tokens"]
    unified = cases["unified_mask_range_0_5_mask_0.2_0.2"]
    assert (~silenced & mask).double().tolist() == unified["M"]
    loss, gradient, _ = loss_of("cispo", inputs, 1.0, 4.0, advantages=advantages * ~silenced)
    torch.testing.assert_close(loss, tensor(unified["token-mean"]["loss"]), **EXACT)
    torch.testing.assert_close(gradient, tensor(unified["token-mean"]["grad"]), **EXACT)
    _, kept, _ = loss_of("cispo", inputs, 1.0, 4.0)
    assert (kept[silenced] != 0).all()
    _, of_ppo, _ = loss_of("vanilla", inputs, 0.2, 0.2)
    assert (of_ppo[silenced] == 0).all()


def test_the_neighbours_differ(vectors):
    """What PPO with the dual clip and GSPO give on the same numbers."""
    data = vectors("cispo")
    for name, case, low, high, reduction in (
        ("vanilla", "ppo_clip_0.2_0.2_dual_c3", 0.2, 0.2, "token-mean"),
        ("gspo", "gspo_3e-4_4e-4", 3e-4, 4e-4, "seq-mean-token-mean"),
        ("gspo", "gspo_0.5_0.5", 0.5, 0.5, "seq-mean-token-mean"),
    ):
        loss, gradient, _ = loss_of(name, data["inputs"], low, high, reduction)
        torch.testing.assert_close(loss, tensor(data["contrast"][case]["loss"]), **EXACT)
        torch.testing.assert_close(gradient, tensor(data["contrast"][case]["grad"]), **EXACT)


def test_advantages_are_those_of_the_group():
    """verl's estimator, with the unbiased deviation; a uniform group has none."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    mask = torch.ones(4, 2)
    scores = torch.zeros(4, 2)
    scores[:, -1] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    advantages, _ = compute_grpo_outcome_advantage(scores, mask, index=["a", "a", "b", "b"])
    # (1 - 0.5) / (0.7071 + 1e-6), and exactly 0.
    torch.testing.assert_close(advantages[:, 0], torch.tensor([0.707106, -0.707106, 0.0, 0.0]), atol=1e-5, rtol=0)
