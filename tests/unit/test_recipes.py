# SPDX-License-Identifier: Apache-2.0
"""Recipes run from anywhere, plan without a GPU, refuse missing inputs, and carry the published settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from opd_ext.config import checks
from opd_ext.config.compose import compose_config

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = sorted(RECIPES.glob("*/*.sh"))
# Every method that comes from a paper of its own, and the GPU recipe with the settings of that paper.
METHODS = {
    "crisp": "qwen3_8b.sh",
    "grpo": "qwen3_8b.sh",
    "cispo": "qwen3_8b_base.sh",
    "opd": "qwen3_0_6b.sh",
    "iw_opd": "qwen3_0_6b.sh",
    "opsd": "qwen3_1_7b.sh",
    "sdpo": "qwen3_8b.sh",
    "trace": "qwen3_8b.sh",
}
GPU_RECIPES = [f"{method}/{script}" for method, script in METHODS.items()]
# The same settings with another model.
VARIANTS = ["crisp/qwen3_14b.sh", "opsd/qwen3_8b.sh"]

ADAMW = {
    "optimizer": "AdamW",
    "lr_scheduler_type": "constant",
    "lr_warmup_steps": 0,
    "betas": [0.9, 0.999],
    "weight_decay": 0.01,
}


def optimiser(grad_clip: float = 1.0, **settings) -> dict:
    """Settings of the update that every paper states; the defaults are the commonest values."""
    adamw = {f"actor_rollout_ref.actor.optim.{key}": value for key, value in (ADAMW | settings).items()}
    return adamw | {"actor_rollout_ref.actor.grad_clip": grad_clip, "actor_rollout_ref.actor.ppo_epochs": 1}


def batch(prompts: int, rollouts: int, mini: int | None = None) -> dict:
    """Prompts per step, rollouts per prompt, prompts per optimiser step."""
    return {
        "data.train_batch_size": prompts,
        "actor_rollout_ref.rollout.n": rollouts,
        "actor_rollout_ref.actor.ppo_mini_batch_size": mini or prompts,
    }


def sampling(phase: str, temperature: float, top_p: float, top_k: int, n: int | None = None) -> dict:
    """Sampling of `train` or `val`; ``n`` samples per problem in the latter."""
    place = "actor_rollout_ref.rollout" + (".val_kwargs" if phase == "val" else "")
    values = {"temperature": temperature, "top_p": top_p, "top_k": top_k} | ({"n": n, "do_sample": True} if n else {})
    return {f"{place}.{key}": value for key, value in values.items()}


def lengths(train: int, val: int, prompt: int | None = None) -> dict:
    """New tokens at most in training and in validation, and prompt tokens if they are published."""
    return {"opd.rollout.train_tokens": train, "opd.rollout.val_tokens": val} | (
        {"data.max_prompt_length": prompt} if prompt else {}
    )


THINKING = "data.apply_chat_template_kwargs.enable_thinking"
ACTOR = "actor_rollout_ref.actor"

# CRISP, arXiv 2603.05433: the table of hyper-parameters, which it states once for all models.
CRISP = {
    THINKING: True,
    "opd.teacher.weights": "periodic",
    "opd.teacher.interval": 50,
    "opd.context.kind": "instruction",
    "opd.context.text": "v2",
    "opd.divergence.kind": "reverse_kl",
    "opd.divergence.support": "full",
    "opd.divergence.temperature": 1.0,
    "opd.max_pair_length": 10_240,
    "opd.policy": None,
    **batch(32, 1),
    **lengths(train=8192, val=30_000, prompt=1024),
    **sampling("train", 1.0, 1.0, -1),
    **sampling("val", 0.6, 0.95, 20, n=8),
    **optimiser(lr=1e-6),
    "trainer.total_training_steps": 100,
    "trainer.test_freq": 20,
    "trainer.save_freq": 10,
}

# The GRPO run of TRACE (arXiv 2605.10194, table of hyper-parameters); advantages divided by the group's deviation.
GRPO = {
    THINKING: True,
    "opd.divergence": None,
    "opd.policy.loss": "vanilla",
    f"{ACTOR}.policy_loss.loss_mode": "vanilla",
    f"{ACTOR}.clip_ratio_low": 0.2,
    f"{ACTOR}.clip_ratio_high": 0.28,
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.entropy_coeff": 0,
    "algorithm.adv_estimator": "grpo",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.use_kl_in_reward": False,
    "algorithm.rollout_correction.rollout_is": "token",
    "algorithm.rollout_correction.rollout_is_threshold": 2.0,
    "actor_rollout_ref.rollout.calculate_log_probs": True,
    **batch(32, 8),
    **lengths(train=32_768, val=38_912, prompt=2048),
    "actor_rollout_ref.rollout.temperature": 0.6,
    **sampling("val", 0.6, 0.95, 20, n=8),
    **optimiser(lr=1e-5, lr_warmup_steps=10),
    "trainer.total_training_steps": 300,
}

# CISPO, arXiv 2506.13585, equations 4 and 5 and the section on training; cap 5 and DAPO's batch, which it leaves open.
CISPO = {
    "opd.divergence": None,
    "opd.policy.loss": "cispo",
    "opd.policy.prompt_mean": True,
    "opd.head.fp32": True,
    f"{ACTOR}.policy_loss.loss_mode": "cispo",
    f"{ACTOR}.clip_ratio_high": 4.0,
    f"{ACTOR}.clip_ratio_low": 10,
    f"{ACTOR}.loss_agg_mode": "token-sum",
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.entropy_coeff": 0,
    f"{ACTOR}.optim.override_optimizer_config": {"eps": 1e-15},
    "algorithm.adv_estimator": "grpo",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.use_kl_in_reward": False,
    **batch(512, 16, mini=32),
    **sampling("val", 1.0, 0.95, -1, n=32),
    **optimiser(lr=1e-6, betas=[0.9, 0.95]),
}

# The baseline of IW-OPD, arXiv 2606.22600: appendix and released script.
OPD = {
    THINKING: False,
    "opd.seed": 42,
    "opd.teacher.weights": "external",
    "opd.teacher.path": "Qwen/Qwen3-4B-Instruct-2507",
    "opd.context.kind": "same",
    "opd.divergence.kind": "reverse_kl",
    "opd.divergence.support": "sampled",
    "opd.divergence.ratio_clip": 0.2,
    "opd.divergence.dual_clip": 3.0,
    "opd.credit.kind": "uniform",
    "opd.credit.rollout_cap": 5.0,
    "opd.reduction": "seq-mean-token-mean",
    "opd.policy": None,
    "actor_rollout_ref.rollout.calculate_log_probs": True,
    **batch(1024, 1),
    **lengths(train=16_384, val=16_384, prompt=2048),
    **sampling("train", 1.0, 1.0, -1),
    **sampling("val", 1.0, 1.0, -1, n=32),
    **optimiser(lr=1e-5),
    "trainer.total_training_steps": 167,
    "trainer.test_freq": 10,
    "trainer.save_freq": 50,
}
IW_OPD = OPD | {"opd.credit.kind": "position", "opd.credit.gamma": 0.5}

# OPSD, arXiv 2601.18734: the release of March 2026. Its linear decay does not exist in verl, so it is a cosine here.
OPSD = {
    THINKING: False,
    "opd.teacher.weights": "frozen",
    "opd.context.kind": "solution",
    "opd.context.thinking": True,
    "opd.divergence.kind": "forward_kl",
    "opd.divergence.support": "full",
    "opd.divergence.clip": 0.05,
    "opd.divergence.clip_mode": "vocab_max",
    "opd.divergence.temperature": 1.1,
    "opd.max_pair_length": 20_000,
    "opd.reduction": "token-mean",
    "opd.policy": None,
    **batch(32, 1),
    **lengths(train=1024, val=38_912),
    **sampling("train", 1.1, 0.95, 20),
    **sampling("val", 1.0, 0.95, -1, n=12),
    **optimiser(lr=5e-6, lr_scheduler_type="cosine", min_lr_ratio=0.0, weight_decay=0.0, grad_clip=0.1),
    "trainer.total_training_steps": 100,
    "trainer.save_freq": 25,
}

# SDPO, arXiv 2601.20802, the column without rich feedback of its table of hyper-parameters.
SDPO = {
    THINKING: False,
    "opd.teacher.weights": "ema",
    "opd.teacher.rate": 0.05,
    "opd.context.kind": "feedback",
    "opd.context.success_threshold": 0.5,
    "opd.context.exclude_own_success": True,
    "opd.context.remove_thinking": True,
    "opd.context.include_feedback": False,
    "opd.divergence.kind": "jsd",
    "opd.divergence.beta": 0.5,
    "opd.divergence.support": "topk",
    "opd.divergence.k": 100,
    "opd.divergence.topk_by": "student",
    "opd.divergence.tail": "bucket",
    "opd.divergence.temperature": 1.0,
    "opd.credit.importance_cap": 2.0,
    "opd.credit.rollout_cap": 2.0,
    "opd.reduction": "seq-mean-token-mean",
    "opd.denominator": "trained",
    "opd.max_pair_length": 512 + 2048 + 8192 + 8192,
    "opd.policy": None,
    "actor_rollout_ref.rollout.calculate_log_probs": True,
    **batch(32, 8),
    **lengths(train=8192, val=8192, prompt=2048),
    **sampling("train", 1.0, 1.0, -1),
    **sampling("val", 0.6, 0.95, -1, n=16),
    **optimiser(lr=1e-5, lr_warmup_steps=10),
    "trainer.test_freq": 5,
}

# TRACE, arXiv 2605.10194: GRPO as above, and the parameters of the distillation beside it.
TRACE = {
    **{key: value for key, value in GRPO.items() if key != "opd.divergence"},
    "opd.teacher.weights": "periodic",
    "opd.teacher.interval": 10,
    "opd.context.kind": "label",
    "opd.context.thinking": True,
    "opd.divergence.key.kind": "forward_kl",
    "opd.divergence.key.support": "topk",
    "opd.divergence.key.k": 100,
    "opd.divergence.key.clip": 0.05,
    "opd.divergence.key.clip_mode": "vocab_max",
    "opd.divergence.error": None,
    "opd.credit.kind": "spans",
    "opd.credit.weight": 0.5,
    "opd.credit.hold": 10,
    "opd.credit.decay": 30,
    "opd.credit.annotator.kind": "self",
    "opd.credit.annotator.coverage": 0.25,
    "opd.policy.gate": "complement",
    "opd.reduction": "seq-mean-token-mean",
    f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean",
    "algorithm.filter_groups.enable": False,
}

PUBLISHED = {
    "crisp": ("Qwen/Qwen3-8B", CRISP),
    "grpo": ("Qwen/Qwen3-8B", GRPO),
    "cispo": ("Qwen/Qwen3-8B-Base", CISPO),
    "opd": ("Qwen/Qwen3-0.6B", OPD),
    "iw_opd": ("Qwen/Qwen3-0.6B", IW_OPD),
    "opsd": ("Qwen/Qwen3-1.7B", OPSD),
    "sdpo": ("Qwen/Qwen3-8B", SDPO),
    "trace": ("Qwen/Qwen3-8B", TRACE),
}


def run(recipe: str | Path, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a recipe in ``cwd`` with our `opd` first on the path, and nothing that a recipe or Ray would read."""
    inputs = ("MODEL", "TEACHER", "DATA_DIR", "TRAIN", "EVAL", "OUT", "GPUS", "RAY_ADDRESS")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in inputs and not name.startswith(("OPD_", "ANNOTATOR"))
    }
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [str(RECIPES / recipe), *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**inherited, "PATH": path, **variables}, capture_output=True, text=True
    )


@pytest.fixture
def arguments(tmp_path_factory, tmp_path):
    """``arguments(recipe, *arguments, **variables)``: what the recipe's last command would tell `opd train`.

    The recipe runs for real, in ``tmp_path``, up to `opd`, which only writes down its arguments.
    """
    recorder = tmp_path_factory.mktemp("bin") / "opd"
    recorder.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
    recorder.chmod(0o755)

    def record(recipe: str, *arguments: str, **variables: str) -> list[str]:
        path = f"{recorder.parent}:{os.environ['PATH']}"
        answer = run(recipe, "--cfg", *arguments, cwd=tmp_path, PATH=path, **variables)
        assert answer.returncode == 0, answer.stderr
        command, *rest = answer.stdout.split("\0")[:-1]
        assert command == "train" and "--cfg" in rest
        return [argument for argument in rest if argument != "--cfg"]

    return record


@pytest.fixture
def composed(arguments, presets_composed_once):
    """Likewise the configuration: Hydra composes it here, which is quicker than a process that imports torch."""
    return lambda *recipe, **variables: compose_config(arguments(*recipe, **variables))


# ---------------------------------------------------------------------- the folders


def test_every_method_has_a_preset_a_guide_and_both_recipes():
    presets = {path.stem for path in (RECIPES.parent / "opd_ext/config/method").glob("*.yaml")}
    assert presets >= METHODS.keys() == PUBLISHED.keys()
    for method, script in METHODS.items():
        files = {path.name for path in (RECIPES / method).iterdir()}
        variants = {Path(variant).name for variant in VARIANTS if Path(variant).parent.name == method}
        assert files == {"README.md", "tiny_cpu.sh", script} | variants


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_script_has_the_run_bit_and_is_valid_bash(script):
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("method", METHODS)
def test_a_readme_names_its_scripts_and_only_files_that_exist(method):
    text = (RECIPES / method / "README.md").read_text()
    for script in ("tiny_cpu.sh", METHODS[method]):
        assert f"recipes/{method}/{script}" in text
    named = {word.strip("`|()[],.:") for word in text.split()}
    for path in {word for word in named if word.startswith("recipes/") and word.endswith(".sh")}:
        assert (RECIPES.parent / path).is_file(), path


def test_a_copied_folder_works_beside_the_others_and_says_what_it_misses_elsewhere(tmp_path):
    kept = tmp_path / "recipes"
    shutil.copytree(RECIPES / "grpo", kept / "mine")
    for script in ("qwen3_8b.sh", "tiny_cpu.sh"):
        answer = run(kept / "mine" / script, cwd=tmp_path)
        assert answer.returncode == 2
        assert answer.stderr == f"{script}: ../common.sh is missing; keep this folder within recipes/.\n"
    shutil.copy(RECIPES / "common.sh", kept)
    answer = run(kept / "mine/qwen3_8b.sh", cwd=tmp_path, DATA_DIR=str(tmp_path))
    assert answer.returncode == 2 and "dapo_train.parquet is missing" in answer.stderr


# ---------------------------------------------------------------------- the settings


@pytest.mark.parametrize("method", METHODS)
def test_the_settings_are_the_published_ones(method, composed):
    model, published = PUBLISHED[method]
    config = composed(f"{method}/{METHODS[method]}")
    checks.check(config)
    settings = {key: OmegaConf.select(config, key, throw_on_missing=True) for key in published}
    assert settings == published
    assert config.actor_rollout_ref.model.path == model and config.opd.method == method
    assert config.reward.custom_reward_function.path == "pkg://opd_ext.rewards.math_dual"
    # None of the papers trains in less than fp32, and all of ours are for one node of eight.
    actor = config.actor_rollout_ref.actor
    assert (actor.fsdp_config.model_dtype, actor.fsdp_config.mixed_precision.param_dtype) == ("fp32", "bf16")
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (1, 8)
    # Steps, not the size of the training set, end the run: 13,918 problems make so many steps an epoch.
    steps_per_epoch = 13_918 // config.data.train_batch_size
    assert config.trainer.total_training_steps <= config.trainer.total_epochs * steps_per_epoch


def test_crisp_14b_differs_from_8b_in_the_model_and_the_run_folder(composed):
    recipes = ("crisp/qwen3_8b.sh", "crisp/qwen3_14b.sh")
    small, large = (str(OmegaConf.to_container(composed(recipe))) for recipe in recipes)
    assert "'path': 'Qwen/Qwen3-14B'" in large
    assert small.replace("Qwen3-8B", "Qwen3-14B").replace("crisp-qwen3-8b", "crisp-qwen3-14b") == large


def differences(*configs) -> set[str]:
    """Dotted keys in which two configurations differ, but for what follows from the names of run and model."""
    follows = ("run_dir", "default_local_dir", "experiment_name", "served_model_name", "tokenizer_path")

    def leaves(value, prefix=""):
        if not isinstance(value, dict):
            return {prefix: str(value)}
        return {key: leaf for name, part in value.items() for key, leaf in leaves(part, f"{prefix}.{name}").items()}

    first, second = (leaves(OmegaConf.to_container(config)) for config in configs)
    keys = (key[1:] for key in first.keys() | second.keys() if first.get(key) != second.get(key))
    return {key for key in keys if not key.endswith(follows)}


def test_opsd_8b_has_another_model_and_the_clip_of_that_size(composed):
    small, large = composed("opsd/qwen3_1_7b.sh"), composed("opsd/qwen3_8b.sh")
    assert differences(small, large) == {"actor_rollout_ref.model.path", "opd.divergence.clip"}
    assert (large.actor_rollout_ref.model.path, large.opd.divergence.clip) == ("Qwen/Qwen3-8B", 0.06)


def test_iw_opd_and_its_baseline_differ_in_the_credit_alone(composed):
    changed = differences(composed("opd/qwen3_0_6b.sh"), composed("iw_opd/qwen3_0_6b.sh"))
    assert changed == {"opd.method", "opd.credit.kind", "opd.credit.gamma"}


def test_trace_and_grpo_are_two_arms_of_one_study(composed):
    changed = differences(composed("grpo/qwen3_8b.sh"), composed("trace/qwen3_8b.sh"))
    shared = {key for key in changed if not key.startswith("opd.")}
    # The entropy is a metric; a pair with the teacher's note is longer.
    assert {key.rpartition(".")[2] for key in shared} == {
        "calculate_entropy",
        "ppo_max_token_len_per_gpu",
        "log_prob_max_token_len_per_gpu",
    }


# ---------------------------------------------------------------------- the inputs


def test_inputs_and_overrides_reach_the_configuration_whatever_their_characters(composed, tmp_path):
    config = composed(
        "crisp/qwen3_8b.sh", "opd.teacher.interval=30", "trainer.total_training_steps=7",
        MODEL="Qwen/Qwen3-4B", DATA_DIR="a b=c,d", EVAL="math500_v2 aime25_v2", OUT="runs/x y", GPUS="4",
    )  # fmt: skip
    folder = tmp_path / "a b=c,d"
    assert config.opd.teacher.interval == 30 and config.trainer.total_training_steps == 7
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen3-4B" and config.trainer.n_gpus_per_node == 4
    assert config.data.train_files == str(folder / "dapo_train.parquet")
    assert config.data.val_files == [str(folder / "math500_v2.parquet"), str(folder / "aime25_v2.parquet")]
    assert config.opd.run_dir == str(tmp_path / "runs/x y")
    assert config.trainer.default_local_dir == str(tmp_path / "runs/x y/checkpoints")


def test_inputs_may_carry_the_prefix_that_ray_jobs_pass_on(composed):
    config = composed("crisp/qwen3_14b.sh", OPD_MODEL="Qwen/Qwen3-4B", OPD_DATA_DIR="/data", OPD_RUNS="/shared")
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen3-4B"
    assert config.data.train_files == "/data/dapo_train.parquet"
    assert config.opd.run_dir == "/shared/crisp-qwen3-14b"


def test_teacher_and_training_set_are_inputs_too(composed, tmp_path):
    teacher = tmp_path / "teacher, large"
    teacher.mkdir()
    config = composed("iw_opd/qwen3_0_6b.sh", TEACHER="teacher, large", OPD_TRAIN="deepmath", OPD_DATA_DIR="/data")
    assert config.opd.teacher.path == str(teacher)
    assert config.data.train_files == "/data/deepmath.parquet"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {"kind": "self", "model": None, "base_url": None}),
        (
            {"ANNOTATOR": "api", "OPD_ANNOTATOR_MODEL": "qwen3.5-plus", "ANNOTATOR_KEY_ENV": "HOME"},
            {"kind": "api", "model": "qwen3.5-plus", "base_url": None, "api_key_env": "HOME"},
        ),
        (
            {"ANNOTATOR": "server", "ANNOTATOR_MODEL": "Qwen/Qwen3-32B", "ANNOTATOR_URL": "http://host:8000/v1"},
            {"kind": "server", "model": "Qwen/Qwen3-32B", "base_url": "http://host:8000/v1"},
        ),
    ],
    ids=["self", "api", "server"],
)
def test_trace_takes_its_annotator_from_the_environment(variables, expected, composed):
    annotator = checks.check(composed("trace/qwen3_8b.sh", **variables)).credit.annotator
    assert {key: getattr(annotator, key) for key in expected} == expected


@pytest.mark.parametrize("method", METHODS)
def test_tiny_cpu_is_the_method_in_the_miniature_world(method, composed):
    config = composed(f"{method}/tiny_cpu.sh", "opd.seed=3")
    checks.check(config)
    assert (config.opd.method, config.opd.device, config.opd.seed) == (method, "cpu", 3)
    assert config.actor_rollout_ref.model.path == f"{config.opd.world}/base"
    teacher = (config.opd.teacher or {}).get("path")
    assert teacher == (f"{config.opd.world}/large" if method in ("opd", "iw_opd") else None)


@pytest.mark.parametrize("method", METHODS)
def test_tiny_cpu_first_builds_the_models_that_the_world_lacks(method, tmp_path):
    """`opd` writes down what it is asked for; the world has what the folder says."""
    recorder = tmp_path / "bin/opd"
    recorder.parent.mkdir()
    recorder.write_text('#!/usr/bin/env bash\necho "$@"\n')
    recorder.chmod(0o755)
    models = ["base", "large"] if method in ("opd", "iw_opd") else ["base"]

    def asked_for() -> list[str]:
        variables = {"PATH": f"{recorder.parent}:{os.environ['PATH']}", "OPD_HOME": str(tmp_path)}
        return run(f"{method}/tiny_cpu.sh", cwd=tmp_path, **variables).stdout.splitlines()

    train = f"train method={method} scale=cpu_tiny"
    for model in models:
        assert asked_for() == [f"data tinymath --models {','.join(models)}", train]
        (tmp_path / "tinymath" / model).mkdir(parents=True)
        (tmp_path / "tinymath" / model / "config.json").touch()
    assert asked_for() == [train]


# ---------------------------------------------------------------------- without GPU, without inputs


def test_the_plan_needs_no_gpu_no_data_no_model(tmp_path):
    answer = run("crisp/qwen3_14b.sh", "--dry-run", cwd=tmp_path, HOME=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert answer.returncode == 0, answer.stderr
    assert "Nothing was started" in " ".join(answer.stdout.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", [*GPU_RECIPES, *VARIANTS])
def test_every_recipe_has_a_plan_that_verl_accepts(recipe, arguments, opd_train, tmp_path, monkeypatch, capsys):
    """In this process, since importing torch and verl takes longer than a plan."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert opd_train(*arguments(recipe), "--dry-run") == 0
    assert "Nothing was started" in " ".join(capsys.readouterr().out.split())
    assert list(tmp_path.iterdir()) == []


def test_missing_inputs_are_refused_in_one_sentence(tmp_path):
    def refusal(recipe: str = "crisp/qwen3_8b.sh", **variables: str) -> str:
        answer = run(recipe, cwd=tmp_path, DATA_DIR=str(tmp_path), EVAL="math500", **variables)
        assert answer.returncode == 2 and answer.stdout == ""
        assert len(answer.stderr.splitlines()) == 1
        return answer.stderr

    assert "MODEL=nothing is neither a folder" in refusal(MODEL="nothing")
    assert "TEACHER=nothing is neither a folder" in refusal("opd/qwen3_0_6b.sh", TEACHER="nothing")
    assert "dapo_train.parquet is missing; make it with opd data math" in refusal()
    assert "openthoughts_solutions.parquet is missing; make it as the recipe's" in refusal("opsd/qwen3_1_7b.sh")
    for name in ("dapo_train", "math500"):
        (tmp_path / f"{name}.parquet").touch()
    assert "PyTorch sees 0 GPUs, 8 are wanted" in refusal(CUDA_VISIBLE_DEVICES="")
    assert "opd is not installed" in refusal(PATH="/usr/bin:/bin", OPD_VENV=str(tmp_path))
