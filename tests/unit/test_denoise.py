# SPDX-License-Identifier: Apache-2.0
"""Generation with masked-diffusion models: what is decided when, and that rows do not touch each other."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_ext.diffusion.denoise import Denoising, denoise
from opd_ext.diffusion.masking import row_generator

VOCABULARY, MASK, EOS = 23, 22, 2
PROMPTS = [[5, 6, 7], [3], [8, 9, 10, 11, 12, 13, 14, 15, 16], [4, 4, 4, 4]]


def tiny(seed: int = 0, implementation: str = "sdpa") -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,  # probabilities far enough apart that rounding does not swap two of them
        tie_word_embeddings=False,
        attn_implementation=implementation,
    )
    return Qwen3ForCausalLM(config).eval()


class Oracle(torch.nn.Module):
    """A decoder that wants one token at every position, with a logit by which it wants it; it records what it saw."""

    def __init__(self, tokens: list[int], logits: list[float]):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, VOCABULARY)
        self.scores = torch.zeros(len(tokens), VOCABULARY)
        self.scores[torch.arange(len(tokens)), tokens] = torch.tensor(logits)
        self.config, self.device, self.seen = SimpleNamespace(_attn_implementation="sdpa"), torch.device("cpu"), []

    def get_decoder(self):
        return self

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return torch.nn.Identity()

    def forward(self, input_ids, attention_mask, position_ids, use_cache):
        self.seen.append(input_ids[0].tolist())
        return (self.scores[position_ids],)


SURE, UNSURE, DOUBTFUL = 12.0, 4.0, 3.0  # probabilities of 0.9999, 0.71 and 0.48 among 23 tokens


def decoding(**settings) -> Denoising:
    return Denoising(MASK, (EOS,), **{"max_tokens": 8, "block_size": 4, **settings})


@pytest.mark.parametrize("attention", ["block", "full"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
class TestRows:
    def test_a_row_is_the_same_alone_and_beside_others(self, attention, implementation):
        model, how = tiny(implementation=implementation), decoding(attention=attention, threshold=0.6)
        together = denoise(model, PROMPTS, how)
        assert together == [denoise(model, [prompt], how)[0] for prompt in PROMPTS]
        assert denoise(model, PROMPTS, how, batch_size=2) == together
        assert denoise(model, PROMPTS[::-1], how)[::-1] == together

    def test_so_is_a_row_that_was_drawn(self, attention, implementation):
        model, how = tiny(implementation=implementation), decoding(attention=attention, temperature=0.7)

        def generators(keys):
            return [row_generator(str(key), seed=0) for key in keys]

        together = denoise(model, PROMPTS, how, generators(range(4)))
        alone = [denoise(model, [prompt], how, generators([i]))[0] for i, prompt in enumerate(PROMPTS)]
        assert together == alone
        assert denoise(model, PROMPTS, how, generators(range(4, 8))) != together


class TestThreshold:
    def test_everything_sure_is_decided_at_once(self):
        model = Oracle([9] * 8, [SURE] * 8)
        (found,) = denoise(model, [[5]], decoding(max_tokens=7))
        assert found == ([9] * 7, "length")
        assert model.seen == [[5, MASK, MASK, MASK], [5, 9, 9, 9, MASK, MASK, MASK, MASK]]

    def test_without_a_sure_position_the_best_one_is_decided(self):
        model = Oracle([9, 9, 10, 11], [DOUBTFUL, DOUBTFUL, UNSURE, DOUBTFUL])
        denoise(model, [[5]], decoding(max_tokens=3))
        assert model.seen[:2] == [[5, MASK, MASK, MASK], [5, MASK, 10, MASK]]
        assert len(model.seen) == 3  # one position at a time

    def test_a_position_at_the_threshold_is_not_sure(self):
        model = Oracle([9] * 4, [DOUBTFUL] * 4)
        probability = model.scores[0, :MASK].softmax(-1).max().item()  # the mask token does not take part
        denoise(model, [[5]], decoding(max_tokens=3, threshold=probability))
        assert len(model.seen) == 3
        model.seen.clear()
        denoise(model, [[5]], decoding(max_tokens=3, threshold=probability - 1e-6))
        assert len(model.seen) == 1

    def test_a_later_block_waits_for_the_one_before(self):
        model = Oracle([9] * 8, [DOUBTFUL] * 4 + [SURE] * 4)
        denoise(model, [[5]], decoding(max_tokens=7, attention="full"))
        assert [line[4:] for line in model.seen[:3]] == [[MASK] * 4] * 3

    def test_the_mask_token_is_never_generated(self):
        model = Oracle([9] * 4, [UNSURE] * 4)
        model.scores[:, MASK] = SURE
        assert denoise(model, [[5]], decoding(max_tokens=3))[0].ids == [9, 9, 9]


class TestEnd:
    def test_a_response_ends_with_its_first_end_token(self):
        model = Oracle([9, 9, 9, EOS, 9, EOS, 9, 9], [SURE] * 8)
        assert denoise(model, [[5]], decoding()) == [([9, 9, EOS], "stop")]
        assert len(model.seen) == 1  # the next block is not looked at

    def test_what_stands_before_an_end_token_is_decided_first(self):
        model = Oracle([9, 9, 9, EOS], [SURE, DOUBTFUL, UNSURE, SURE])
        assert denoise(model, [[5]], decoding()) == [([9, 9, EOS], "stop")]
        assert len(model.seen) == 3

    def test_an_end_token_of_the_prompt_ends_nothing(self):
        model = Oracle([9] * 4, [SURE] * 4)
        assert denoise(model, [[EOS]], decoding(max_tokens=3)) == [([9, 9, 9], "length")]

    @pytest.mark.parametrize("attention, canvas", [("block", 8), ("full", 7)])
    def test_a_response_stops_at_its_length(self, attention, canvas):
        model = Oracle([9] * 7 + [EOS], [SURE] * 8)
        assert denoise(model, [[5, 5]], decoding(max_tokens=5, attention=attention)) == [([9] * 5, "length")]
        assert len(model.seen[-1]) == canvas  # by blocks the last one is whole, as in training

    def test_a_prompt_that_ends_with_its_block_begins_another(self):
        model = Oracle([9] * 8, [SURE] * 8)
        denoise(model, [[5, 5, 5, 5]], decoding(max_tokens=4))
        assert model.seen == [[5, 5, 5, 5, MASK, MASK, MASK, MASK]]


def test_a_low_temperature_draws_what_is_most_probable():
    model, generators = tiny(), [row_generator(str(i), 0) for i in range(4)]
    # At threshold 0 both decide whole blocks at once; otherwise the order would differ, since a low temperature makes
    # every position sure.
    drawn = denoise(model, PROMPTS, decoding(temperature=1e-3, threshold=0.0), generators)
    assert drawn == denoise(model, PROMPTS, decoding(threshold=0.0))


def test_every_response_is_reported_once_when_it_is_complete():
    reported = {}
    found = denoise(tiny(), PROMPTS, decoding(), finished=lambda index, response: reported.update({index: response}))
    assert [reported[index] for index in range(4)] == found


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"attention": "causal"}, "choose one of full, block"),
        ({"block_size": 0}, "positive number of tokens"),
        ({"temperature": -1.0}, "choose 0 or a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        decoding(**settings)


def test_inputs_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="one generator per prompt"):
        denoise(tiny(), PROMPTS, decoding(temperature=1.0))
    with pytest.raises(ValueError, match="at least one token"):
        denoise(tiny(), [[]], decoding())
