# SPDX-License-Identifier: Apache-2.0
"""Recipes run from anywhere, plan without a GPU, refuse missing inputs, and carry the published settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from opd_ext.train import compose_config

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = sorted(RECIPES.rglob("*.sh"))
GPU_RECIPES = ("crisp/qwen3_8b.sh", "crisp/qwen3_14b.sh")

# CRISP, arXiv 2603.05433: the table of hyper-parameters, which it states once for all models.
PUBLISHED = {
    "data.train_batch_size": 32,
    "data.max_prompt_length": 1024,
    "data.apply_chat_template_kwargs.enable_thinking": True,
    "opd.teacher.weights": "periodic",
    "opd.teacher.interval": 50,
    "opd.context.kind": "instruction",
    "opd.context.text": "v2",
    "opd.divergence.kind": "reverse_kl",
    "opd.divergence.support": "full",
    "opd.divergence.temperature": 1.0,
    "opd.rollout.train_tokens": 8192,
    "opd.rollout.val_tokens": 30_000,
    "opd.max_pair_length": 10_240,
    "opd.policy": None,
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.top_p": 1.0,
    "actor_rollout_ref.rollout.top_k": -1,
    "actor_rollout_ref.rollout.val_kwargs.do_sample": True,
    "actor_rollout_ref.rollout.val_kwargs.temperature": 0.6,
    "actor_rollout_ref.rollout.val_kwargs.top_p": 0.95,
    "actor_rollout_ref.rollout.val_kwargs.top_k": 20,
    "actor_rollout_ref.rollout.val_kwargs.n": 8,
    "actor_rollout_ref.actor.optim.optimizer": "AdamW",
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
    "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
    "actor_rollout_ref.actor.optim.betas": [0.9, 0.999],
    "actor_rollout_ref.actor.optim.weight_decay": 0.01,
    "actor_rollout_ref.actor.grad_clip": 1.0,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.fsdp_config.model_dtype": "fp32",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": "bf16",
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8,
    "trainer.total_training_steps": 100,
    "trainer.test_freq": 20,
    "trainer.save_freq": 10,
}


def run(recipe: str, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a recipe in ``cwd`` with our `opd` first on the path, and nothing that a recipe or Ray would read."""
    inputs = ("MODEL", "DATA_DIR", "EVAL", "OUT", "GPUS", "RAY_ADDRESS")
    inherited = {name: value for name, value in os.environ.items() if name not in inputs and name[:4] != "OPD_"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [str(RECIPES / recipe), *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**inherited, "PATH": path, **variables}, capture_output=True, text=True
    )


@pytest.fixture
def composed(tmp_path_factory, tmp_path):
    """``composed(recipe, *arguments, **variables)``: the configuration that the recipe's last command would run with.

    The recipe runs for real, in ``tmp_path``, up to `opd`, which only writes down its arguments; Hydra composes them
    here, which is quicker than a process that imports torch.
    """
    recorder = tmp_path_factory.mktemp("bin") / "opd"
    recorder.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
    recorder.chmod(0o755)

    def compose(recipe: str, *arguments: str, **variables: str):
        path = f"{recorder.parent}:{os.environ['PATH']}"
        answer = run(recipe, "--cfg", *arguments, cwd=tmp_path, PATH=path, **variables)
        assert answer.returncode == 0, answer.stderr
        command, *rest = answer.stdout.split("\0")[:-1]
        assert command == "train" and "--cfg" in rest
        return compose_config([argument for argument in rest if argument != "--cfg"])

    return compose


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_script_has_the_run_bit_and_is_valid_bash(script):
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""


def test_the_settings_are_the_published_ones(composed):
    config = composed("crisp/qwen3_8b.sh")
    settings = {key: OmegaConf.select(config, key, throw_on_missing=True) for key in PUBLISHED}
    assert settings == PUBLISHED
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen3-8B"
    # The published micro-batch is two pairs of full length; ours is a budget of tokens.
    assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu == 2 * config.opd.max_pair_length
    assert config.reward.custom_reward_function.path == "pkg://opd_ext.rewards.math_dual"


def test_14b_differs_from_8b_in_the_model_and_the_run_folder(composed):
    small, large = (str(OmegaConf.to_container(composed(recipe))) for recipe in GPU_RECIPES)
    assert "'path': 'Qwen/Qwen3-14B'" in large
    assert small.replace("Qwen3-8B", "Qwen3-14B").replace("crisp-qwen3-8b", "crisp-qwen3-14b") == large


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


def test_tiny_cpu_is_crisp_in_the_miniature_world(composed):
    config = composed("crisp/tiny_cpu.sh", "opd.seed=3")
    assert (config.opd.method, config.opd.device, config.opd.seed) == ("crisp", "cpu", 3)
    assert config.actor_rollout_ref.model.path == f"{config.opd.world}/base"


@pytest.mark.parametrize("recipe", GPU_RECIPES)
def test_the_plan_needs_no_gpu_no_data_no_model(recipe, tmp_path):
    answer = run(recipe, "--dry-run", cwd=tmp_path, HOME=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert answer.returncode == 0, answer.stderr
    assert "Nothing was started" in " ".join(answer.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_missing_inputs_are_refused_in_one_sentence(tmp_path):
    def refusal(**variables: str) -> str:
        answer = run("crisp/qwen3_8b.sh", cwd=tmp_path, DATA_DIR=str(tmp_path), EVAL="math500", **variables)
        assert answer.returncode == 2 and answer.stdout == ""
        assert len(answer.stderr.splitlines()) == 1
        return answer.stderr

    assert "MODEL=nothing is neither a folder" in refusal(MODEL="nothing")
    assert "dapo_train.parquet is missing" in refusal()
    for name in ("dapo_train", "math500"):
        (tmp_path / f"{name}.parquet").touch()
    assert "PyTorch sees 0 GPUs, 8 are wanted" in refusal(CUDA_VISIBLE_DEVICES="")
    assert "opd is not installed" in refusal(PATH="/usr/bin:/bin", OPD_VENV=str(tmp_path))
