# SPDX-License-Identifier: Apache-2.0
"""Recipes of the pipelines carry the published settings, refuse missing inputs and can be copied."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from opd_ext.cli import app
from opd_ext.pipelines import problems
from opd_ext.pipelines.settings import CONFIG_DIR, PipelineConfig, compose_pipeline
from opd_ext.pipelines.ssd.config import SSDConfig
from opd_ext.pipelines.t3s.config import T3SConfig
from opd_ext.sampling.config import Decoding

RECIPES = Path(__file__).parents[2] / "recipes"
KINDS = {"ssd": SSDConfig, "t3s": T3SConfig}
TINY = {
    "ssd/tiny_cpu.sh": ["base"],
    "t3s/tiny_cpu.sh": ["base", "large"],
    "t3s/tiny_diffusion_cpu.sh": ["base", "large", "diffusion"],
}
GPU = ["ssd/qwen3_4b_instruct.sh", "t3s/qwen3_8b.sh", "t3s/llada2_mini.sh"]
INPUTS = (
    "MODEL", "DIFFUSION", "TEACHER", "TRACES", "PRESET", "DATA_DIR", "TRAIN", "SELECT", "EVAL", "OUT", "GPUS",
    "RAY_ADDRESS", "PYTHONPATH",
)  # fmt: skip


def run(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a command in ``cwd`` with our `opd` and Python first on the path, and nothing that a recipe would read."""
    inherited = {k: v for k, v in os.environ.items() if k not in INPUTS and not k.startswith("OPD_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**inherited, "PATH": path, **variables}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def recorded(tmp_path_factory, tmp_path):
    """``recorded(recipe, *arguments, **variables)``: what `opd` is called with, call by call, and PYTHONPATH."""
    recorder = tmp_path_factory.mktemp("bin") / "opd"
    recorder.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" \"$PYTHONPATH\"\nprintf '\\1'\n")
    recorder.chmod(0o755)

    def record(recipe: str | Path, *arguments: str, **variables: str) -> list[list[str]]:
        path = f"{recorder.parent}:{os.environ['PATH']}"
        answer = run([str(RECIPES / recipe), *arguments], tmp_path, **({"PATH": path} | variables))
        assert answer.returncode == 0, answer.stderr
        return [call.split("\0")[:-1] for call in answer.stdout.split("\1")[:-1]]

    return record


@pytest.fixture
def composed(recorded, tmp_path, monkeypatch):
    """Likewise the configuration, composed in this process: it is what the recipe's ``--cfg`` would print."""
    monkeypatch.chdir(tmp_path)

    def compose(recipe: str | Path, *arguments: str, **variables: str) -> PipelineConfig:
        ((name, *overrides, _),) = recorded(recipe, "--cfg", *arguments, **variables)
        assert name in KINDS and "--cfg" in overrides
        for variable in ("OPD_HOME", "OPD_RUNS"):  # what the settings themselves read
            monkeypatch.delenv(variable, raising=False)
            if variable in variables:
                monkeypatch.setenv(variable, variables[variable])
        return compose_pipeline(name, KINDS[name], [override for override in overrides if override != "--cfg"])

    return compose


def selected(config: PipelineConfig, keys: dict) -> dict:
    """The values of dotted keys, as plain Python."""
    tree = OmegaConf.structured(config)
    values = {key: OmegaConf.select(tree, key, throw_on_missing=True) for key in keys}
    return {key: OmegaConf.to_object(value) if OmegaConf.is_config(value) else value for key, value in values.items()}


# ---------------------------------------------------------------------- the settings

# arXiv 2604.01193, table of hyper-parameters; response cap, filter and the lack of a system message: released code.
SSD = {
    "prompts.deduplicate": True,
    "prompts.system": None,
    "drop_shortest": 0.1,  # filter_shortest_percent: 10 of the released config.yaml
    "max_tokens": 65_536,
    "arms.control": Decoding(1.0, -1, 1.0),
    "train.batch_size": 32,
    "train.lr": 5e-6,
    "train.min_lr": 1e-6,
    "train.schedule": "cosine",
    "train.betas": [0.9, 0.95],
    "train.weight_decay": 0.1,
    "train.max_length": 65_536,
    "evaluate.n": 10,
}
INSTRUCT = {"train.steps": 2500, "train.warmup_steps": 250, "train.save_every": 250}
THINKING = {"train.steps": 300, "train.warmup_steps": 50, "train.save_every": 50}

# Per preset: the published model, T_train / top-k / top-p, the best T_eval / top-k / top-p, the schedule.
PRESETS = {
    "llama3_1_8b_instruct": ("meta-llama/Llama-3.1-8B-Instruct", (0.8, 20, 0.8), (0.7, 20, 0.8), INSTRUCT),
    "qwen3_4b_instruct": ("Qwen/Qwen3-4B-Instruct-2507", (1.6, 20, 0.8), (1.1, 20, 0.8), INSTRUCT),
    "qwen3_30b_a3b_instruct": ("Qwen/Qwen3-30B-A3B-Instruct-2507", (1.6, 20, 0.8), (0.9, 20, 0.8), INSTRUCT),
    "qwen3_4b_thinking": ("Qwen/Qwen3-4B-Thinking-2507", (1.1, 20, 0.95), (0.7, 20, 0.95), THINKING),
    "qwen3_30b_a3b_thinking": ("Qwen/Qwen3-30B-A3B-Thinking-2507", (1.2, 20, 0.95), (0.7, 20, 0.95), THINKING),
    "gpt_oss_20b": ("openai/gpt-oss-20b", (1.2, -1, 1.0), (1.0, 20, 0.95), THINKING),
}

# arXiv 2601.10348, as far as it is known.
T3S = {
    "traces.n": 16,
    "traces.temperature": 0.6,
    "traces.max_tokens": 32_768,
    "train.steps": 50,
    "train.batch_size": 64,
    "train.lr": 1e-5,
    "threshold": 0.0,
    "arms": ["t3s", "inverse", "random", "lowest"],
    "rrt": True,
    "always_keep_eos": False,
    "evaluate.n": 16,
}

# LLaDA-2.0's fine-tuning as inclusionAI/dFactory has it, and what is known of the T3S run: tau, context, 20 epochs.
LLADA = {
    "diffusion.tau": 0.2,
    "diffusion.ratio": [0.3, 0.8],
    "diffusion.mask_token_id": 156_895,
    "diffusion.attention": "block",
    "diffusion.block_size": 32,
    "diffusion.threshold": 0.95,
    "diffusion.train.lr": 1e-5,
    "diffusion.train.schedule": "cosine",
    "diffusion.train.weight_decay": 0.1,
    "diffusion.train.betas": [0.9, 0.999],
    "diffusion.train.max_length": 16_384,
    "diffusion.train.steps": 20 * (1000 // 64),
    "diffusion.train.warmup_steps": 9,  # 3 %
}


@pytest.mark.parametrize("preset", PRESETS)
def test_ssd_settings_are_the_published_ones(preset, composed):
    model, sampled, (t_eval, *cut), steps = PRESETS[preset]
    config = composed("ssd/qwen3_4b_instruct.sh", OPD_PRESET=preset)
    published = SSD | steps | {"arms.ssd": Decoding(*sampled), "evaluate.top_k": cut[0], "evaluate.top_p": cut[1]}
    assert selected(config, published) == published
    assert config.model == model and Path(config.run_dir).name == f"ssd-{preset}"
    assert t_eval == config.evaluate.temperatures[0]  # the best is chosen on other problems than the reported ones
    assert config.evaluate.select_file.endswith("/v5.parquet") and config.evaluate.file.endswith("/v6.parquet")
    assert config.max_tokens < config.vllm.max_model_len and config.train.ranks == config.vllm.replicas == 8


@pytest.mark.parametrize("preset", PRESETS)
def test_ssd_asks_in_the_two_ways_of_the_release_and_evaluates_likewise(preset, composed):
    """What the released templates say: function problems come with their signature, others read standard input."""
    config = composed("ssd/qwen3_4b_instruct.sh", PRESET=preset)
    rows = pd.DataFrame(
        {
            "prompt": [[{"role": "user", "content": "Add two numbers."}]] * 2,
            "extra_info": [{"starter_code": "def add(a, b):"}, {"starter_code": None}],
        }
    )
    function, stdin = (messages[0]["content"] for messages in problems.worded(rows, config.prompts))
    for text in (function, stdin):
        assert "Add two numbers." in text and "nothing else" in text and text.endswith("```") and "```python\n" in text
    assert "```python\ndef add(a, b):\n```" in function and "stdin" not in function
    assert "stdin" in stdin and "stdout" in stdin and "sample inputs" in stdin
    assert config.evaluate.wording is None  # that of the prompts


def test_t3s_settings_are_the_published_ones(composed):
    config = composed("t3s/qwen3_8b.sh")
    assert selected(config, T3S) == T3S
    assert (config.model, config.teacher, config.traces_column) == ("Qwen/Qwen3-8B", None, "trace")
    assert config.train.save_every < config.train.steps and config.diffusion is None
    assert config.reward.path == "pkg://opd_ext.rewards.math_dual"


def test_llada_settings_are_the_published_ones(composed):
    config = composed("t3s/llada2_mini.sh")
    assert selected(config, LLADA) == LLADA
    assert (config.model, config.diffusion.model) == ("inclusionAI/Ling-mini-2.0", "inclusionAI/LLaDA2.0-mini")
    assert config.trust_remote_code
    assert config.diffusion.train.verl == config.train.verl  # precision and checkpointing of the scale
    # Both see the whole answer: 2,048 tokens of 16K are left to the prompt. The selector's context is 32K.
    assert config.evaluate.max_tokens == config.diffusion.train.max_length - 2048
    assert config.vllm.max_model_len <= 32_768


@pytest.mark.parametrize("recipe", TINY)
def test_tiny_recipes_run_in_the_miniature_world(recipe, composed):
    config = composed(recipe, "seed=3")
    assert (config.scale, config.device, config.seed) == ("cpu_tiny", "cpu", 3)
    assert config.model == f"{config.world}/base"
    if isinstance(config, T3SConfig):
        assert config.teacher == f"{config.world}/large"
        assert (config.diffusion is not None) == ("diffusion" in recipe)


# ---------------------------------------------------------------------- the inputs


def test_inputs_and_overrides_reach_the_configuration_whatever_their_characters(composed, tmp_path):
    inputs = {"MODEL": "Qwen/Qwen3-1.7B", "DATA_DIR": "a b=c,d", "TRAIN": "mine", "OUT": "runs/x y", "OPD_GPUS": "4"}
    for recipe in GPU:
        config = composed(recipe, "seed=7", EVAL="other", **inputs)
        folder = tmp_path / "a b=c,d"
        assert config.prompts.file == str(folder / "mine.parquet")
        assert config.evaluate.file == str(folder / "other.parquet")
        assert config.run_dir == str(tmp_path / "runs/x y")
        assert (config.model, config.seed, config.train.ranks, config.vllm.replicas) == ("Qwen/Qwen3-1.7B", 7, 4, 4)


def test_a_teacher_samples_the_traces_and_thinking_is_opened_for_it(composed):
    config = composed("t3s/qwen3_8b.sh", TEACHER="Qwen/QwQ-32B")
    assert (config.teacher, config.traces_column, config.trace_prefix) == ("Qwen/QwQ-32B", None, "<think>\n")


@pytest.mark.parametrize("recipe", TINY)
def test_tiny_recipes_first_build_the_models_that_the_world_lacks(recipe, recorded, tmp_path):
    def asked_for() -> list[list[str]]:
        return [call[:-1] for call in recorded(recipe, OPD_HOME=str(tmp_path / "home"))]

    models = TINY[recipe]
    for model in models:
        build, run_it = asked_for()
        assert build == ["data", "tinymath", "--models", ",".join(models)]
        (tmp_path / "home/tinymath" / model).mkdir(parents=True)
        (tmp_path / "home/tinymath" / model / "config.json").touch()
    assert asked_for() == [run_it] and run_it[0] == recipe.split("/")[0]


def test_missing_inputs_are_refused_in_one_sentence(tmp_path):
    def refusal(recipe: str, **variables: str) -> str:
        answer = run([str(RECIPES / recipe)], tmp_path, DATA_DIR=str(tmp_path), **variables)
        assert answer.returncode == 2 and answer.stdout == "" and len(answer.stderr.splitlines()) == 1
        return answer.stderr

    assert "PRESET=mine is not published" in refusal("ssd/qwen3_4b_instruct.sh", PRESET="mine")
    assert "MODEL=nothing is neither a folder" in refusal("ssd/qwen3_4b_instruct.sh", MODEL="nothing")
    assert "TEACHER=nothing is neither a folder" in refusal("t3s/qwen3_8b.sh", TEACHER="nothing")
    assert "DIFFUSION=nothing is neither a folder" in refusal("t3s/llada2_mini.sh", DIFFUSION="nothing")
    assert "rstar_coder/passed.parquet is missing; make it with opd data rstar_coder" in refusal(
        "ssd/qwen3_4b_instruct.sh"
    )
    assert "boba200/train.parquet is missing" in refusal("t3s/qwen3_8b.sh")
    for name in ("s1k/train", "aime/test"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.parquet").touch()
    assert "PyTorch sees 0 GPUs, 8 are wanted" in refusal("t3s/llada2_mini.sh", CUDA_VISIBLE_DEVICES="")
    assert "opd is not installed" in refusal("t3s/qwen3_8b.sh", PATH="/usr/bin:/bin", OPD_VENV=str(tmp_path))


@pytest.mark.parametrize("recipe", [*TINY, *GPU])
@pytest.mark.parametrize("option", ["--cfg", "--dry-run", "--help"])
def test_a_recipe_that_only_shows_needs_no_inputs(option, recipe, recorded, tmp_path):
    ((name, *arguments, _),) = recorded(recipe, option, OPD_HOME=str(tmp_path / "none"))
    assert name == recipe.split("/")[0] and arguments[-1] == option
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words, last, missing",
    [
        (["ssd", "recipe=ssd/qwen3_4b_instruct"], "diagnose", "passed.parquet is not a file; "),
        (["t3s", "recipe=t3s/qwen3_8b"], "evaluate-lowest", "train.parquet is not a file; "),
        (["sft", "recipe=sft/smollm2_cpu"], "evaluate-sft", "smollm2 is neither a hub id nor a folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_dry_run_without_inputs_says_what_would_be_done_and_what_is_missing(words, last, missing, tmp_path):
    run_dir, home = f"run_dir={tmp_path / 'run'}", {"OPD_HOME": str(tmp_path / "none")}
    answer = CliRunner().invoke(app, [*words, run_dir, "--dry-run"], env=home)
    assert answer.exit_code == 0, answer.output
    said = answer.output.splitlines()[-1]
    assert last in answer.output and said.startswith("Missing here") and missing in said
    assert list(tmp_path.iterdir()) == []
    answer = CliRunner().invoke(app, [*words, run_dir], env=home)
    assert answer.exit_code == 2 and "is not a file" in answer.output


@pytest.mark.parametrize("recipe", [*TINY, *GPU])
def test_the_command_takes_what_a_recipe_passes_on(recipe, recorded):
    """In this process, since importing torch takes longer than composing a configuration."""
    ((*arguments, _),) = recorded(recipe, "--cfg", "seed=3", "--until", "traces")
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    assert OmegaConf.create(answer.stdout).seed == 3


def test_the_grader_of_programs_is_found_wherever_the_recipe_is_started(composed):
    assert callable(problems.load_grader(composed("ssd/qwen3_4b_instruct.sh").reward))


# ---------------------------------------------------------------------- one home for the settings

SCRIPTS = {f"ssd/{name}": "ssd/qwen3_4b_instruct.sh" for name in PRESETS}
SCRIPTS |= {"ssd/smollm2_cpu": "ssd/smollm2_cpu.sh"}
SCRIPTS |= {"t3s/qwen3_8b": "t3s/qwen3_8b.sh", "t3s/llada2_mini": "t3s/llada2_mini.sh"}


def test_every_recipe_has_a_script():
    folder = CONFIG_DIR / "recipe"
    recipes = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")}
    assert recipes == {*SCRIPTS, "sft/smollm2_cpu"}
    assert "opd sft recipe=sft/smollm2_cpu" in (RECIPES / "opd" / "smollm2_cpu.sh").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_is_asked_for_nothing_is_its_recipe(name, recorded):
    ((pipeline, *arguments, _),) = recorded(SCRIPTS[name], "--cfg", PRESET=name.split("/")[1])
    assert (pipeline, arguments) == (SCRIPTS[name].split("/")[0], [f"recipe={name}", "--cfg"])


@pytest.mark.parametrize("recipe", GPU)
def test_the_data_sets_that_a_script_checks_are_those_of_its_recipe(recipe, composed, tmp_path):
    """Their names stand in both: with another folder the script's count, with another name the recipe's folder."""
    home = str(tmp_path / "home")
    plain, moved, named = (composed(recipe, OPD_HOME=home, **more) for more in ({}, {"DATA_DIR": "/d"}, {"EVAL": "e"}))

    def files(config: PipelineConfig) -> list[Path]:
        return [Path(file) for file in (config.prompts.file, config.evaluate.file, config.evaluate.select_file) if file]

    sets = [file.relative_to(Path(home) / "data") for file in files(plain)]
    assert [file.relative_to("/d") for file in files(moved)] == sets
    assert Path(named.evaluate.file) == Path(home) / "data" / "e.parquet"
    assert Path(plain.run_dir).parent == tmp_path / "runs"


# ---------------------------------------------------------------------- copies


def test_a_copied_folder_works_beside_the_others_and_has_run_folders_of_its_own(composed, tmp_path):
    shutil.copytree(RECIPES, tmp_path / "recipes")
    shutil.copytree(RECIPES / "ssd", tmp_path / "recipes/mine")
    shutil.copytree(RECIPES / "t3s", tmp_path / "recipes/yours")

    def run_folder(recipe: str, *arguments: str, **variables: str) -> str:
        return composed(tmp_path / "recipes" / recipe, *arguments, **variables).run_dir

    runs = str(tmp_path / "runs")
    assert run_folder("mine/qwen3_4b_instruct.sh") == f"{runs}/mine-qwen3-4b-instruct"
    assert run_folder("mine/qwen3_4b_instruct.sh", PRESET="gpt_oss_20b") == f"{runs}/mine-qwen3-4b-instruct-gpt_oss_20b"
    assert run_folder("mine/tiny_cpu.sh", OPD_RUNS="/a b") == "/a b/mine-cpu_tiny"
    assert run_folder("yours/qwen3_8b.sh") == f"{runs}/yours-qwen3-8b"
    assert run_folder("yours/qwen3_8b.sh", OUT="here") == str(tmp_path / "here")
    assert run_folder("yours/llada2_mini.sh", "run_dir=/there") == "/there"
    assert run_folder("yours/tiny_diffusion_cpu.sh") == f"{runs}/yours-tiny-diffusion-cpu"
    assert run_folder("t3s/tiny_diffusion_cpu.sh") == f"{runs}/t3s_diffusion-cpu_tiny"
    assert run_folder("ssd/tiny_cpu.sh") == f"{runs}/ssd-cpu_tiny"


@pytest.mark.parametrize("recipe", [*TINY, *GPU])
def test_a_copied_folder_works_elsewhere_with_what_the_installation_has(recipe, tmp_path):
    """Likewise with a common.sh of its own; without either it says what is missing."""
    copy = shutil.copytree((RECIPES / recipe).parent, tmp_path / "elsewhere/mine") / Path(recipe).name
    opd = tmp_path / "bin/opd"
    opd.parent.mkdir()

    def started(installed: str) -> subprocess.CompletedProcess:
        opd.write_text(f'#!/usr/bin/env bash\n[[ $* == "new --recipes" ]] && echo "{installed}" || echo "$@"\n')
        opd.chmod(0o755)
        return run([str(copy), "--cfg"], tmp_path, PATH=f"{opd.parent}:/usr/bin:/bin")

    answer = started("")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == (
        f"{copy.name}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh.\n"
    )
    from_installation = started(str(RECIPES))
    shutil.copy(RECIPES / "common.sh", copy.parent)
    assert from_installation.stderr == "" and "run_dir='runs/mine-" in from_installation.stdout
    assert started("").stdout == from_installation.stdout
