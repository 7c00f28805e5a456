# SPDX-License-Identifier: Apache-2.0
"""What a plan says is what an independent estimate by hand says, and what real models and optimisers hold."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from opd_ext.config.checks import check
from opd_ext.config.compose import compose_config
from opd_ext.errors import ConfigError
from opd_ext.plan import as_json
from opd_ext.plan.advice import grave
from opd_ext.plan.disk import checkpoint_bytes
from opd_ext.plan.machines import GiB, cpu
from opd_ext.plan.memory import phases
from opd_ext.plan.page import _settings as settings
from opd_ext.plan.run import dtype_bytes, read_run
from opd_ext.plan.shapes import model_shape, of_config
from opd_ext.plan.timing import times

ACTOR, REF, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "actor_rollout_ref.rollout"
FULL_OPSD = ("actor_rollout_ref.model.lora_rank=0", "opd.teacher.weights=frozen")
QWEN3_32B = (
    "recipe=crisp/qwen3_8b", "actor_rollout_ref.model.path=Qwen/Qwen3-32B", f"{ROLLOUT}.tensor_model_parallel_size=1"
)  # fmt: skip
QWEN3_14B_32K = (
    "recipe=crisp/qwen3_14b", "data.max_response_length=32768", "opd.rollout.train_tokens=32768",
    "opd.max_pair_length=36864", f"{ROLLOUT}.max_model_len=36864", f"{ACTOR}.ppo_max_token_len_per_gpu=36864",
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
    ("recipe=trace/qwen3_8b",): 54,
    ("recipe=grpo/qwen3_8b",): 58,
    ("recipe=cispo/qwen3_8b_base",): 46,
    ("recipe=opd/qwen3_0_6b",): 21,
    ("recipe=opsd/qwen3_8b", *FULL_OPSD): 38,
    QWEN3_32B: 101,
    ("recipe=iw_opd/qwen3_0_6b",): 21,
    QWEN3_14B_32K: 72.5,  # 70 to 75
}


@pytest.mark.parametrize("overrides", UPDATE, ids=lambda overrides: overrides[0])
def test_memory_of_the_update_is_that_of_an_estimate_by_hand(overrides):
    assert memory(*overrides)["update"].bytes / GiB == pytest.approx(UPDATE[overrides], rel=0.15)


def test_memory_of_whole_logits_and_their_entropy_is_that_of_an_estimate_by_hand():
    """CISPO's pass for old log-probs: several optimiser steps on a batch need one."""
    assert memory("recipe=cispo/qwen3_8b_base")["old log-probs"].bytes / GiB == pytest.approx(49, rel=0.15)


# Recipes of a node with H200 that fit 80 GB as well, by the same estimate; those that need a setting, with it.
SMALLER = [("recipe=crisp/qwen3_8b",), ("recipe=sdpo/qwen3_8b",), ("recipe=trace/qwen3_8b",), ("recipe=opsd/qwen3_8b",)]


@pytest.mark.parametrize("overrides", SMALLER, ids=lambda overrides: overrides[0])
def test_recipes_for_a_node_fit_cards_of_80_gb(overrides):
    config = compose_config([*overrides, "opd.plan.gpu=h100"])
    assert grave(read_run(config, check(config))) == []


def test_an_entropy_bonus_needs_whole_logits_and_a_metric_does_not():
    bonus = (f"{ACTOR}.entropy_coeff=1e-3",)
    metric, bonus = (memory("recipe=trace/qwen3_8b", *more)["update"] for more in ((), bonus))
    assert bonus.bytes > metric.bytes + 25 * GiB


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
    "recipe=opsd/qwen3_1_7b": (8, 0.5),
    "recipe=iw_opd/qwen3_0_6b": (127, 7.0),
}


@pytest.mark.parametrize("recipe", TIMES)
def test_times_are_those_of_an_estimate_by_hand(recipe):
    taken, (step, hours) = times(plan(recipe, *IN_FULL)), TIMES[recipe]
    assert step / 1.5 < taken.step < step * 1.5
    assert hours / 1.5 < taken.total / 3600 < hours * 1.5


# Seconds of a step of SmolLM2-135M on two EPYC cores with bf16, as the guides of both recipes have measured it on
# 2026-11-26 beside other work, with the mean tokens of a response in it.
ON_A_CPU = {("crisp", 152): 44, ("crisp", 19): 14, ("sdpo", 79): 120}


@pytest.mark.parametrize(("method", "tokens"), ON_A_CPU)
def test_times_on_a_cpu_are_those_that_were_measured(method, tokens):
    run = plan(f"recipe={method}/smollm2_cpu", f"opd.plan.mean_response={tokens}")
    there = replace(run, machine=cpu(cores=2, bf16=True), vllm_width=2, sharding=replace(run.sharding, compute=2))
    step = times(there).step
    assert 1 / 2 < step / ON_A_CPU[method, tokens] < 2  # of cores that others used as well
    slow = replace(run, machine=cpu(cores=2, bf16=False), vllm_width=4, sharding=replace(run.sharding, compute=4))
    assert 1.5 * step < times(slow).step < 2.6 * step  # 2.4 times in products


def test_a_prompt_is_no_longer_than_the_settings_let_it_be():
    run = plan("recipe=sdpo/smollm2_cpu", "opd.plan.mean_prompt=5000")
    shorter = plan("recipe=sdpo/smollm2_cpu", "opd.plan.mean_prompt=192")
    assert run.mean_prompt == 192 and times(run).phases == times(shorter).phases


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
    shared = (f"{ACTOR}.ulysses_sequence_parallel_size=2",)
    half = (*shared, f"{ACTOR}.ppo_max_token_len_per_gpu=17408", f"{ROLLOUT}.log_prob_max_token_len_per_gpu=17408")
    whole, parts = (memory("recipe=grpo/qwen3_8b", *more)["update"].uses for more in ((), half))
    assert parts["layer inputs"] == whole["layer inputs"] / 2
    assert parts["whole logits"] < 0.7 * whole["whole logits"]  # the projection beside them stays whole
    with pytest.raises(ConfigError, match="=17407, shared by 2 ranks, cannot hold one sequence"):
        plan("recipe=grpo/qwen3_8b", *shared, f"{ACTOR}.ppo_max_token_len_per_gpu=17407")
    config = compose_config(["recipe=grpo/qwen3_8b", "opd.plan.gpu=a100_40gb"])
    told = as_json(config, check(config))["advice"]
    assert any("ulysses_sequence_parallel_size=" in sentence for sentence in told), told


def test_activations_that_wait_in_host_memory_are_counted_there():
    """OPD's student has a tied head; 28 layers, of which two are at work."""
    offload = "actor_rollout_ref.model.enable_activation_offload=true"
    for more, use in (
        ((), "layer inputs"),
        (("actor_rollout_ref.model.enable_gradient_checkpointing=false",), "activations"),
    ):
        whole, moved = (memory("recipe=opd/qwen3_0_6b", *more, *each)["update"] for each in ((), (offload,)))
        assert moved.uses[use] == whole.uses[use] * 2 / 28
        assert moved.host - whole.host == whole.uses[use] * 26 / 28
        assert moved.bytes < whole.bytes


LONG = (  # 32k tokens of a response, and what a teacher reads besides
    *("data.max_response_length=32768", "opd.rollout.train_tokens=32768", "opd.max_pair_length=36864"),
    *(f"{ACTOR}.ppo_max_token_len_per_gpu=36864", f"{ROLLOUT}.max_model_len=40960"),
)


def test_long_responses_fit_where_ranks_share_them():
    """CRISP, 14B, 32k: what lies behind a token is cut with it, the teacher's rows included; weights are not."""
    whole = memory("recipe=crisp/qwen3_14b", *LONG)["update"].uses
    shared = (f"{ACTOR}.ulysses_sequence_parallel_size=4", f"{ACTOR}.ppo_max_token_len_per_gpu=9216")
    parts = memory("recipe=crisp/qwen3_14b", *LONG, *shared)["update"].uses
    assert parts["layer inputs"] == whole["layer inputs"] / 4
    head = 151_936 * 5120 * 2  # of the teacher, whole on each rank
    rows = [uses["teacher's rows and head"] - head for uses in (whole, parts)]
    assert rows[1] == rows[0]  # a rank has four times as many responses in its group, and a quarter of each
    assert parts["student weights"] == whole["student weights"]


def test_a_run_with_a_teacher_is_told_that_ranks_may_share_and_the_advice_fits():
    gpu = "opd.plan.gpu=a100_40gb"
    config = compose_config(["recipe=crisp/qwen3_8b", *LONG, gpu])
    told = as_json(config, check(config))["advice"]
    (sentence,) = [each for each in told if "ulysses_sequence_parallel_size=" in each]
    settings = re.findall(r"actor_rollout_ref\.actor\.(?:ulysses|ppo_max)\w+=\d+", sentence)
    assert len(settings) == 2
    run = plan("recipe=crisp/qwen3_8b", *LONG, gpu, *settings)
    assert all(phase.bytes <= 0.97 * run.machine.memory for phase in phases(run) if phase.name == "update")


def test_ranks_are_advised_to_share_only_what_the_heads_allow():
    """SmolLM2 has nine heads of queries: neither two, four nor eight ranks can share them."""
    shapes = [model_shape(name) for name in ("Qwen/Qwen3-8B", "HuggingFaceTB/SmolLM2-135M-Instruct")]
    assert [[ranks for ranks in (2, 3, 4, 8) if shape.shared_by(ranks)] for shape in shapes] == [[2, 4, 8], [3]]


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


def test_a_teacher_that_is_an_adapter_costs_an_adapter():
    """Rank 64 on Qwen3-8B: 174.6 M, in fp32 whatever the student's dtype, over 8 ranks; no second model anywhere."""
    lora = ("actor_rollout_ref.model.lora_rank=64", "actor_rollout_ref.model.lora.merge=true")
    size, shards = 174_587_904 * 4, 8
    base, moving = memory("recipe=opsd/qwen3_8b"), memory("recipe=crisp/qwen3_8b", *lora)
    for name, phase in moving.items():
        assert phase.uses["teacher adapters"] == size / shards and "teacher weights" not in phase.uses, name
        assert "teacher adapters" not in base[name].uses
    assert moving["teacher"].uses["student's adapter"] == size / shards, "kept while the teacher's is in its place"
    narrow = memory("recipe=crisp/qwen3_8b", *lora, f"{ACTOR}.fsdp_config.model_dtype=bf16")["update"].uses
    assert narrow["teacher adapters"] == size / shards and narrow["AdamW moments"] == size / shards
    files = checkpoint_bytes(plan("recipe=crisp/qwen3_8b", *lora))
    assert files["teacher"] == size and files["model"] == (8_190_735_360 + 174_587_904) * 4
    assert "teacher" not in checkpoint_bytes(plan("recipe=crisp/qwen3_8b", *lora, "opd.teacher.weights=trust_region"))
    away = memory("recipe=crisp/qwen3_8b", *lora, f"{ACTOR}.fsdp_config.param_offload=true")["update"]
    assert "teacher adapters" not in away.uses and away.host == size / shards, "made where the student's waits"
    two = "opd.teachers={a: {interval: 5}, b: {weights: ema}, c: {weights: frozen}}"
    several = plan("recipe=crisp/qwen3_8b", *lora, "opd.teacher_key=data_source", two)
    assert checkpoint_bytes(several)["teacher"] == 2 * size and several.teachers == ()


def test_several_teachers_hold_each_set_of_weights_once():
    """Two names of one model and the student itself beside it: one teacher's memory, another head, a share of rows."""
    one = plan("recipe=opd/qwen3_0_6b")
    model = compose_config(["recipe=opd/qwen3_0_6b"]).opd.teacher.path
    entries = (
        f"a: {{path: {model}}}, b: {{path: {model}, weight: 2}}, own: {{weights: live, context: {{kind: solution}}}}"
    )
    several = plan("recipe=opd/qwen3_0_6b", "opd.teacher_key=data_source", f"opd.teachers={{{entries}}}")
    alone, together = ({phase.name: phase.uses for phase in phases(run)} for run in (one, several))
    assert together["update"]["teacher weights"] == alone["update"]["teacher weights"]
    rows, more = "teacher's rows and head", one.student.head * one.sharding.compute
    assert together["update"][rows] == alone["update"][rows] + more
    assert len(several.passes) == 3 and times(several).phases["teacher"] < times(one).phases["teacher"]


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


def test_a_vllm_that_stays_awake_takes_its_share_of_the_update():
    """One step off it samples meanwhile; asleep it keeps its context and graphs alone."""
    asleep, awake = (plan("recipe=crisp/qwen3_8b", *more) for more in ((), ("asynchronous=one_step_off",)))
    for before, after in zip(phases(asleep)[1:], phases(awake)[1:], strict=True):
        assert after.uses["vLLM awake"] > asleep.vllm_share * asleep.machine.memory
        assert before.uses.keys() - after.uses.keys() <= {"vLLM asleep", "vLLM: weights"}
    assert "vLLM awake" not in phases(awake)[0].uses and phases(awake)[0].name == "generation"


def test_a_served_teacher_has_gpus_of_its_own():
    run = plan("recipe=opd/qwen3_0_6b", "teacher_server=node_8xh200", "trainer.n_gpus_per_node=4")
    assert (run.ranks, run.gpus, run.teachers) == (4, 8, ())


@pytest.mark.parametrize(("k", "width"), [(None, 8), (100, 800)])
def test_of_verls_servers_the_plan_says_what_travels(k, width):
    """An int32 and a float32 of every token of prompt and response, or of each of its k likeliest."""
    topk = [] if k is None else [f"opd.divergence={{kind: forward_kl, support: topk, k: {k}}}"]
    words = ["recipe=opd/qwen3_0_6b", "teacher_server=node_8xh200", *topk]
    config = compose_config(words)
    opd = check(config)
    assert as_json(config, opd)["teacher_bytes_per_token"] == width
    told = " ".join(cell for column in settings(config, opd, {}).columns for cell in column.cells)
    pairs = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    most = pairs * (config.data.max_prompt_length + opd.rollout.train_tokens) * width / 1e6
    assert f"{width:,} bytes per token of prompt and response" in told and f"at most {most:,.1f} MB a step" in told
    assert "teacher's answers" not in " ".join(settings(*_beside(words), {}).columns[0].cells)


def _beside(words):
    config = compose_config([word for word in words if "teacher_server" not in word])
    return config, check(config)


def test_a_teacher_on_a_vllm_of_its_own_takes_its_memory_and_passes_there():
    """What comes back stays here: hidden states of a mini-batch and the projection, bfloat16 both."""
    beside, apart = (
        plan("recipe=opd/qwen3_0_6b", "trainer.n_gpus_per_node=4", "opd.teacher.path=Qwen/Qwen3-8B", *more)
        for more in (
            (),
            ("teacher_server=vllm_node_8xh200", "opd.teacher.vllm.tensor_parallel_size=2", "opd.plan.nodes=2"),
        )
    )
    assert (apart.ranks, apart.gpus, apart.teachers, apart.passes) == (4, 12, (), ())
    assert beside.heads == apart.heads and apart.teaches
    updates = [next(phase for phase in phases(run) if phase.name == "update").uses for run in (beside, apart)]
    assert updates[0].pop("teacher weights") == pytest.approx(8190735360 * 2 / 4)
    assert updates[0] == updates[1]
    (server,) = [phase for phase in phases(apart) if phase.name == "teacher servers"]
    assert server.uses["weights"] == 8190735360 * 2 / 2
    assert server.uses["hidden states"] == 16384 * 4096 * 2
    seconds = [times(run).phases for run in (beside, apart)]
    # Twice as many devices make the same passes in half the time; what remains is the wire.
    wire = times(apart).tokens * 4096 * 2 / 6.3e9 / 4
    assert seconds[1]["teacher servers"] - wire == pytest.approx(seconds[0]["teacher"] / 2, rel=0.15)  # no logits there


def test_weights_that_move_are_sent_to_their_server_as_often_as_they_move():
    still, moving = (
        plan("recipe=crisp/qwen3_8b", "teacher_server=vllm_node_8xh200", f"opd.teacher.interval={interval}")
        for interval in (10**6, 1)
    )
    more = times(moving).phases["teacher servers"] - times(still).phases["teacher servers"]
    assert more == pytest.approx(still.student.parameters * 2 / 6.3e9)


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
