# SPDX-License-Identifier: Apache-2.0
"""Recovering residual transfer on real checkpoints: sharded, tied, and not there."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from opd_ext.pipelines.t3s.merge import MergeError, recovering_residual_transfer


def save(folder, seed, tied=False, shard="10GB", dtype=torch.float32):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model.state_dict()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["10GB", "8KB"])
def test_every_tensor_is_base_plus_residual(tmp_path, tied, shard):
    base, b, f = (save(tmp_path / str(seed), seed, tied, shard) for seed in range(3))
    recovering_residual_transfer(str(tmp_path / "0"), tmp_path / "1", tmp_path / "2", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert merged.keys() == base.keys()
    for name, value in merged.items():
        assert torch.equal(value, base[name] + (f[name] - b[name])), name


def test_the_base_decides_the_dtype(tmp_path):
    save(tmp_path / "0", 0, dtype=torch.bfloat16)
    save(tmp_path / "1", 1), save(tmp_path / "2", 2)
    recovering_residual_transfer(str(tmp_path / "0"), tmp_path / "1", tmp_path / "2", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {value.dtype for value in merged.state_dict().values()} == {torch.bfloat16}


def test_models_with_other_tensors_are_refused(tmp_path):
    save(tmp_path / "0", 0), save(tmp_path / "1", 1, tied=True), save(tmp_path / "2", 2)
    with pytest.raises(MergeError, match="lm_head.weight is in one of"):
        recovering_residual_transfer(str(tmp_path / "0"), tmp_path / "1", tmp_path / "2", tmp_path / "out")
    assert not (tmp_path / "out").exists()
