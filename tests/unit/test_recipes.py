# SPDX-License-Identifier: Apache-2.0
"""Recipes run from anywhere, plan without a GPU, refuse missing inputs, and are what their YAML says.

What that YAML holds: test_published.py and test_presets.py. Copies of a folder: test_new.py.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from opd_ext.config import checks
from opd_ext.config.compose import compose_config
from tests.unit.test_published import PUBLISHED, RUNS

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIG = RECIPES.parent / "opd_ext" / "config"
SCRIPTS = sorted(RECIPES.glob("*/*.sh"))
# Every method that comes from a paper of its own, and the GPU recipe with the settings of that paper.
METHODS = {method: f"{name}.sh" for method, (name, _, _) in RUNS.items()}
GPU_RECIPES = [f"{method}/{script}" for method, script in METHODS.items()]
# The same settings with another model.
VARIANTS = ["crisp/qwen3_14b.sh", "crisp/qwen3_32b.sh", "crisp/r1_distill_llama_8b.sh", "opsd/qwen3_8b.sh"]
VARIANTS += ["sdpo/qwen3_8b_tools.sh"]
# A model that fits, and evaluation that an evening holds.
ONE_CARD = [
    "crisp/qwen3_0_6b_gpu_1_24gb.sh", "crisp/qwen3_1_7b_gpu_1.sh", "crisp/qwen3_4b_gpu_1.sh",
    "opsd/qwen3_1_7b_gpu_1_24gb.sh", "opsd/qwen3_1_7b_gpu_1.sh", "opsd/qwen3_4b_gpu_1.sh",
    "sdpo/qwen3_0_6b_gpu_1_24gb.sh", "sdpo/qwen3_1_7b_gpu_1.sh", "sdpo/qwen3_4b_gpu_1.sh",
]  # fmt: skip
VARIANTS += ONE_CARD
# Their names are what a user finds in runs/ and in reports.
RUN_FOLDERS = {
    "crisp/qwen3_8b.sh": "crisp-qwen3-8b",
    "crisp/qwen3_14b.sh": "crisp-qwen3-14b",
    "crisp/qwen3_32b.sh": "crisp-qwen3-32b",
    "crisp/r1_distill_llama_8b.sh": "crisp-r1-distill-llama-8b",
    "crisp/qwen3_0_6b_gpu_1_24gb.sh": "crisp-qwen3-0.6b-gpu-1-24gb",
    "crisp/qwen3_1_7b_gpu_1.sh": "crisp-qwen3-1.7b-gpu-1",
    "crisp/qwen3_4b_gpu_1.sh": "crisp-qwen3-4b-gpu-1",
    "opsd/qwen3_1_7b_gpu_1_24gb.sh": "opsd-qwen3-1.7b-gpu-1-24gb",
    "opsd/qwen3_1_7b_gpu_1.sh": "opsd-qwen3-1.7b-gpu-1",
    "opsd/qwen3_4b_gpu_1.sh": "opsd-qwen3-4b-gpu-1",
    "sdpo/qwen3_0_6b_gpu_1_24gb.sh": "sdpo-qwen3-0.6b-gpu-1-24gb",
    "sdpo/qwen3_1_7b_gpu_1.sh": "sdpo-qwen3-1.7b-gpu-1",
    "sdpo/qwen3_4b_gpu_1.sh": "sdpo-qwen3-4b-gpu-1",
    "grpo/qwen3_8b.sh": "grpo-qwen3-8b",
    "cispo/qwen3_8b_base.sh": "cispo-qwen3-8b-base",
    "opd/qwen3_0_6b.sh": "opd-qwen3-0.6b",
    "iw_opd/qwen3_0_6b.sh": "iw_opd-qwen3-0.6b",
    "opsd/qwen3_1_7b.sh": "opsd-qwen3-1.7b",
    "opsd/qwen3_8b.sh": "opsd-qwen3-8b",
    "sdpo/qwen3_8b.sh": "sdpo-qwen3-8b",
    "sdpo/qwen3_8b_tools.sh": "sdpo-qwen3-8b-tools",
    "trace/qwen3_8b.sh": "trace-qwen3-8b",
}
# What every guide of a paper answers, in this order; what one has besides stands a level deeper.
SECTIONS = ["Run it", "Published numbers", "On the miniature world", "Pitfalls", "What differs from the paper"]


# ---------------------------------------------------------------------- the folders


def test_every_method_has_a_preset_a_guide_and_both_recipes():
    presets = {path.stem for path in (CONFIG / "method").glob("*.yaml")}
    assert presets >= METHODS.keys() == PUBLISHED.keys()
    recipes = {
        str(path.relative_to(CONFIG / "recipe").with_suffix(".sh")) for path in (CONFIG / "recipe").glob("*/*.yaml")
    }
    assert recipes >= {*GPU_RECIPES, *VARIANTS}
    for method, script in METHODS.items():
        files = {path.name for path in (RECIPES / method).iterdir()}
        variants = {Path(variant).name for variant in VARIANTS if Path(variant).parent.name == method}
        small = {f"{path.stem}.sh" for path in (CONFIG / "recipe" / method).glob("smollm2_cpu.yaml")}
        assert files - {"smollm2_cpu.png"} == {"README.md", "tiny_cpu.sh", script} | variants | small


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_script_has_the_run_bit_and_is_valid_bash(script):
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("method", METHODS)
def test_a_readme_names_its_scripts_and_only_files_that_exist(method):
    text = (RECIPES / method / "README.md").read_text()
    variants = [Path(variant).name for variant in VARIANTS if Path(variant).parent.name == method]
    for script in ("tiny_cpu.sh", METHODS[method], *variants):
        assert f"recipes/{method}/{script}" in text
    named = {word.strip("`|()[],.:") for word in text.split()}
    for path in {word for word in named if word.startswith("recipes/") and word.endswith(".sh")}:
        assert (RECIPES.parent / path).is_file(), path


@pytest.mark.parametrize("method", sorted(path.stem for path in (CONFIG / "method").glob("*.yaml")))
def test_every_preset_names_its_paper_and_has_a_guide_that_the_readme_links(method):
    header = (CONFIG / "method" / f"{method}.yaml").read_text().partition("\nopd:")[0]
    papers = re.findall(r"arXiv (\d{4}\.\d{5})", header)
    variant = method not in METHODS
    guide = (RECIPES / ("variants" if variant else method) / "README.md").read_text()
    link = f"](recipes/variants/README.md#{method})" if variant else f"](recipes/{method}/README.md)"
    assert link in (RECIPES.parent / "README.md").read_text()
    own = re.search(rf"^## {method}\n(.*?)(?=^## |\Z)", guide, re.MULTILINE | re.DOTALL | re.IGNORECASE)
    text = own[1] if variant else guide
    assert papers and papers[0] in text
    assert f"method/{method}.yaml" in text and "| published | here | why |" in text
    if variant:
        assert "**Use it**" in text and "**Do not**" in text and "```\n" in text, "when, and the formula"
        commands = guide.split("```")[1]
        assert "opd train method=" in commands and method in commands


@pytest.mark.parametrize("folder", [*METHODS, "ssd", "t3s"])
def test_every_guide_of_a_paper_has_the_same_sections_and_something_in_each(folder):
    text = re.sub(r"^```.*?^```", "", (RECIPES / folder / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    *_, differs = sections = text.split("\n## ")[1:]
    assert all(len(section.split("\n", 1)[1].strip()) > 100 for section in sections)
    assert "\n|---|" in differs and differs.count("\n|") >= 4, "a table: published, here, why"


# ---------------------------------------------------------------------- the settings


@pytest.mark.parametrize("recipe", [*GPU_RECIPES, *VARIANTS])
def test_a_script_without_inputs_is_its_recipe(recipe, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert arguments(recipe) == [f"recipe={recipe.removesuffix('.sh')}"]
    config = compose_config(arguments(recipe))
    assert config.trainer.experiment_name == RUN_FOLDERS[recipe]
    assert config.opd.run_dir == str(tmp_path / "runs" / RUN_FOLDERS[recipe])


@pytest.mark.parametrize("recipe", [*GPU_RECIPES, *VARIANTS])
def test_a_script_looks_for_the_very_data_that_its_recipe_reads(recipe, run_recipe, tmp_path):
    config = compose_config([f"recipe={recipe.removesuffix('.sh')}"])
    sets = config.data.val_files
    files = [config.data.train_files, *([sets] if isinstance(sets, str) else sets)]
    names = [Path(file).relative_to(config.opd.world) for file in files]
    variables = {"DATA_DIR": str(tmp_path), "RAY_ADDRESS": "auto", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "opd").write_text("#!/usr/bin/env bash\necho started\n")
    (tmp_path / "opd").chmod(0o755)
    for name in names:  # which makes the files one by one, in the order in which they are missed
        answer = run_recipe(recipe, cwd=tmp_path, **variables)
        assert answer.returncode == 2 and f"{tmp_path}/{name} is missing" in answer.stderr
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert run_recipe(recipe, cwd=tmp_path, **variables).stdout == "started\n"


def test_a_later_recipe_or_override_wins_over_the_scripts(composed):
    other = composed("crisp/qwen3_8b.sh", "recipe=crisp/qwen3_14b")
    assert other == composed("crisp/qwen3_14b.sh") and other.trainer.experiment_name == "crisp-qwen3-14b"
    config = composed(
        "sdpo/qwen3_8b.sh", "opd.run_dir=/elsewhere", "actor_rollout_ref.model.path=m", MODEL="o/m", OUT="x"
    )
    assert (config.opd.run_dir, config.actor_rollout_ref.model.path) == ("/elsewhere", "m")
    assert composed("sdpo/tiny_cpu.sh", "method=grpo").trainer.experiment_name == "grpo-cpu_tiny"


# ---------------------------------------------------------------------- the inputs


def test_inputs_and_overrides_reach_the_configuration_whatever_their_characters(composed, tmp_path):
    config = composed(
        "crisp/qwen3_8b.sh", "opd.teacher.interval=30", "trainer.total_training_steps=7",
        MODEL="Qwen/Qwen3-4B", DATA_DIR="a b=c,d", EVAL="math500_v2/test mine", OUT="runs/x y", GPUS="4",
    )  # fmt: skip
    folder = tmp_path / "a b=c,d"
    assert config.opd.teacher.interval == 30 and config.trainer.total_training_steps == 7
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen3-4B" and config.trainer.n_gpus_per_node == 4
    assert config.data.train_files == str(folder / "dapo_math_17k/train.parquet")
    assert config.data.val_files == [str(folder / "math500_v2/test.parquet"), str(folder / "mine.parquet")]
    assert config.opd.run_dir == str(tmp_path / "runs/x y")
    assert config.trainer.default_local_dir == str(tmp_path / "runs/x y/checkpoints")


def test_inputs_may_carry_the_prefix_that_ray_jobs_pass_on(composed):
    config = composed("crisp/qwen3_14b.sh", OPD_MODEL="Qwen/Qwen3-4B", OPD_DATA_DIR="/data", OPD_RUNS="/shared")
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen3-4B"
    assert config.data.train_files == "/data/dapo_math_17k/train.parquet"
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
def test_tiny_cpu_first_builds_the_models_that_the_world_lacks(method, run_recipe, tmp_path):
    """`opd` writes down what it is asked for; the world has what the folder says."""
    recorder = tmp_path / "bin/opd"
    recorder.parent.mkdir()
    recorder.write_text('#!/usr/bin/env bash\necho "$@"\n')
    recorder.chmod(0o755)
    models = ["base", "large"] if method in ("opd", "iw_opd") else ["base"]

    def asked_for() -> list[str]:
        variables = {"PATH": f"{recorder.parent}:{os.environ['PATH']}", "OPD_HOME": str(tmp_path)}
        return run_recipe(f"{method}/tiny_cpu.sh", cwd=tmp_path, **variables).stdout.splitlines()

    train = f"train method={method} scale=cpu_tiny"
    for model in models:
        assert asked_for() == [f"data tinymath --models {','.join(models)}", train]
        (tmp_path / "tinymath" / model).mkdir(parents=True)
        (tmp_path / "tinymath" / model / "config.json").touch()
    assert asked_for() == [train]


# ---------------------------------------------------------------------- without GPU, without inputs


def test_the_plan_needs_no_gpu_no_data_no_model(run_recipe, tmp_path):
    answer = run_recipe("crisp/qwen3_14b.sh", "--dry-run", cwd=tmp_path, HOME=str(tmp_path), CUDA_VISIBLE_DEVICES="")
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


def test_missing_inputs_are_refused_in_one_sentence(run_recipe, tmp_path):
    def refusal(recipe: str = "crisp/qwen3_8b.sh", **variables: str) -> str:
        answer = run_recipe(recipe, cwd=tmp_path, DATA_DIR=str(tmp_path), EVAL="math500/test", **variables)
        assert answer.returncode == 2 and answer.stdout == ""
        assert len(answer.stderr.splitlines()) == 1
        return answer.stderr

    assert "MODEL=nothing is neither a folder" in refusal(MODEL="nothing")
    assert "TEACHER=nothing is neither a folder" in refusal("opd/qwen3_0_6b.sh", TEACHER="nothing")
    assert "dapo_math_17k/train.parquet is missing; make it with opd data dapo_math_17k" in refusal()
    assert "make it with opd data openthoughts_math_30k" in refusal("opsd/qwen3_1_7b.sh")
    assert "mine.parquet is missing; make it as the recipe's" in refusal(TRAIN="mine")
    for name in ("dapo_math_17k/train", "math500/test"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.parquet").touch()
    assert "PyTorch sees 0 GPUs, 8 are wanted" in refusal(CUDA_VISIBLE_DEVICES="")
    assert "opd is not installed" in refusal(PATH="/usr/bin:/bin", OPD_VENV=str(tmp_path))
