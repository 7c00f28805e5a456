# SPDX-License-Identifier: Apache-2.0
"""What a plan says is what an independent estimate by hand says, and what real models and optimisers hold."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from opd_ext.config.checks import check
from opd_ext.config.compose import compose_config
from opd_ext.errors import ConfigError
from opd_ext.plan import as_json
from opd_ext.plan.disk import checkpoint_bytes
from opd_ext.plan.machines import GiB
from opd_ext.plan.memory import phases
from opd_ext.plan.run import dtype_bytes, read_run
from opd_ext.plan.shapes import model_shape, of_config
from opd_ext.plan.timing import times

ACTOR, REF, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "actor_rollout_ref.rollout"
FULL_OPSD = ("actor_rollout_ref.model.lora_rank=0", "opd.teacher.weights=frozen")
QWEN3_32B = (
    "recipe=crisp/qwen3_8b", "actor_rollout_ref.model.path=Qwen/Qwen3-32B", f"{ROLLOUT}.tensor_model_parallel_size=1"
)  # fmt: skip
IN_FULL = (f"{ROLLOUT}.tensor_model_parallel_size=1", "opd.validation.monitor=null")
"""What the estimates by hand are of: a replica per GPU, every validation of all samples."""


def plan(*overrides):
    config = compose_config(list(overrides))
    return read_run(config, check(config))


def memory(*overrides):
    return {phase.name: phase for phase in phases(plan(*overrides))}


# GiB of the update, 8 x H200, worked out by hand and without this code. Both are worst cases from the same sources
# and count what is alive at a time differently (head and recomputed layer both, or the larger): 15 %.
UPDATE = {
    ("recipe=crisp/qwen3_8b",): 38,
    ("recipe=crisp/qwen3_14b",): 58,
    ("recipe=sdpo/qwen3_8b",): 44,
    # Steps with a teacher; without one, from step 40 on, the entropy of whole logits would be the larger.
    ("recipe=trace/qwen3_8b", f"{ACTOR}.calculate_entropy=false"): 54,
    ("recipe=grpo/qwen3_8b",): 58,
    ("recipe=cispo/qwen3_8b_base",): 46,
    ("recipe=opd/qwen3_0_6b",): 21,
    ("recipe=opsd/qwen3_8b", *FULL_OPSD): 38,
    QWEN3_32B: 101,
}


@pytest.mark.parametrize("overrides", UPDATE, ids=lambda overrides: overrides[0])
def test_memory_of_the_update_is_that_of_an_estimate_by_hand(overrides):
    assert memory(*overrides)["update"].bytes / GiB == pytest.approx(UPDATE[overrides], rel=0.15)


# Seconds of a step, and hours of a run, estimated beforehand with other mean lengths; good to a factor of 1.5.
TIMES = {
    "recipe=crisp/qwen3_8b": (63, 4.0),
    "recipe=crisp/qwen3_14b": (99, 5.3),
    "recipe=sdpo/qwen3_8b": (79, 7.2),
    "recipe=grpo/qwen3_8b": (411, 39),
    "recipe=trace/qwen3_8b": (428, 41),
    "recipe=cispo/qwen3_8b_base": (968, 122),
    "recipe=opd/qwen3_0_6b": (127, 7.0),
    "recipe=opsd/qwen3_8b": (14, 0.9),
}


@pytest.mark.parametrize("recipe", TIMES)
def test_times_are_those_of_an_estimate_by_hand(recipe):
    taken, (step, hours) = times(plan(recipe, *IN_FULL)), TIMES[recipe]
    assert step / 1.5 < taken.step < step * 1.5
    assert hours / 1.5 < taken.total / 3600 < hours * 1.5


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=16, vocab_size=101, tie_word_embeddings=True),
        LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=101),
        Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=32, intermediate_size=96, num_hidden_layers=2,
                       vocab_size=101, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8,
                       num_experts_per_tok=2),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_parameters_and_their_tensors_are_counted_exactly(config):
    with torch.device("meta"):
        parameters = list(AutoModelForCausalLM.from_config(config).parameters())
    shape = of_config(config, "a model", "its config")
    assert (shape.parameters, shape.tensors) == (sum(p.numel() for p in parameters), len(parameters))


def test_an_adapter_is_counted_exactly():
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=101)  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=8, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    shape = of_config(config, "a model", "its config")
    assert shape.adapter(8, "all-linear") == (sum(p.numel() for p in trained), len(trained))


def test_what_used_to_be_wrong_is_right():
    """Each case was once planned from the wrong model, the wrong parameters or the wrong number of shards."""
    uses = memory("recipe=opd/qwen3_0_6b")["update"].uses
    assert uses["teacher weights"] / GiB == pytest.approx(0.94, abs=0.01)  # 4.02 B x 2 bytes / 8
    rows = uses["teacher's rows and head"] / GiB - 151_936 * 2560 * 2 / GiB
    assert rows == pytest.approx(128 * 16_384 * 2560 * 2 / GiB)  # of the teacher's width: 10.0
    uses = memory("recipe=opd/qwen3_0_6b", "opd.teacher.path=Qwen/Qwen3-30B-A3B-Instruct-2507")["update"].uses
    assert uses["teacher weights"] / GiB == pytest.approx(7.1, abs=0.02)
    for recipe in ("grpo/qwen3_8b", "cispo/qwen3_8b_base"):  # neither teacher nor chunked head
        uses = memory(f"recipe={recipe}")["update"].uses
        assert "whole logits" in uses and not any("teacher" in name or "chunked" in name for name in uses)
    uses = memory("recipe=opsd/qwen3_8b")["update"].uses
    # rank 64 x (inputs + outputs) of seven maps of 36 layers: 174.6 M, in fp32 over 8 ranks
    assert uses["AdamW moments"] + uses["gradients"] == pytest.approx(3 * 174_587_904 * 4 / 8)
    nodes = ("recipe=crisp/qwen3_8b", "trainer.nnodes=4", f"{ACTOR}.fsdp_config.fsdp_size=8",
             f"{REF}.fsdp_config.fsdp_size=8")  # fmt: skip
    assert memory(*nodes)["update"].uses["student weights"] == 8_190_735_360 * 4 / 8
    # The first replica alone writes: fp32 weights and two moments, the teacher in bf16, and AdamW's counters.
    assert sum(checkpoint_bytes(plan(*nodes)).values()) == pytest.approx(14 * 8_190_735_360, rel=1e-6)
    moved = memory("recipe=crisp/qwen3_8b", f"{ACTOR}.fsdp_config.param_offload=true")["generation"]
    assert "student weights" not in moved.uses and moved.host == 8_190_735_360 * 4 / 8
    narrow = memory("recipe=crisp/qwen3_8b", f"{REF}.fsdp_config.model_dtype=bfloat16")
    assert narrow["update"].bytes == memory("recipe=crisp/qwen3_8b")["update"].bytes
    assert [dtype_bytes(name) for name in ("32", "float32", "float16", "16", "bf16")] == [4, 4, 2, 2, 2]


def test_a_run_that_overflows_from_step_two_on_is_told_and_what_would_fit():
    """Qwen3-32B: weights 15.3, moments 30.5, teacher 7.6 GiB beside vLLM's 84 of 140."""
    config = compose_config(list(QWEN3_32B))
    (grave, *_) = as_json(config, check(config))["advice"]
    assert grave.startswith("OUT OF MEMORY in generation from step 2 on")
    assert "gpu_memory_utilization=0.5 with" in grave and "optimizer_offload=true" in grave
    remedy = memory(*QWEN3_32B, f"{ACTOR}.fsdp_config.optimizer_offload=true")["generation"]
    assert remedy.bytes < 0.97 * 140.4 * GiB


def test_ranks_that_share_a_sequence_share_its_activations():
    """Ulysses: verl's budget is of each rank, so a pair of 34,816 tokens takes half of it on each of two."""
    shared = (f"{ACTOR}.ulysses_sequence_parallel_size=2", "opd.selftest=false")
    half = (*shared, f"{ACTOR}.ppo_max_token_len_per_gpu=17408", f"{ROLLOUT}.log_prob_max_token_len_per_gpu=17408")
    whole, parts = (memory("recipe=grpo/qwen3_8b", *more)["update"].uses for more in ((), half))
    assert parts["layer inputs"] == whole["layer inputs"] / 2
    assert parts["whole logits"] < 0.7 * whole["whole logits"]  # the projection beside them stays whole
    with pytest.raises(ConfigError, match="=17407, shared by 2 ranks, cannot hold one sequence"):
        plan("recipe=grpo/qwen3_8b", *shared, f"{ACTOR}.ppo_max_token_len_per_gpu=17407")
    config = compose_config(["recipe=grpo/qwen3_8b", "opd.plan.gpu=a100_40gb"])
    told = as_json(config, check(config))["advice"]
    assert any("ulysses_sequence_parallel_size=" in sentence for sentence in told), told


def test_latency_bound_generation_and_large_validations_are_told():
    config = compose_config(
        ["recipe=crisp/qwen3_8b", f"{ROLLOUT}.tensor_model_parallel_size=1", "opd.validation.monitor=null"]
    )
    parallel, validation = as_json(config, check(config))["advice"]
    assert "tensor_model_parallel_size=4 takes it from 52 to 30 s" in parallel
    assert "4,000 of its 4,480 samples are math500" in validation


def test_a_monitor_and_sets_with_a_rhythm_of_their_own_cost_what_they_sample():
    """CRISP: steps 20, 40, 60 and 80 lie between; 64 of MATH-500 and 30 of each AIME once, AIME 2024 in full twice."""
    in_full = "opd.validation.monitor=null"
    few = ("opd.validation.monitor={problems: 64, n: 1}", "opd.validation.sets={aime24: {n: 32, every: 40}}")
    whole, run = plan("recipe=crisp/qwen3_8b", in_full), plan("recipe=crisp/qwen3_8b", *few)
    assert (whole.validations, run.validations) == (2, 2)
    assert [(count, sum(each.samples for each in sets)) for count, sets in whole.meanwhile] == [(4, 4480)]
    assert sum(each.samples for each in run.validation) == 4000 + 960 + 240
    assert [(count, [e.samples for e in sets]) for count, sets in run.meanwhile] == [
        (2, [64, 30, 30]), (2, [64, 960, 30])
    ]  # fmt: skip
    assert times(run).validating < times(whole).validating


def test_a_checkpoint_has_twelve_bytes_per_parameter_and_a_teacher_that_moved():
    files = checkpoint_bytes(plan("recipe=crisp/qwen3_8b"))
    steps = 4 * model_shape("Qwen/Qwen3-8B").tensors * 8
    assert files == {"model": 8_190_735_360 * 4, "optimizer": 8_190_735_360 * 8 + steps, "teacher": 8_190_735_360 * 2}
    assert "teacher" not in checkpoint_bytes(plan("recipe=opd/qwen3_0_6b"))  # an external one stays what it was


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("recipe=crisp/qwen3_8b", "trainer.nnodes=4", f"{ACTOR}.fsdp_config.fsdp_size=8"), "set both alike"),
        (("recipe=opd/qwen3_0_6b", "teacher_server=node_8xh200", "trainer.n_gpus_per_node=8"), "are 12, and there are"),
        (("recipe=crisp/qwen3_8b", "trainer.n_gpus_per_node=16"), "= 16 GPUs, and there are 1 node(s) of 8"),
        (("recipe=crisp/qwen3_8b", "opd.plan.gpu=h300"), "opd.plan.gpu=h300 does not exist"),
        (("recipe=crisp/qwen3_8b", "opd.plan.mfu_train=2"), "opd.plan.mfu_train"),
    ],
)
def test_what_cannot_be_is_refused(overrides, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace(")", r"\)")):
        plan(*overrides)


def test_a_served_teacher_has_gpus_of_its_own():
    run = plan("recipe=opd/qwen3_0_6b", "teacher_server=node_8xh200", "trainer.n_gpus_per_node=4")
    assert (run.ranks, run.gpus, run.teacher) == (4, 8, None)


def test_a_layer_saves_what_autograd_saves():
    """Storages that a layer keeps for its backward pass; log-sums and rotary tables are the per cent between them."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = Qwen3Config(**sizes, head_dim=128, num_hidden_layers=1, vocab_size=64, attn_implementation="sdpa")
    model, tokens = AutoModelForCausalLM.from_config(config), 64
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden, positions = torch.randn(1, tokens, 1024, requires_grad=True), torch.arange(tokens)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.layers[0](hidden, position_embeddings=rotary, position_ids=positions, attention_mask=None)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert of_config(config, "a model", "its config").saved(4) * tokens == pytest.approx(saved, rel=0.02)
