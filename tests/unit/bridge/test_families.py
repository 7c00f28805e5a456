# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of many architectures through the real engine: right in a pack, right alone, or refused by name.

Public reports of neighbours that leak: ms-swift 9565 and 9618, transformers 46851, slime 1686; of forwards that swallow
``logits_to_keep``: Liger 1319, ms-swift 4506.
"""

import os
import re
import shutil
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3VLConfig

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

from opd_ext.bridge import selftest
from opd_ext.bridge.empty_model import fault
from opd_ext.config.architecture import check_architecture, stateful_layer
from opd_ext.errors import ConfigError
from opd_ext.teacher.kinds import Live
from opd_ext.tinymath.shipped import FOLDER

SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # logits of about unit scale
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR["layer_types"] = ["linear_attention", "full_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
EXPERTS["shared_expert_intermediate_size"] = 16
PACKED = {name: {} for name in "llama qwen2 qwen3 mistral gemma3_text phi3 olmo2 smollm3 glm4 exaone4".split()}
ALONE = {
    "qwen3_next": LINEAR | EXPERTS,
    "qwen3_5_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "doge": {},
    "afmoe": EXPERTS,
    "gpt_oss": EXPERTS | {"num_local_experts": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
}
EAGER = ("gpt_oss", "bloom")  # transformers has no other attention of them on a CPU
PROBES = [
    selftest.Probe(list(range(3, 12)), list(range(40, 47)), [1] * 7, [-1.0] * 7, list(range(20, 25))),
    selftest.Probe(list(range(60, 71)), list(range(80, 90)), [1] * 10, [-1.0] * 10, list(range(30, 42))),
]


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """``examined(config, kind)``: what the self-test finds in a random model of ``config``; a group of one rank."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    from opd_ext.bridge.engine import OPDEngine
    from opd_ext.bridge.teachers import Tutor

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    def examine(config, kind=AutoModelForCausalLM, leaks=False, attention="sdpa", dtype="fp32"):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("model")
        kind.from_config(config).save_pretrained(folder)
        for file in (FOLDER / "base").glob("*token*"):
            shutil.copy(file, folder)
        precision = {"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
        engine = OPDEngine(
            HFModelConfig(
                path=str(folder), override_config={"attn_implementation": attention}, use_remove_padding=True
            ),
            FSDPEngineConfig(strategy="fsdp2", model_dtype="fp32", mixed_precision=precision, use_torch_compile=False),
            FSDPOptimizerConfig(lr=1e-2, total_training_steps=1),
            CheckpointConfig(),
        )
        engine.initialize()
        engine.engine_config.infer_micro_batch_size_per_gpu, engine.tutors = 1, (Tutor(Live()),)
        engine.alone = engine.alone and not leaks
        state = torch.get_rng_state()
        found = selftest.examine(engine, PROBES)
        assert torch.equal(torch.get_rng_state(), state), "a run draws what it would have drawn"
        return found

    yield examine
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", [*PACKED, *ALONE])
def test_a_sequence_beside_others_is_what_it_is_alone(family, examined):
    attention = "eager" if family in EAGER else "sdpa"
    found = examined(AutoConfig.for_model(family, **SIZES | (PACKED | ALONE)[family]), attention=attention)
    assert found["packing"] < 1e-4 and found["head"] < 1e-4
    assert found["alone"] == (family in ALONE)
    assert abs(found["equal_input"]) < 1e-5 < found["teacher_input"], "a live teacher has the student's weights"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", [family for family in ALONE if not family.startswith("qwen3")])
def test_a_model_that_leaks_unannounced_is_found_and_given_passes_of_its_own(family, dtype, examined):
    """What the config is known for is what happens: without that knowledge every one of these reads its neighbour."""
    attention = "eager" if family in EAGER else "sdpa"
    config = AutoConfig.for_model(family, **SIZES | ALONE[family])
    found = examined(config, leaks=True, attention=attention, dtype=dtype)
    assert found["packing"] > found["tolerance"] and found["alone"]


def test_in_bf16_rounding_stops_nothing_and_logits_that_change_behind_the_head_do():
    """Logits up to 50, as real models have them: bf16 keeps them to 0.25 or better."""
    torch.manual_seed(0)
    logits = torch.randn(63, 49152).mul(10)
    labels = logits.softmax(-1).multinomial(1)

    def head(other):
        return (other.log_softmax(-1) - logits.log_softmax(-1)).gather(-1, labels).abs().mean().item()

    bf16 = {"tolerance": selftest.TOLERANCE[torch.bfloat16]}
    assert selftest.report(FOUND | bf16 | {"head": head(logits.bfloat16().float())})[2] is None
    for changed in (30 * torch.tanh(logits / 30), logits / 8, logits * 1.25):
        assert selftest.report(FOUND | bf16 | {"head": head(changed)})[2]


def test_the_gap_of_a_real_model_in_bf16_is_not_warned_of():
    """SmolLM2-135M on a CPU: 0.034 nats between trainer and vLLM, 0.017 between a pack and alone."""
    bf16 = {"tolerance": selftest.TOLERANCE[torch.bfloat16], "alike": selftest.ALIKE[torch.bfloat16]}
    assert selftest.report(FOUND | bf16 | {"sampler": 0.034, "packing": 0.017})[1:] == ([], None)
    assert "look at the dtypes" in selftest.report(FOUND | bf16 | {"sampler": 0.2})[1][0]


def test_a_model_for_text_and_images_is_trained_on_text(examined):
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": []}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    config = Qwen3VLConfig(text_config=SIZES | {"rope_scaling": rope}, vision_config=vision)
    found = examined(config, AutoModelForImageTextToText)
    assert found["packing"] < 1e-4 and found["head"] < 1e-4


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere2", "falcon_h1", "gemma3"])
def test_logits_that_change_behind_the_head_are_refused_by_name(family):
    config = AutoConfig.for_model(family)
    text = config.get_text_config()
    if family == "granite":
        text.logits_scaling = 8.0
    if family == "gemma3":  # nested in the config of a model for text and images
        text.final_logit_softcapping = 30.0
    if family == "falcon_h1":
        text.lm_head_multiplier = 0.5
    with pytest.raises(ConfigError, match=f"my model .{text.model_type}. changes logits after its lm_head"):
        check_architecture(config, "my model")


@pytest.mark.parametrize("family", "qwen3_next qwen3_5 nemotron_h bamba jamba olmo_hybrid minimax mamba2".split())
def test_layers_whose_state_runs_along_the_sequence_are_known_from_the_config(family):
    assert stateful_layer(AutoConfig.for_model(family))


@pytest.mark.parametrize("family", [*PACKED, "qwen3_moe", "mixtral", "deepseek_v3", "llama4_text"])
def test_attention_alone_is_packed(family):
    assert stateful_layer(AutoConfig.for_model(family)) is None
    check_architecture(AutoConfig.for_model(family), "it")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "glm4v"])
def test_a_forward_that_takes_positions_in_a_grid_is_refused_by_name(family):
    """verl's: "position_ids should be a 3D tensor", at the first update."""
    with pytest.raises(ConfigError, match=f"my model .{family}. takes positions in a grid"):
        check_architecture(AutoConfig.for_model(family), "my model")


@pytest.mark.parametrize(
    "family, architecture, attention, why",
    [
        ("gpt2", "GPT2LMHeadModel", "sdpa", "verl builds without an lm_head, as GPT2Model"),
        ("phi", "PhiForCausalLM", "sdpa", "a bias in its lm_head"),
        ("biogpt", "BioGptForCausalLM", "sdpa", "no layers that FSDP could wrap"),
        ("gpt_oss", "GptOssForCausalLM", "sdpa", "no sdpa in transformers: set .*attn_implementation=eager"),
        ("mamba2", "Mamba2ForCausalLM", "flash_attention_2", "no flash_attention_2 in transformers"),
        ("qwen3", None, "sdpa", "names no architectures"),
    ],
)
def test_what_a_worker_would_find_out_late_is_known_from_the_config(family, architecture, attention, why):
    config = AutoConfig.for_model(family, architectures=architecture and [architecture])
    assert re.search(why, fault(config, attention))


@pytest.mark.parametrize("family, kind", [("qwen3", "Qwen3ForCausalLM"), ("gpt_oss", "GptOssForCausalLM")])
def test_what_the_engine_trains_has_no_fault(family, kind):
    """Flash attention may be on the node alone: then the rest is looked at."""
    config = AutoConfig.for_model(family, architectures=[kind])
    assert fault(config, "eager") is None and fault(config, "flash_attention_2") is None


# ---------------------------------------------------------------------- what is said

FOUND = {
    **{"head": 1e-6, "packing": 1e-6, "alone": False, "shared_by": 1},
    **{"tolerance": 1e-3, "alike": 1e-4, "sampler": 1e-6},
    **{"equal_input": 0.0, "teacher_input": 0.3, "teacher_input_token0": 5.4, "teacher_input_rest": 0.1},
    **{"ends": {"tokenizer": [2], "generation_config": [2, 3]}, "equal_weights": True, "untaught": "there is none"},
}
told = partial(pytest.mark.parametrize, "change, warning, stopped")


@told(
    [
        ({}, None, False),
        ({"equal_weights": False, "equal_input": 0.4}, None, False),
        ({"equal_input": 0.4}, "should be equal", False),
        ({"packing": 0.9, "alone": True}, "reads its neighbours", False),
        ({"sampler": 0.1}, "sampler's log-probs differ", False),
        ({"ends": {"tokenizer": [2], "teacher's config": [7]}}, "different tokens", False),
        ({"head": 0.7}, None, True),
        ({"head": 0.7, "shared_by": 2}, None, True),
    ]
)
def test_four_lines_and_one_sentence_for_what_is_wrong(change, warning, stopped):
    lines, warnings, stop = selftest.report(FOUND | change)
    assert len(lines) == 4 and (stop is not None) == stopped
    assert len(warnings) == (warning is not None) and (warning or "") in "".join(warnings)
