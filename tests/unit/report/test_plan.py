# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: its estimate of memory knows what trains."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from opd_ext.config.checks import check
from opd_ext.config.compose import compose_config
from opd_ext.report.plan import memory_per_rank, model_size


def test_gradients_and_moments_are_those_of_the_adapter():
    """Qwen3-1.7B's public dimensions; an adapter of rank 64 has 64 x (inputs + outputs) of every projection."""
    shape = dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, head_dim=128)
    heads = dict(num_attention_heads=16, num_key_value_heads=8, vocab_size=151_936)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, **heads))
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    adapter = sum(64 * (layer.in_features + layer.out_features) for layer in linear if layer is not model.lm_head)
    config = compose_config(["recipe=opsd/qwen3_1_7b"])
    size = model_size("Qwen/Qwen3-1.7B")
    parts = memory_per_rank(config, check(config), size)
    assert parts["gradients"] == pytest.approx(adapter * 4 / 8, rel=0.1)
    assert parts["AdamW moments"] == 2 * parts["gradients"] and parts["teacher weights"] == 0
    config = compose_config(["recipe=crisp/qwen3_8b"])
    parts = memory_per_rank(config, check(config), model_size("Qwen/Qwen3-8B"))
    assert parts["gradients"] == parts["student weights"] == pytest.approx(8.2e9 * 4 / 8)
