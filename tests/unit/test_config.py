# SPDX-License-Identifier: Apache-2.0
"""A wrong configuration is refused before anything starts, in one sentence that names the key."""

import os
import subprocess
import sys

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

import pytest

from opd_ext import train
from opd_ext.config import checks, schema
from opd_ext.config.compose import CONFIG_DIR
from opd_ext.errors import ConfigError

PATHS = ["data.train_files=/data/train.parquet", "data.val_files=/data/val.parquet"]


def check(*overrides: str) -> schema.OPDConfig:
    return checks.check(train.compose_config(list(overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=sdpo", "~opd.credit.importance_cap", "opd.divergence={kind: jsd}", "+opd.divergence.clip=0.05"],
        ["scale=node_8xh200", "data.train_batch_size=16", "++trainer.a.b=c", "trainer.experiment_name='a b'"],
        ["teacher_server=cpu_tiny", "method=opd", "opd.teacher.rate=0.1"],
    ],
)
def test_presets_composed_once_give_what_hydra_gives(overrides, presets_composed_once, monkeypatch):
    quicker = [train.compose_config(overrides) for _ in range(2)]
    monkeypatch.undo()
    assert quicker == [train.compose_config(overrides)] * 2


@pytest.mark.parametrize(
    ("scale", "chosen", "rows"), [("cpu_tiny", "null", 1024), ("node_8xh200", "null", 4096), ("node_8xh200", 512, 512)]
)
def test_a_chunk_of_the_head_has_rows_by_device(scale, chosen, rows, presets_composed_once):
    opd = check("method=crisp", f"scale={scale}", f"opd.head.chunk_size={chosen}", *PATHS)
    assert opd.head.rows(opd.device) == opd.objective(1.0, {}).chunk_size == rows


@pytest.mark.parametrize("method", ["grpo", "cispo"])
def test_what_verl_fuses_for_its_own_losses_is_allowed_there(method, presets_composed_once):
    fused = "actor_rollout_ref.model.use_fused_kernels=true"
    opd = check(f"method={method}", "scale=node_8xh200", "opd.head.fp32=false", "opd.selftest=false", fused, *PATHS)
    assert (opd.method, opd.distils) == (method, False)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("method", sorted(path.stem for path in (CONFIG_DIR / "method").glob("*.yaml")))
def test_ranks_may_share_the_sequences_of_every_method(method, size, presets_composed_once):
    shared = f"actor_rollout_ref.actor.ulysses_sequence_parallel_size={size}"
    adapter = ["actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora.merge=true"]
    opd = check(f"method={method}", "scale=node_8xh200", shared, *(adapter if method == "exopd" else ()), *PATHS)
    assert opd.method == method


def test_groups_of_ranks_and_not_ranks_divide_a_mini_batch(presets_composed_once):
    eight = ("method=crisp", "scale=node_8xh200", "data.train_batch_size=4", *PATHS)
    check(*eight, "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2")
    with pytest.raises(ConfigError, match="divisible by the 8 trainer ranks"):
        check(*eight)
    with pytest.raises(ConfigError, match="divisible by the 2 groups of 4 trainer ranks"):
        check(*eight[:2], "data.train_batch_size=3", "actor_rollout_ref.actor.ulysses_sequence_parallel_size=4", *PATHS)


@pytest.mark.parametrize("scale", ["cpu_tiny", "node_8xh200"])
def test_every_scale_composes_with_crisp(scale):
    opd = check("method=crisp", f"scale={scale}", *PATHS)
    assert (opd.method, opd.scale) == ("crisp", scale)
    assert (opd.teacher.weights, str(opd.context)) == ("periodic", "instruction:v2")
    assert (opd.divergence.kind, opd.divergence.support, opd.divergence.temperature) == ("reverse_kl", "full", 1.0)
    assert opd.reduction == "token-mean" and not opd.policy.present


def test_the_node_carries_the_published_settings_of_crisp():
    config = train.compose_config(["method=crisp", "scale=node_8xh200", *PATHS])
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (actor.optim.lr, actor.optim.weight_decay, list(actor.optim.betas)) == (1e-6, 0.01, [0.9, 0.999])
    assert (actor.optim.lr_scheduler_type, actor.optim.lr_warmup_steps, actor.optim.clip_grad) == ("constant", 0, 1.0)
    assert (config.data.train_batch_size, rollout.n, rollout.temperature, rollout.top_p) == (32, 1, 1.0, 1.0)
    assert (config.opd.teacher.interval, config.opd.max_pair_length) == (50, 10240)
    assert (config.opd.rollout.train_tokens, config.opd.rollout.val_tokens) == (8192, 30000)
    val = rollout.val_kwargs
    assert (val.temperature, val.top_p, val.top_k, val.n) == (0.6, 0.95, 20, 8)
    assert config.trainer.total_training_steps == 100


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["opd.teacher.weights=stale"], ["opd.teacher.weights=stale", "ema", "frozen", "live", "periodic"]),
        (["opd.divergence.kind=kl"], ["opd.divergence.kind=kl", "forward_kl", "jsd", "reverse_kl"]),
        (["opd.divergence.support=most"], ["opd.divergence.support=most", "full", "topk", "sampled"]),
        (["opd.divergence.support=topk"], ["opd.divergence.k", "topk"]),
        (["opd.divergence.support=sampled", "opd.divergence.kind=forward_kl"], ["forward_kl", "sampled", "reverse_kl"]),
        (["opd.divergence.support=sampled", "+opd.divergence.gradient=direct"], ["gradient=direct", "policy"]),
        (
            ["opd.divergence.support=topk", "+opd.divergence.k=8", "+opd.divergence.gradient=policy"],
            ["gradient=policy", "topk", "zero expected gradient"],
        ),
        (["+opd.divergence.gamma=2"], ["opd.divergence.gamma", "reverse_kl", "entry_clip"]),
        (["+opd.divergence.key.kind=forward_kl"], ["opd.divergence.key", "opd.credit.kind=spans"]),
        (["opd.alarms.entropy=shout"], ["opd.alarms.entropy=shout", "off", "rollback", "stop", "warn"]),
        (["opd.alarms.length=rollback", "trainer.save_freq=-1"], ["alarms.length=rollback", "trainer.save_freq"]),
        (["opd.alarms.window=4"], ["opd.alarms.window=4", "at least 8"]),
        (["opd.alarms.length_factor=0.5"], ["opd.alarms.length_factor=0.5", "above 1"]),
        (["opd.alarms.accuracy_drop=2"], ["opd.alarms.accuracy_drop=2", "(0, 1]"]),
        (["opd.alarms.persist=0"], ["opd.alarms.persist=0", "positive"]),
        (["opd.alarms.max_rollbacks=-1"], ["opd.alarms.max_rollbacks=-1", "positive"]),
        (["opd.alarms.rollback_lr=0"], ["opd.alarms.rollback_lr=0", "(0, 1]"]),
        (["opd.context.problem=any"], ["opd.context.problem=any", "another", "own"]),
        (["opd.context.problem=another"], ["problem=another", "kind=instruction shows the same for every problem"]),
        (["method=opd", "opd.context.problem=another"], ["problem=another", "kind=same"]),
        (["opd.credit.placement=late"], ["opd.credit.placement=late", "flat", "prefix", "random"]),
        (["opd.credit.placement=random"], ["placement=random changes nothing", "kind=uniform"]),
        (["method=trace", "opd.credit.placement=flat"], ["placement=flat", "kind=spans", "placement=random"]),
        (["method=grpo", "opd.credit.placement=prefix"], ["placement=prefix needs a divergence"]),
        (["method=rlsd", "opd.credit.placement=prefix"], ["opd.policy.shaping", "opd.credit.placement"]),
        (["opd.credit.placement=prefix", "opd.credit.prefix=0"], ["opd.credit.prefix=0", "(0, 1]"]),
        (["opd.divergence.constant_advantage=-1"], ["constant_advantage", "support=full", "support=sampled"]),
        (["method=opd", "opd.divergence.constant_advantage=0"], ["constant_advantage must not be 0"]),
        (["opd.validation.prompt=both"], ["opd.validation.prompt=both", "student", "teacher"]),
        (["method=opsd", "opd.validation.prompt=teacher"], ["prompt=teacher", "kind=solution", "instruction"]),
        (["method=grpo", "opd.validation.prompt=teacher"], ["prompt=teacher needs a context"]),
        (["opd.context.kind=hint"], ["opd.context.kind=hint", "instruction", "same", "solution"]),
        (["opd.context.text=v9"], ["v9", "v1", "v5"]),
        (["+opd.context.tone=dry"], ["opd.context.tone", "strip_suffix, template, text"]),
        (["opd.context.kind=label", "~opd.context.text", "~opd.context.strip_suffix"], ["label", "annotator"]),
        (["opd.credit.kind=places"], ["opd.credit.kind=places", "uniform", "position"]),
        (["opd.credit.kind=position", "+opd.credit.gama=1"], ["opd.credit.gama", "gamma"]),
        (["opd.credit.kind=spans"], ["opd.credit.kind=spans", "annotator"]),
        (["+opd.credit.hold=5"], ["opd.credit.hold", "opd.policy"]),
        (["+opd.credit.rollout_cap=0"], ["opd.credit.rollout_cap=0", "positive"]),
        (["opd.teacher=null"], ["opd.divergence needs a teacher"]),
        (["opd.divergence=null"], ["nothing to train"]),
        (["method=grpo", "+opd.teacher.weights=ema"], ["opd.teacher needs a divergence"]),
        (["method=grpo", "actor_rollout_ref.rollout.n=1"], ["rollout.n", "at least 2"]),
        (["method=grpo", "+opd.policy.gate=complement"], ["gate=complement", "spans"]),
        (["method=cispo", "actor_rollout_ref.actor.clip_ratio_low=0.2"], ["clip_ratio_low=0.2", "lower bound"]),
        (["method=cispo", "actor_rollout_ref.actor.use_kl_loss=true"], ["CISPO has no KL"]),
        (["method=cispo", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"], ["prompt_mean", "token-sum"]),
        (
            ["method=grpo", "opd.policy.loss=gspo"],
            ["clip_ratio_low=0.2", "set clip_ratio_low=3e-4"],
        ),
        (
            ["method=grpo", "opd.policy.loss=gspo", "actor_rollout_ref.actor.clip_ratio_low=3e-4"],
            ["clip_ratio_high=0.28", "gspo"],
        ),
        (["method=grpo", "critic.enable=true"], ["critic.enable", "no critic"]),
        (["method=grpo", "opd.policy.prompt_mean=true"], ["prompt_mean", "token-sum"]),
        (["method=grpo", "algorithm.adv_estimator=gae"], ["adv_estimator=gae", "critic"]),
        (
            ["method=trace", "actor_rollout_ref.rollout.calculate_log_probs=false"],
            ["rollout_is", "calculate_log_probs"],
        ),
        (
            ["method=sdpo", "opd.divergence={kind: reverse_kl, support: sampled, beta: null}"],
            ["importance_cap", "support=sampled"],
        ),
        (
            ["method=opd", "~opd.credit.rollout_cap", "opd.credit.kind=tip"],
            ["'tip' needs divergence"],
        ),
        (["method=cispo", "algorithm.rollout_correction.bypass_mode=true"], ["bypass_mode", "anchor=sampler"]),
        (["method=trace", "algorithm.filter_groups.enable=true"], ["filter_groups", "teacher still teaches"]),
        (["method=opd", "opd.teacher.weights=frozen"], ["opd.teacher.path", "external"]),
        (["method=opd", "+opd.teacher.backend=server"], ["backend=server", "distillation.enabled"]),
        (["method=opd", "distillation.enabled=true"], ["distillation.enabled", "backend=server"]),
        (["opd.reduction=mean"], ["opd.reduction=mean", "token-mean", "official"]),
        (["+opd.divergence.beta=0.5"], ["opd.divergence.beta", "jsd"]),
        (["opd.divergence.kind=jsd"], ["opd.divergence.beta", "jsd"]),
        (["opd.divergence.kind=jsd", "+opd.divergence.beta=1.0"], ["beta=1.0", "between 0 and 1"]),
        (["+opd.divergence.clip=-1"], ["opd.divergence.clip=-1", "positive"]),
        (["opd.teacher.interval=-1"], ["opd.teacher.interval=-1"]),
        (["opd.teacher.weights=ema", "+opd.teacher.rate=0"], ["opd.teacher.rate=0", "(0, 1]"]),
        (
            ["opd.context.kind=same", "~opd.context.text", "~opd.context.strip_suffix", "opd.teacher.weights=live"],
            ["opd.context.kind=same", "loss 0"],
        ),
        (["opd.rollout.failed=skip"], ["opd.rollout.failed=skip", "stop", "zero"]),
        (["data.filter_overlong_prompts=false"], ["filter_overlong_prompts=false", "set it to true"]),
        (["actor_rollout_ref.rollout.prompt_length=64"], ["prompt_length=64", "data.max_prompt_length=192"]),
        (
            [
                "actor_rollout_ref.model.lora_rank=8",
                "actor_rollout_ref.model.lora.merge=true",
                "actor_rollout_ref.model.target_modules=[q_proj,lm_head]",
            ],
            ["lm_head cannot have an adapter", "all-linear"],
        ),
        (["opd.rollout.train_tokens=999"], ["opd.rollout.train_tokens=999", "data.max_response_length=128"]),
        (["actor_rollout_ref.rollout.max_model_len=300"], ["max_model_len=300", "320"]),
        (["opd.max_pair_length=200"], ["opd.max_pair_length=200", "320"]),
        (["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=300"], ["ppo_max_token_len_per_gpu=300", "384"]),
        (
            ["actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"],
            ["actor.ulysses_sequence_parallel_size=2", "divide the 1 ranks"],
        ),
        (
            ["scale=node_8xh200", "actor_rollout_ref.actor.ulysses_sequence_parallel_size=3"],
            ["actor.ulysses_sequence_parallel_size=3", "divide the 8 ranks"],
        ),
        (
            ["scale=node_8xh200", "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2"],
            ["ref.ulysses_sequence_parallel_size=1", "actor.ulysses_sequence_parallel_size=2", "set the latter"],
        ),
        (
            [
                "scale=node_8xh200",
                "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
                "actor_rollout_ref.model.override_config.attn_implementation=eager",
            ],
            ["attn_implementation=eager", "flash_attention_2 or sdpa", "ulysses_sequence_parallel_size=1"],
        ),
        (["actor_rollout_ref.actor.strategy=fsdp"], ["fsdp2"]),
        (["scale=node_8xh200", "opd.warm_python=true"], ["opd.warm_python=true", "one machine"]),
        (["trainer.nnodes=2"], ["opd.warm_python=true", "one machine"]),
        (["actor_rollout_ref.model.use_remove_padding=false"], ["use_remove_padding", "true"]),
        (["actor_rollout_ref.model.use_fused_kernels=true"], ["use_fused_kernels", "false"]),
        (["actor_rollout_ref.model.use_liger=true"], ["use_liger=true", "set it to false"]),
        (
            ["method=grpo", "actor_rollout_ref.model.use_fused_kernels=true", "opd.head.fp32=true"],
            ["use_fused_kernels=true", "opd.head.fp32=true"],
        ),
        (["method=grpo", "actor_rollout_ref.model.use_fused_kernels=true"], ["use_fused_kernels=true", "selftest"]),
        (["actor_rollout_ref.model.lora_rank=8"], ["LoRA", "lora.merge=true"]),
        (["actor_rollout_ref.model.lora.rank=8"], ["LoRA", "lora_rank"]),
        (["method=opd", "opd.divergence.extrapolation=1.25"], ["extrapolation=1.25", "lora_rank"]),
        (["opd.divergence.extrapolation=1.25"], ["extrapolation=1.25", "support=sampled"]),
        (["opd.teacher.weights=base"], ["opd.teacher.weights=base", "lora_rank", "frozen"]),
        (["actor_rollout_ref.actor.ppo_epochs=2"], ["ppo_epochs=2"]),
        (["trainer.n_gpus_per_node=3"], ["divisible", "3"]),
        (["actor_rollout_ref.actor.ppo_mini_batch_size=24"], ["train_batch_size=32", "24"]),
        (
            ["opd.teacher.weights=ema", "actor_rollout_ref.ref.fsdp_config.model_dtype=bf16"],
            ["opd.teacher.weights=ema", "model_dtype", "fp32"],
        ),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused_by_name(overrides, words, presets_composed_once):
    with pytest.raises(schema.ConfigError) as refusal:
        check(*overrides)
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "override, key",
    [
        ("opd.techer.interval=3", "opd.techer"),
        ("opd.teacher.intervall=3", "opd.teacher.intervall"),
        ("trainer.no_such_key=1", "no_such_key"),
    ],
)
def test_an_unknown_key_is_refused(override, key):
    with pytest.raises(schema.ConfigError, match=key):
        check(override)


def test_a_key_that_the_preset_leaves_at_its_default_needs_no_plus():
    assert check("opd.credit.weight=0.5").credit.weight == 0.5


def test_a_key_added_by_force_is_refused_too():
    with pytest.raises(schema.ConfigError, match="opd.teacher.intervall"):
        check("+opd.teacher.intervall=3")


def test_a_divergence_of_a_users_module_can_be_chosen(tmp_path, monkeypatch):
    (tmp_path / "my_divergence.py").write_text(
        "from opd_ext.divergence.divergences import register_divergence, reverse_kl\n"
        "register_divergence('mine')(lambda *args, **kwargs: 2 * reverse_kl(*args, **kwargs))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert check("opd.divergence.kind=mine", "opd.external_lib=my_divergence").divergence.kind == "mine"
    with pytest.raises(schema.ConfigError, match="no_such_module cannot be imported"):
        check("opd.external_lib=no_such_module")


def test_an_unknown_method_is_refused_with_the_ones_that_exist():
    with pytest.raises(schema.ConfigError, match="crisp"):
        check("method=no_such_method")


def test_missing_inputs_are_named_with_the_command_that_makes_them(tmp_path):
    config = train.compose_config([f"opd.world={tmp_path}/nowhere"])
    with pytest.raises(schema.ConfigError, match=r"model.path=.*nowhere/base does not exist.*opd data tinymath"):
        checks.check_inputs(config)


def test_a_refusal_is_one_sentence_and_status_2_and_does_not_wait_for_verl():
    probe = "import sys; from opd_ext import train; print(train.main(sys.argv[1:]), 'verl' in sys.modules)"
    command = [sys.executable, "-c", probe, "opd.teacher.weights=stale"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith("opd train: opd.teacher.weights=stale ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("scale", ["cpu_tiny", "node_8xh200"])
def test_a_dry_run_passes_verls_validation_and_prints_the_plan(scale, opd_train, capsys):
    assert opd_train(f"scale={scale}", *PATHS, "--dry-run") == 0
    plan = capsys.readouterr().out
    assert "tokens per step" in plan and "passes" in plan


def test_verls_own_objections_are_told_in_one_sentence(opd_train, capsys):
    actor = "actor_rollout_ref.actor"
    micro_batches = [f"{actor}.ppo_micro_batch_size_per_gpu=1", f"{actor}.ppo_micro_batch_size=1"]
    assert opd_train(f"{actor}.use_dynamic_bsz=false", *micro_batches, "--dry-run") == 2
    answer = capsys.readouterr().err
    assert answer.startswith("opd train: verl refuses") and answer.count("\n") == 1
