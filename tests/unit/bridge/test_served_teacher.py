# SPDX-License-Identifier: Apache-2.0
"""What of a served teacher needs no server: how requests are cut, what travels, where the projection is read."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from opd_ext.bridge.empty_model import projection
from opd_ext.bridge.served_teacher import ServedTeacher
from opd_ext.bridge.teacher_server import engine_arguments, packed, unpacked
from opd_ext.config.compose import compose_config
from opd_ext.teacher.config import ServingConfig


@pytest.mark.parametrize(
    "lengths, calls",
    [
        ([4, 5, 6], [[0, 1], [2]]),  # 9 of 10 tokens, then the next would be one too many
        ([10, 1], [[0], [1]]),
        ([3, 99, 2, 2], [[0], [1], [2, 3]]),  # what is longer than a request is one by itself
        ([], []),
    ],
)
def test_a_request_holds_whole_sequences_in_order(lengths, calls):
    teacher = object.__new__(ServedTeacher)
    teacher.serving = ServingConfig(tokens_per_call=10)
    assert list(teacher._calls(lengths)) == calls


@pytest.mark.parametrize("dtype, width", [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 4)])
def test_what_travels_is_the_tensor_bit_for_bit_and_no_more(dtype, width):
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    content, *rest = packed(tensor[1:, ::2])
    assert content.nbytes == 4 * 4 * width
    back = unpacked(content, *rest)
    assert back.dtype is dtype and torch.equal(back, tensor[1:, ::2])
    back.zero_()  # it is a copy, since what Ray brings cannot be written to


@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["one_file", "several_files"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_projection_is_read_alone(tmp_path, tied, size):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=67, num_key_value_heads=1, head_dim=16, tie_word_embeddings=tied, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=size)
    found = projection(str(tmp_path))
    assert found.dtype is torch.bfloat16 and torch.equal(found, model.lm_head.weight)


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    Qwen3Config(vocab_size=67, num_hidden_layers=1, architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="have none of lm_head.weight"):
        projection(str(tmp_path))


def test_the_server_computes_as_the_run_says_and_sees_the_whole_pair():
    config = compose_config(["recipe=crisp/qwen3_8b"])
    found = engine_arguments(ServingConfig(engine={"quantization": "fp8"}), config, "/models/teacher")
    assert (found["model"], found["dtype"], found["quantization"]) == ("/models/teacher", torch.bfloat16, "fp8")
    assert found["max_model_len"] == config.opd.max_pair_length <= found["max_num_batched_tokens"]
    assert found["hf_overrides"] == {"head_dtype": "model"} and not found["enable_prefix_caching"]
    small = compose_config(["method=crisp", "scale=cpu_tiny"])
    assert engine_arguments(ServingConfig(), small, "/models/teacher")["dtype"] is torch.float32
