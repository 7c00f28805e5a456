# SPDX-License-Identifier: Apache-2.0
"""Corruption, attention and loss of masked-diffusion models: reference numbers and definitions."""

import pytest
import torch

from opd_ext.diffusion.masking import (
    attention_argument,
    block_diffusion_mask,
    corrupt,
    draw_mask,
    effective_ratio,
    fill_length,
    row_generator,
    token_weights,
    training_mask,
    union_mask,
)

# The reference losses are float64 sums of 22 terms; the weights are float32, which keeps 7 digits of a loss of about 1.
LOSS = 1e-6


@pytest.fixture(scope="module")
def golden(vectors):
    return vectors("t3s")["dllm"]


def _packed(rows, dtype=torch.bool):
    return torch.tensor([value for row in rows for value in row], dtype=dtype)


class TestReferenceNumbers:
    def test_random_mask(self, golden):
        drawn = [
            draw_mask(torch.tensor(row, dtype=torch.float64), ratio).int().tolist()
            for row, ratio in zip(golden["uniform_draws"], golden["mask_ratio"], strict=True)
        ]
        assert drawn == golden["random_mask"]

    def test_union_and_its_ratio(self, golden):
        rows = zip(golden["random_mask"], golden["selected"], strict=True)
        unions = [union_mask(torch.tensor(drawn), torch.tensor(selected)) for drawn, selected in rows]
        assert [union.int().tolist() for union in unions] == golden["union_mask"]
        ratios = [effective_ratio(union, torch.ones_like(union)).item() for union in unions]
        assert ratios == pytest.approx(golden["effective_mask_ratio"], rel=1e-6)  # float32 quotients

    def test_corrupted_ids(self, golden, vectors):
        rows = zip(vectors("t3s")["inputs"]["response_ids"], golden["union_mask"], strict=True)
        mask_token = golden["mask_token_id"]
        corrupted = [corrupt(torch.tensor(ids), torch.tensor(mask), mask_token).tolist() for ids, mask in rows]
        assert corrupted == golden["corrupted_response_ids"]

    @pytest.mark.parametrize(
        "mask, weighting, loss",
        [
            ("union_mask", "mean", "loss_mean_over_union"),
            ("random_mask", "mean", "loss_random_only_mean"),
            ("union_mask", "inverse_ratio", "loss_inverse_ratio_weighted"),  # of the ratio that was drawn
        ],
    )
    def test_losses(self, golden, mask, weighting, loss):
        rows, log_prob = golden[mask], _packed(golden["denoiser_log_prob"], torch.float64)
        mask = _packed(rows)
        ratio = torch.tensor(golden["mask_ratio"])
        weight = token_weights(mask, [len(row) for row in rows], weighting, ratio)
        count = mask.sum() if weighting == "mean" else len(rows)
        assert (-(log_prob * weight).sum() / count).item() == pytest.approx(golden[loss], abs=LOSS)


class TestWeights:
    def test_the_ratio_of_the_union_gives_every_sequence_the_same_weight(self, golden):
        rows = golden["union_mask"]
        lengths = [len(row) for row in rows]
        weight = token_weights(_packed(rows), lengths, "inverse_ratio")
        assert [part.sum().item() for part in weight.split(lengths)] == pytest.approx([1.0] * len(rows))

    def test_the_drawn_ratio_over_weights_what_selection_enlarged(self, golden):
        rows = golden["union_mask"]
        lengths = [len(row) for row in rows]
        weight = token_weights(_packed(rows), lengths, "inverse_ratio", torch.tensor(golden["mask_ratio"]))
        pairs = zip(golden["effective_mask_ratio"], golden["mask_ratio"], strict=True)
        sums = [part.sum().item() for part in weight.split(lengths)]
        assert sums == pytest.approx([effective / drawn for effective, drawn in pairs])

    def test_the_prompt_in_front_changes_nothing(self):
        response = torch.tensor([True, False, True])
        behind_prompt = torch.cat([torch.zeros(4, dtype=torch.bool), response])
        alone = token_weights(response, [3], "inverse_ratio")
        assert torch.equal(token_weights(behind_prompt, [7], "inverse_ratio")[4:], alone)

    def test_a_sequence_without_a_hidden_token_weighs_nothing(self):
        mask = torch.tensor([False, False, True, False])
        for weighting in ("mean", "inverse_ratio"):
            assert token_weights(mask, [2, 2], weighting).tolist() == [0, 0, 1, 0]

    def test_an_unknown_weighting_is_refused(self):
        with pytest.raises(ValueError, match="choose one of mean, inverse_ratio"):
            token_weights(torch.ones(1, dtype=torch.bool), [1], "ratio")


PROMPT, RESPONSE = 5, 400
IS_RESPONSE = torch.arange(PROMPT + RESPONSE) >= PROMPT


class TestTrainingMask:
    def test_it_is_a_function_of_key_seed_and_epoch(self):
        def mask(key="a", seed=0, epoch=0):
            return training_mask(key, IS_RESPONSE, None, 0.3, 0.8, seed, epoch)

        first = mask()
        torch.rand(7)  # what else is drawn in between does not matter
        assert torch.equal(mask(), first)
        others = [mask(key="b"), mask(seed=1), mask(epoch=1)]
        assert all(not torch.equal(other, first) for other in others)

    def test_seed_and_epoch_do_not_run_into_each_other_or_into_the_key(self):
        draws = {
            torch.rand(1, generator=row_generator(*arguments)).item()
            for arguments in [("a", 1, 11), ("a", 11, 1), ("1\na", 1, 1), ("a", 1, 1)]
        }
        assert len(draws) == 4

    def test_a_longer_prompt_leaves_the_corruption_of_the_response(self):
        longer = torch.cat([torch.zeros(9, dtype=torch.bool), IS_RESPONSE])
        short = training_mask("a", IS_RESPONSE, None, 0.3, 0.8, 0, 0)
        assert torch.equal(training_mask("a", longer, None, 0.3, 0.8, 0, 0)[9:], short)

    def test_the_prompt_is_never_hidden(self):
        everywhere = torch.ones_like(IS_RESPONSE)
        mask = training_mask("a", IS_RESPONSE, everywhere, 1.0, 1.0, 0, 0)
        assert torch.equal(mask, IS_RESPONSE)

    def test_selected_positions_are_always_hidden_and_the_others_as_without_them(self):
        selected = IS_RESPONSE & (torch.arange(len(IS_RESPONSE)) % 3 == 0)
        for epoch in range(5):
            drawn = training_mask("a", IS_RESPONSE, None, 0.0, 1.0, 0, epoch)
            assert torch.equal(training_mask("a", IS_RESPONSE, selected, 0.0, 1.0, 0, epoch), drawn | selected)

    @pytest.mark.parametrize("low, high", [(0.3, 0.8), (0.0, 1.0), (0.5, 0.5)])
    def test_the_expected_ratio_is_r_plus_what_selection_adds(self, low, high):
        selected = torch.zeros_like(IS_RESPONSE)
        selected[PROMPT : PROMPT + RESPONSE // 4] = True
        keys, r = range(400), (low + high) / 2
        drawn, union = (
            torch.stack([training_mask(str(key), IS_RESPONSE, flags, low, high, 0, 0) for key in keys])
            for flags in (None, selected)
        )
        # Five standard errors of 400 ratios, which spread like U(low, high), and of the 160,000 draws below them.
        tolerance = 5 * ((high - low) / 12**0.5 / 20 + 0.5 / 400)
        assert effective_ratio(drawn, IS_RESPONSE).mean().item() == pytest.approx(r, abs=tolerance)
        expected = r + (1 - r) / 4
        assert effective_ratio(union, IS_RESPONSE).mean().item() == pytest.approx(expected, abs=tolerance)

    def test_the_ratio_stays_within_its_bounds(self):
        masks = torch.stack([training_mask(str(key), IS_RESPONSE, None, 0.3, 0.8, 0, 0) for key in range(200)])
        ratios = effective_ratio(masks, IS_RESPONSE)
        margin = 5 * 0.5 / RESPONSE**0.5  # five standard deviations of a share among 400 draws
        assert 0.3 - margin < ratios.min() < 0.35 + margin
        assert 0.75 - margin < ratios.max() < 0.8 + margin

    @pytest.mark.parametrize("low, high", [(0.8, 0.3), (-0.1, 0.5), (0.5, 1.1)])
    def test_bounds_out_of_order_are_refused(self, low, high):
        with pytest.raises(ValueError, match="choose 0 <= low <= high <= 1"):
            training_mask("a", IS_RESPONSE, None, low, high, 0, 0)

    def test_selected_positions_of_another_row_are_refused(self):
        with pytest.raises(ValueError, match="select them on the very token ids"):
            training_mask("a", IS_RESPONSE, IS_RESPONSE[1:], 0.3, 0.8, 0, 0)


class TestAttention:
    @pytest.mark.parametrize("lengths", [[7], [4, 9, 1], [8, 8]])
    @pytest.mark.parametrize("block_size", [1, 3, 4, 32])
    def test_blocks_as_they_are_defined(self, lengths, block_size):
        places = [
            (sequence, kind, position // block_size)
            for sequence, length in enumerate(lengths)
            for kind in ("noised", "clean")
            for position in range(length)
        ]

        def sees(query, key):
            if query[0] != key[0]:
                return False
            if query[1] == "noised":
                return key[2] == query[2] if key[1] == "noised" else key[2] < query[2]
            return key[1] == "clean" and key[2] <= query[2]

        expected = torch.tensor([[sees(query, key) for key in places] for query in places])
        assert torch.equal(block_diffusion_mask(lengths, "block", block_size), expected)

    def test_full_shows_every_sequence_to_itself(self):
        expected = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
        assert torch.equal(block_diffusion_mask([2, 3], "full", 1), expected)

    def test_one_block_hides_the_clean_copy(self):
        visible = block_diffusion_mask([5], "block", 8)
        assert torch.equal(visible, torch.block_diag(torch.ones(5, 5), torch.ones(5, 5)).bool())

    @pytest.mark.parametrize("attention, size, words", [("causal", 1, "full, block"), ("block", 0, "positive number")])
    def test_what_is_not_an_attention_is_refused(self, attention, size, words):
        with pytest.raises(ValueError, match=words):
            block_diffusion_mask([2], attention, size)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_added_to_the_scores_it_hides_what_is_not_visible(self, implementation):
        torch.manual_seed(0)
        visible = torch.rand(2, 6, 6) < 0.5
        visible |= torch.eye(6, dtype=torch.bool)
        query, key, value = torch.randn(3, 2, 1, 6, 4)
        argument = attention_argument(visible, implementation, torch.float32)
        added = ((query @ key.mT) / 2 + argument).softmax(-1) @ value  # 2 is the root of the head's width
        hidden = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None])
        torch.testing.assert_close(added, hidden)

    def test_an_attention_that_ignores_masks_is_refused(self):
        with pytest.raises(ValueError, match="set attn_implementation to sdpa"):
            attention_argument(torch.ones(1, 1, dtype=torch.bool), "flash_attention_2", torch.float32)


def test_a_filled_sequence_ends_with_its_block():
    assert [fill_length(length, 4) for length in (1, 3, 4, 5)] == [3, 1, 0, 3]
