# SPDX-License-Identifier: Apache-2.0
"""Ranks that share a sequence: which models can, and that our attention is transformers' own where one rank has all."""

import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3VLConfig

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

from opd_ext.bridge import ulysses
from opd_ext.config.sequence_parallel import _UNTOLD, check_shared
from opd_ext.errors import ConfigError
from tests.unit.bridge.test_families import ALONE, EXPERTS, PACKED, SIZES

WINDOW = {"sliding_window": 3}
SHARED = PACKED | {
    "mistral": WINDOW,
    "qwen2": WINDOW | {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "gemma3_text": WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": WINDOW,
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "starcoder2": {},
    "gpt_neox": {},
    "granite": {},
    "seed_oss": {},
}
LENGTHS = [7, 3, 5]


def _logits(model):
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    ids = torch.arange(20, 20 + sum(LENGTHS))[None]
    with torch.no_grad():
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits


def _model(family, **sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("family", SHARED)
def test_our_attention_is_transformers_where_one_rank_has_the_whole_pack(family):
    """Windows and the sequences of a pack included, which our mask makes from positions alone."""
    model = _model(family, **SHARED[family])
    check_shared(model.config, "it", 2)
    expected = _logits(model)
    ulysses.share_attention(model)
    assert model.config._attn_implementation == ulysses.ATTENTION
    # The same kernel on an equal mask; 1e-5 of logits of unit scale, should another kernel be chosen for another mask.
    assert (_logits(model) - expected).abs().max() < 1e-5 < expected.std()


def test_a_window_is_seen_by_the_comparison():
    """That of two is not that of three."""
    wide, narrow = (_model("mistral", sliding_window=width) for width in (3, 2))
    ulysses.share_attention(narrow)
    assert (_logits(wide) - _logits(narrow)).abs().max() > 1e-2


@pytest.mark.parametrize("family", _UNTOLD)
def test_a_family_that_tells_its_attention_no_positions_is_refused_by_name_and_at_the_latest_by_its_attention(family):
    config = AutoConfig.for_model(family)
    with pytest.raises(ConfigError, match=r"my model has .* layers, which ranks cannot share: set .*size=1"):
        check_shared(config, "my model", 2)
    check_shared(config, "my model", 1)

    def shared():
        model = _model(family, **({"num_local_experts": 4} if family == "llama4_text" else {}))
        ulysses.share_attention(model)
        _logits(model)

    with pytest.raises(ValueError, match="cannot share a sequence"):
        shared()


@pytest.mark.parametrize("family", [*ALONE, "minimax", "qwen3_5"])
def test_layers_whose_state_runs_along_the_sequence_are_not_shared(family):
    with pytest.raises(ConfigError, match="layers, which ranks cannot share"):
        check_shared(AutoConfig.for_model(family, **SIZES | ALONE[family] if family in ALONE else {}), "it", 2)


def test_a_model_for_text_and_images_is_not_shared():
    with pytest.raises(ConfigError, match="it reads images, and its layers ranks cannot share"):
        check_shared(Qwen3VLConfig(), "it", 2)


@pytest.mark.parametrize(
    "heads, keys, fits",
    [(32, 8, {2, 4, 8, 16}), (40, 8, {2, 4, 8}), (9, 3, {3, 9}), (4, None, {2, 4}), (64, 8, {2, 4, 8, 16})],
)
def test_heads_are_dealt_evenly(heads, keys, fits):
    config = AutoConfig.for_model("qwen3" if keys else "gpt_neox", num_attention_heads=heads, num_key_value_heads=keys)
    for ranks in (2, 3, 4, 5, 8, 9, 16):
        if ranks in fits:
            check_shared(config, "it", ranks)
        else:
            with pytest.raises(ConfigError, match=f"it has {heads} heads of queries.*={ranks} ranks cannot share"):
                check_shared(config, "it", ranks)


def test_an_attention_that_ranks_cannot_share_is_an_error():
    model = _model("qwen3")
    model.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="qwen3 under attention eager"):
        ulysses.share_attention(model)


def test_flash_attention_stays_verls_to_patch():
    model = _model("qwen3")
    model.config._attn_implementation = "flash_attention_2"
    ulysses.share_attention(model)
    assert model.config._attn_implementation == "flash_attention_2"
