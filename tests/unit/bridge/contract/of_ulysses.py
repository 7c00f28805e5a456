# SPDX-License-Identifier: Apache-2.0
"""Contracts of ranks that share sequences, on a group of one; of two and four they are run by the stack's tests."""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from verl.utils import ulysses as theirs
from verl.workers.engine.utils import prepare_micro_batches

from tests.unit.bridge.contract.of_engine import FSDP, HEAD, ROWS, _batch

from .seams import says, seam


@seam(
    "bridge/ulysses.py",
    covers="_attn_implementation",
    pins={
        "verl.utils.ulysses:gather_seq_scatter_heads": "x seq_dim head_dim unpadded_dim_size= group=",
        "verl.utils.ulysses:gather_heads_scatter_seq": "x head_dim seq_dim group=",
        "verl.utils.ulysses:get_ulysses_sequence_parallel_group": "",
        "verl.utils.ulysses:set_ulysses_sequence_parallel_group": "group",
    },
)
def attention(one_rank):
    """Attention trades stretches for heads within the group that is set; transformers takes a function by its name."""
    from opd_ext.bridge import ulysses

    assert theirs.get_ulysses_sequence_parallel_group() is None
    group = torch.distributed.group.WORLD
    theirs.set_ulysses_sequence_parallel_group(group)
    try:
        x = torch.randn(1, 2, 3, 4)
        assert torch.equal(theirs.gather_seq_scatter_heads(x, seq_dim=2, head_dim=1), x)
        assert torch.equal(theirs.gather_heads_scatter_seq(x, head_dim=1, seq_dim=2), x)
        with ulysses.alone():
            assert theirs.get_ulysses_sequence_parallel_group() is None
        assert theirs.get_ulysses_sequence_parallel_group() is group
    finally:
        theirs.set_ulysses_sequence_parallel_group(None)
    # Fewer heads of keys than ranks: verl repeats them one by one, and so do we.
    says(
        "verl.models.transformers.monkey_patch:_ulysses_flash_attention_forward",
        "repeats = max(ulysses_sp_size // key_states.size(2), 1)",
        "if ulysses_sp_size > 1 and position_ids is not None:",
    )
    ulysses.AttentionInterface.register(ulysses.ATTENTION, ulysses._attend)
    assert ALL_ATTENTION_FUNCTIONS[ulysses.ATTENTION] is ulysses._attend


@seam(
    "bridge/engine.py",
    covers="OPDEngine._gather_and_unpad_packed OPDEngine.ulysses_parallel_group "
    "OPDEngine.ulysses_sequence_parallel_size",
    pins={f"{FSDP}_gather_and_unpad_packed": "self tensor pad_size"},
)
def shared_sequences(engine, jagged):
    """A rank's stretch is the width of its input ids; stretches are equal, in order of ranks, padded behind the last.

    Budgets of micro-batches are a rank's, and gradients of what is gathered are multiplied by the number of ranks.
    """
    assert engine.ulysses_parallel_group is None and engine.ulysses_sequence_parallel_size == 1
    whole = torch.arange(9.0)
    assert torch.equal(engine._gather_and_unpad_packed(whole, 0), whole)
    assert torch.equal(engine._gather_and_unpad_packed(whole, 2), whole[:7])
    inputs, outputs = engine.prepare_model_inputs(_batch(jagged))
    assert inputs["input_ids"].shape[1] == sum(map(len, ROWS)) and outputs["pad_size"] == 0
    # Slices and meshes exist with two ranks alone.
    says(
        f"{FSDP}_init_device_mesh",
        'mesh_shape=(dp_size, self.ulysses_sequence_parallel_size), mesh_dim_names=["dp", "sp"]',
        'self.ulysses_parallel_group = self.ulysses_device_mesh["sp"].get_group()',
    )
    says(f"{HEAD}.prepare_model_inputs", "ulysses_pad_and_slice_inputs(", "sp_pad_size = pad_size")
    says("verl.utils.ulysses:slice_input_tensor", "slice(sp_rank * parts, (sp_rank + 1) * parts)")
    says("verl.utils.ulysses:Gather.backward", "grad_output * ctx.sp_world_size")
    parts = prepare_micro_batches(_batch(jagged, budget=5, sp_size=2), dp_group=torch.distributed.group.WORLD)[0]
    assert len(parts) == 1, "nine tokens are two ranks' of five each"
