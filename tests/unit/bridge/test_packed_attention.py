# SPDX-License-Identifier: Apache-2.0
"""Lengths of packed sequences are handed to flash attention, which otherwise asks the device for them in every layer.

The attention is transformers' own; its kernel, which needs a GPU, is replaced by the same function on dense masks.
"""

import pytest
import torch
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, modeling_flash_attention_utils
from verl.utils import tensordict_utils as tu

from opd_ext.bridge.engine import OPDEngine
from opd_ext.bridge.layout import pack_lengths, restarting_positions

LENGTHS = [5, 1, 9]


def varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False, dropout_p=0.0
):
    """What ``flash_attn_varlen_func`` computes, [T, heads, width]; lengths travel to it as host integers."""
    assert int(max_seqlen_q) == int(max_seqlen_k) == max(LENGTHS) and causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    place = torch.arange(len(q))
    sequence = torch.searchsorted(cu_seqlens_q[1:].long(), place, right=True)
    seen = (sequence[:, None] == sequence) & (place[:, None] >= place)
    q, k, v = (each.transpose(0, 1) for each in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=softmax_scale, enable_gqa=True)
    return out.transpose(0, 1)


class HostReads(TorchDispatchMode):
    """Counts operations whose result the host waits for."""

    WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.WAITING
        return func(*args, **(kwargs or {}))


@pytest.fixture
def flash(monkeypatch):
    """transformers believes that a flash attention has been loaded."""
    utils = modeling_flash_attention_utils
    monkeypatch.setattr(utils, "_loaded_implementation", "flash_attention_2", raising=False)
    for name, value in {"_flash_fn": None, "_pad_fn": None, "_unpad_fn": None, "_flash_varlen_fn": varlen}.items():
        monkeypatch.setattr(utils, name, value, raising=False)
    monkeypatch.setattr(utils, "_flash_with_kvcache_fn", None, raising=False)
    process = utils._lazy_define_process_function(varlen)
    monkeypatch.setattr(utils, "_process_flash_kwargs_fn", process, raising=False)


def engine(layers=2, attention="flash_attention_2"):
    """OPDEngine around a small model, as far as its forward pass goes: no process group, no optimiser."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = OPDEngine.__new__(OPDEngine)
    made.module = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=layers, **sizes))
    made.module.config._attn_implementation = attention
    made.use_ulysses_sp, made.pad_to_length = False, None
    return made


def micro_batch() -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(50, (length,), generator=generator) for length in LENGTHS]
    ids = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    settings = {"temperature": 1.0, "use_remove_padding": True, "use_fused_kernels": False}
    return tu.get_tensordict({"input_ids": ids, "position_ids": restarting_positions(ids)}, settings)


def forward(made, told=True):
    """Logits [T, V], gradients, and what the host waited for in the model."""
    inputs, _ = made.prepare_model_inputs(micro_batch())
    if not told:
        inputs = {name: value for name, value in inputs.items() if not name.startswith(("cu_seq", "max_length"))}
    with HostReads() as reads:
        logits = made.module(**inputs, use_cache=False).logits[0]
    made.module.zero_grad()
    logits.square().sum().backward()
    return logits.detach(), [p.grad.clone() for p in made.module.parameters()], reads.count


def test_lengths_are_those_of_the_pack():
    found = pack_lengths(micro_batch()["input_ids"])
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, 5, 6, 15]
    assert found["max_length_q"] == found["max_length_k"] == 9 and isinstance(found["max_length_q"], int)


def test_no_layer_waits_for_the_device_and_without_lengths_each_waits_three_times(flash):
    told = [forward(engine(layers))[2] for layers in (2, 4)]
    untold = [forward(engine(layers), told=False)[2] for layers in (2, 4)]
    assert told[1] == told[0]
    assert untold[1] - untold[0] >= 3 * 2  # flash attention's two integers are read from the device besides


def test_logits_and_gradients_are_the_same_bits_and_those_of_dense_attention(flash):
    logits, gradients, _ = forward(engine())
    same, alike, _ = forward(engine(), told=False)
    assert torch.equal(logits, same) and all(map(torch.equal, gradients, alike))
    dense, others, _ = forward(engine(attention="sdpa"))
    torch.testing.assert_close(logits, dense)
    torch.testing.assert_close(gradients, others)


@pytest.mark.parametrize("change", ["attention", "alone"])
def test_lengths_are_left_out_where_attention_would_not_read_them_so(change):
    made = engine(attention="sdpa" if change == "attention" else "flash_attention_2")
    made.alone = change == "alone"
    assert "cu_seq_lens_q" not in made.prepare_model_inputs(micro_batch())[0]
