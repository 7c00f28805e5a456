# SPDX-License-Identifier: Apache-2.0
"""The loss of a fine-tuning, through verl's own function, against the reference numbers; and the order of its data."""

import os
import types

import pytest
import torch
from omegaconf.errors import ConfigKeyError

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

from verl.utils import tensordict_utils as tu

from opd_ext.bridge.finetune import Batches, FineTuningWorker, sft_config
from opd_ext.pipelines.settings import TrainConfig, plain
from opd_ext.tokens.finetuning import FineTuning

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}  # float32 sums 33 terms of magnitude 1 to 4


@pytest.fixture(scope="module")
def golden(vectors):
    return vectors("t3s")


def nested(rows, dtype):
    return torch.nested.as_nested_tensor([torch.tensor(row, dtype=dtype) for row in rows], layout=torch.jagged)


def loss(log_probs, masks, response_masks, normalisation, count=None, ranks=1):
    """Of one micro-batch; ``log_probs`` at the place of the token before, as verl's engine returns them."""
    data = tu.get_tensordict(
        {"loss_mask": masks, "response_mask": response_masks},
        {
            "dp_size": ranks,
            "batch_num_tokens": int(masks.values().sum()) if count is None else count,
            "opd_tokens": int(response_masks.values().sum()),
            "pad_mode": "no_padding",
        },
    )
    task = types.SimpleNamespace(train={"normalisation": normalisation}, corruption=None)
    value, _ = FineTuningWorker._loss(types.SimpleNamespace(_task=task), {"log_probs": log_probs}, data)
    return value


def batch(golden, keep, dtype):
    """The golden rows with prompts: log-probs (placeholders where a prompt token is predicted), masks."""
    prompts, logp = golden["inputs"]["prompt_ids"], golden["ar_loss"]["student_log_prob"]
    pairs = list(zip(prompts, logp, keep, strict=True))
    shifted = [[-3.3] * (len(p) - 1) + row + [-3.3] for p, row, _ in pairs]
    masks = [[0] * len(p) + kept for p, _, kept in pairs]
    whole = [[0] * len(p) + [1] * len(row) for p, row, _ in pairs]
    return nested(shifted, dtype), nested(masks, torch.int64), nested(whole, torch.int64)


def arms(golden):
    keep = golden["selection"]["keep"]
    return {
        "sft": [[1] * len(row) for row in keep],
        "t3s": keep,
        "inverse_t3s": [[1 - flag for flag in row] for row in keep],
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normalisation", ["kept-token-mean", "all-token-mean"])
def test_masked_losses(golden, normalisation, dtype):
    for arm, keep in arms(golden).items():
        found = loss(*batch(golden, keep, dtype), normalisation)
        assert found.item() == pytest.approx(golden["ar_loss"]["losses"][arm][normalisation], abs=TOLERANCE[dtype])


@pytest.mark.parametrize("normalisation", ["kept-token-mean", "all-token-mean"])
def test_gradient_reaches_the_kept_tokens_alone(golden, normalisation):
    log_probs, *masks = batch(golden, arms(golden)["t3s"], torch.float64)
    flat = log_probs.values().clone().requires_grad_()
    loss(torch.nested.nested_tensor_from_jagged(flat, log_probs.offsets()), *masks, normalisation).backward()
    expected = golden["ar_loss"]["grad_t3s"][normalisation]
    rows = torch.nested.nested_tensor_from_jagged(flat.grad, log_probs.offsets()).unbind()
    for row, prompt, of_row in zip(rows, golden["inputs"]["prompt_ids"], expected, strict=True):
        assert row[len(prompt) - 1 : -1].tolist() == pytest.approx(of_row, abs=1e-12)
        assert row[: len(prompt) - 1].abs().sum() == row[-1].abs() == 0


def test_packed_layout(golden):
    case = golden["packed"]
    mask = torch.tensor(case["loss_mask"]) * torch.tensor(case["t3s_keep"])
    assert mask.tolist() == case["effective_mask"]
    assert mask.roll(-1).tolist() == case["effective_mask_rolled"]
    rows = nested([case["log_prob_next_token"]], torch.float64)
    found = loss(
        rows, nested([mask.tolist()], torch.int64), nested([case["loss_mask"]], torch.int64), "kept-token-mean"
    )
    assert mask.sum() == case["batch_num_tokens"]
    assert found.item() == pytest.approx(case["loss"], abs=1e-12)


def test_two_ranks_average_to_the_global_mean(golden):
    """Rank i has two of the four rows; each divides by the global count, and FSDP averages."""
    keep, case = arms(golden)["t3s"], golden["data_parallel"]
    count = sum(map(sum, keep))
    found = []
    for rows in (slice(0, 2), slice(2, 4)):
        parts = [
            nested([row.tolist() for row in part.unbind()[rows]], torch.float64)
            for part in batch(golden, keep, torch.float64)
        ]
        masks = [nested([row.long().tolist() for row in part.unbind()], torch.int64) for part in parts[1:]]
        found.append(loss(parts[0], *masks, "kept-token-mean", count=count, ranks=2).item())
    assert found == pytest.approx(case["rank_losses"], abs=1e-12)
    assert sum(found) / 2 == pytest.approx(case["mean"], abs=1e-12)
    assert abs(case["mean"] - case["wrong_mean_of_local_means"]) > 1e-4


def test_kept_and_left_out_sum_to_everything(golden):
    sums = {
        arm: loss(*batch(golden, keep, torch.float64), "all-token-mean").item() for arm, keep in arms(golden).items()
    }
    assert sums["t3s"] + sums["inverse_t3s"] == pytest.approx(sums["sft"], abs=1e-12)


@pytest.mark.parametrize("normalisation", ["kept-token-mean", "all-token-mean"])
def test_a_batch_with_nothing_to_train_is_zero_and_has_a_gradient(golden, normalisation):
    nothing = [[0] * len(row) for row in golden["selection"]["keep"]]
    log_probs, *masks = batch(golden, nothing, torch.float64)
    flat = log_probs.values().clone().requires_grad_()
    found = loss(torch.nested.nested_tensor_from_jagged(flat, log_probs.offsets()), *masks, normalisation)
    found.backward()
    assert found.item() == 0 and flat.grad.abs().sum() == 0


class Numbers:
    """A data set of its own indices."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return index

    def set_epoch(self, epoch):
        self.epoch = epoch


def order(rank=0, ranks=1, seed=1, step=0, epochs=3):
    batches = Batches(Numbers(), list, 4, rank, ranks, seed)
    batches.start_after(step)
    found = []
    for epoch in range(step // len(batches), epochs):
        batches.set_epoch(epoch)
        found += list(batches)
    return found


@pytest.mark.parametrize("step", range(6))
def test_a_run_goes_on_with_the_batches_that_it_would_have_had(step):
    """Within an epoch of two batches and at its end."""
    assert order(step=step) == order()[step:]


def test_epochs_differ_and_every_row_comes_at_most_once_in_each():
    found = order()
    epochs = [sum(found[i : i + 2], []) for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs) and epochs[0] != epochs[1]
    assert order(seed=2) != found


def test_ranks_split_the_batches_of_one():
    halves = [order(rank, 2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(whole) for whole in order()]


def test_settings_reach_verls_own_configuration():
    train = plain(TrainConfig(steps=7, lr=1e-5, min_lr=1e-6, schedule="cosine", warmup_steps=3, save_every=2))
    train["verl"] = {"model": {"use_liger": True, "override_config": {"attn_implementation": "sdpa"}}}
    config = sft_config(FineTuning("/m", "/s", "/out/arm", train, [1], seed=5, device="cpu"))
    optim = config.optim
    assert (optim.lr, optim.lr_scheduler_type, optim.lr_warmup_steps) == (1e-5, "cosine", 3)
    assert optim.min_lr_ratio == pytest.approx(0.1) and optim.lr_warmup_steps_ratio == 0
    assert (config.trainer.total_training_steps, config.trainer.save_freq, config.trainer.seed) == (7, 2, 5)
    assert config.trainer.default_local_dir == "/out/arm/checkpoints" and config.engine.strategy == "fsdp2"
    assert config.model.use_liger and config.model.path == "/m"
    assert config.model.override_config.attn_implementation == "sdpa"


def test_a_key_that_verl_does_not_have_is_refused():
    train = plain(TrainConfig()) | {"verl": {"trainer": {"sav_freq": 1}}}
    with pytest.raises(ConfigKeyError, match="sav_freq"):
        sft_config(FineTuning("/m", "/s", "/out/arm", train, [1], seed=5, device="cpu"))
