# SPDX-License-Identifier: Apache-2.0
"""A recipe of one's own: `opd new`, or a copied folder. It is the original under another name, and never its run."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from opd_ext import new
from opd_ext.cli import app
from opd_ext.config import checks
from opd_ext.config.compose import compose_config
from opd_ext.errors import ConfigError
from opd_ext.pipelines import command
from tests.unit.test_presets import differences
from tests.unit.test_published import PUBLISHED

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = [f"{method}/{path.name}" for method in PUBLISHED for path in sorted((RECIPES / method).glob("*.sh"))]


def original(script: str) -> list[str]:
    """What a published script chooses."""
    (chosen,) = re.findall(r'^exec opd train (.*) "\$\{inputs', (RECIPES / script).read_text(), re.MULTILINE)
    return chosen.split()


# ---------------------------------------------------------------------- opd new


def test_every_method_with_recipes_can_be_the_source():
    assert set(new.sources()) == {*PUBLISHED, "ssd", "t3s"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_recipe_is_the_original_under_another_name(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, name = script.split("/")
    folder = new.copy_recipe("mine", source, Path())
    chosen = new.choices((folder / name).read_text())
    copy, first = compose_config(chosen, [folder / "config"]), compose_config(original(script))
    checks.check(copy)
    assert differences(copy, first) == {"opd.method"} and copy.opd.method == "mine"
    run = first.trainer.experiment_name.replace(source, "mine", 1)
    assert copy.trainer.experiment_name == run and copy.opd.run_dir == str(tmp_path / "runs" / run)
    assert copy.opd.run_dir != first.opd.run_dir


@pytest.mark.parametrize("script", SCRIPTS)
def test_its_scripts_read_the_settings_beside_them_from_any_folder(script, composed, arguments, tmp_path):
    source, name = script.split("/")
    folder = new.copy_recipe("mine", source, tmp_path / "else where")
    assert arguments(folder / name)[:2] == ["--config-dir", str(folder / "config")]
    config = composed(folder / name, "opd.seed=3", OPD_RUNS="/runs")
    assert (config.opd.method, config.opd.seed) == ("mine", 3)
    assert config.opd.run_dir.startswith("/runs/mine-")


def test_an_edit_of_its_settings_is_what_it_trains_with(composed, tmp_path, monkeypatch):
    folder = new.copy_recipe("mine", "crisp", tmp_path)
    method = folder / "config" / "method" / "mine.yaml"
    method.write_text(method.read_text().replace("interval: 50", "interval: 7"))
    recipe = folder / "config" / "recipe" / "mine" / "qwen3_8b.yaml"
    recipe.write_text(recipe.read_text().replace("Qwen/Qwen3-8B", "Qwen/Qwen3-4B"))
    config = composed(folder / "qwen3_8b.sh")
    assert (config.opd.teacher.interval, config.actor_rollout_ref.model.path) == (7, "Qwen/Qwen3-4B")
    assert composed(folder / "qwen3_14b.sh").opd.teacher.interval == 7


def test_no_file_of_a_new_recipe_runs_or_names_the_original(tmp_path):
    for source in new.sources():
        folder = new.copy_recipe("mine", source, tmp_path / source)
        for script in folder.glob("*.sh"):
            text = script.read_text()
            assert not re.search(rf"(recipe=|method=|gpu_run |name_run |/){source}[/ -]", text), script
            assert os.access(script, os.X_OK) == (script.name != "common.sh")
            assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
        for settings in (folder / "config" / "recipe").rglob("*.yaml"):
            assert f"}}/{source}-" not in settings.read_text(), settings
        named = re.findall(r"`mine/(\S+\.sh)`", (folder / "README.md").read_text())
        assert set(named) == {path.name for path in folder.glob("*.sh")} - {"common.sh"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mine", "--from", "crispy"], ["--from crispy does not exist", "crisp", "trace"]),
        (["mine", "--from", "tip"], ["--from tip does not exist"]),
        (["my mine", "--from", "crisp"], ["my mine cannot be a name"]),
        (["../mine", "--from", "crisp"], ["cannot be a name"]),
        (["sdpo", "--from", "crisp"], ["sdpo is a published method"]),
        (["there", "--from", "crisp"], ["there exists", "--force"]),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_sentence_and_leaves_nothing(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    answer = CliRunner().invoke(app, ["new", *arguments])
    assert answer.exit_code == 2 and answer.output.startswith("opd new: ") and answer.output.count("\n") == 1
    assert all(word in answer.output for word in words)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_force_writes_into_a_folder_and_leaves_what_else_is_there(tmp_path):
    folder = new.copy_recipe("mine", "crisp", tmp_path)
    (folder / "notes.txt").write_text("mine")
    (folder / "tiny_cpu.sh").write_text("broken")
    with pytest.raises(ConfigError, match="--force"):
        new.copy_recipe("mine", "crisp", tmp_path)
    new.copy_recipe("mine", "crisp", tmp_path, force=True)
    assert (folder / "notes.txt").read_text() == "mine" and "name_run" in (folder / "tiny_cpu.sh").read_text()


def test_the_command_plans_what_it_made_and_says_where_it_will_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ):
        new.main("mine", "crisp", Path("experiments"), force=False)
    answer = " ".join(capsys.readouterr().out.split())
    assert "Nothing was started" in answer
    for script, run in {"tiny_cpu": "cpu_tiny", "qwen3_8b": "qwen3-8b", "qwen3_14b": "qwen3-14b"}.items():
        assert f"experiments/mine/{script}.sh trains into {tmp_path}/runs/mine-{run}" in answer
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("source", new.PIPELINES)
def test_a_new_pipeline_recipe_is_the_original_under_another_name_and_dry_runs(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    new.main("mine", source, Path("experiments"), force=False)
    folder = Path("experiments/mine")
    answer = " ".join(capsys.readouterr().out.split())
    assert "experiments/mine/config/recipe/mine/tiny_cpu.yaml trains into" in answer
    assert not (tmp_path / "runs").exists()
    for file in sorted((folder / "config/recipe/mine").glob("*.yaml")):
        copy = command.compose(source, [f"recipe=mine/{file.stem}"], [folder / "config"])
        first = command.compose(source, [] if file.stem == "tiny_cpu" else [f"recipe={source}/{file.stem}"])
        assert Path(copy.run_dir).name == Path(first.run_dir).name.replace(source, "mine", 1)
        assert f"trains into {copy.run_dir}" in answer
        assert dataclasses.replace(copy, run_dir="") == dataclasses.replace(first, run_dir="")


def test_an_edit_of_a_pipelines_recipe_is_what_it_runs_with(tmp_path):
    folder = new.copy_recipe("mine", "ssd", tmp_path)
    recipe = folder / "config/recipe/mine/tiny_cpu.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 96", "steps: 7"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OPD_RUNS": "/runs"}
    shown = subprocess.run(
        [folder / "tiny_cpu.sh", "--cfg", "seed=3"], env=environment, cwd="/", capture_output=True, text=True
    )
    config = OmegaConf.create(shown.stdout)
    assert (config.train.steps, config.seed, config.run_dir) == (7, 3, "/runs/mine-cpu_tiny"), shown.stderr


def test_the_published_recipes_can_be_asked_for():
    assert CliRunner().invoke(app, ["new", "--recipes"]).output.strip() == str(RECIPES)


# ---------------------------------------------------------------------- a copied folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copied_folder_has_a_run_folder_of_its_own(script, composed, tmp_path):
    method, name = script.split("/")
    shutil.copytree(RECIPES / method, tmp_path / "recipes" / "mine")
    shutil.copy(RECIPES / "common.sh", tmp_path / "recipes")
    first, copy = composed(script), composed(tmp_path / "recipes" / "mine" / name)
    assert copy.trainer.experiment_name == first.trainer.experiment_name.replace(method, "mine", 1)
    assert copy.opd.run_dir == first.opd.run_dir.replace(f"/{method}-", "/mine-")
    assert differences(copy, first) == set()


@pytest.mark.parametrize(
    ("choice", "run"),
    [
        ("method=grpo", "mine-cpu_tiny-grpo"),
        ("recipe=crisp/qwen3_14b", "mine-cpu_tiny-crisp-qwen3_14b"),
        ("trainer.experiment_name=other", "other"),
    ],
)
def test_a_copy_that_is_told_to_be_another_method_does_not_go_on_from_its_own_runs(choice, run, composed, tmp_path):
    shutil.copytree(RECIPES / "crisp", tmp_path / "recipes" / "mine")
    shutil.copy(RECIPES / "common.sh", tmp_path / "recipes")
    assert composed(tmp_path / "recipes/mine/tiny_cpu.sh", choice).trainer.experiment_name == run


def test_a_renamed_script_and_a_folder_of_any_name_have_run_folders_of_their_own(composed, tmp_path):
    folder = tmp_path / "my 'own' recipe, 2"
    shutil.copytree(RECIPES / "crisp", folder)
    shutil.copy(RECIPES / "common.sh", folder)  # beside the scripts
    (folder / "qwen3_8b.sh").rename(folder / "qwen3_0_6b_long.sh")
    assert composed(folder / "tiny_cpu.sh").trainer.experiment_name == "my--own--recipe--2-cpu_tiny"
    assert composed(folder / "qwen3_0_6b_long.sh").trainer.experiment_name == "my--own--recipe--2-qwen3-0.6b-long"
    shutil.copytree(RECIPES / "crisp", tmp_path / "recipes" / "crisp")
    shutil.copy(RECIPES / "common.sh", tmp_path / "recipes")
    (tmp_path / "recipes/crisp/qwen3_8b.sh").rename(tmp_path / "recipes/crisp/long.sh")
    assert composed(tmp_path / "recipes/crisp/long.sh").trainer.experiment_name == "crisp-long"


def test_a_copied_folder_works_outside_recipes_too_and_says_what_it_misses(run_recipe, tmp_path):
    shutil.copytree(RECIPES / "grpo", tmp_path / "mine")
    without = {"PATH": "/usr/bin:/bin"}
    for script in ("qwen3_8b.sh", "tiny_cpu.sh"):
        answer = run_recipe(tmp_path / "mine" / script, cwd=tmp_path, **without)
        assert answer.returncode == 2
        assert answer.stderr == (
            f"{script}: common.sh is neither here nor in .. and opd is not on PATH; run bash setup.sh.\n"
        )
    answer = run_recipe(tmp_path / "mine/qwen3_8b.sh", cwd=tmp_path, DATA_DIR=str(tmp_path))  # the installed one
    assert answer.returncode == 2 and "dapo_math_17k/train.parquet is missing" in answer.stderr
    answer = run_recipe(tmp_path / "mine/tiny_cpu.sh", "--cfg", cwd=tmp_path)
    assert OmegaConf.create(answer.stdout).opd.run_dir == str(tmp_path / "runs" / "mine-cpu_tiny")
    shutil.copy(RECIPES / "common.sh", tmp_path)
    answer = run_recipe(tmp_path / "mine/tiny_cpu.sh", cwd=tmp_path, OPD_VENV=str(tmp_path), **without)
    assert answer.returncode == 2 and "opd is not installed" in answer.stderr


def test_a_copied_folder_of_the_comparison_has_runs_of_its_own(run_recipe, tmp_path):
    """`opd` writes down where each run is to be, and fails, so that no report is asked for."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "opd").write_text(f"#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" >> {tmp_path}/asked\nexit 1\n")
    (tmp_path / "bin" / "opd").chmod(0o755)
    for name in ("compare", "mine"):
        shutil.copytree(RECIPES / "compare", tmp_path / "recipes" / name)
    shutil.copy(RECIPES / "common.sh", tmp_path / "recipes")
    for model in ("base", "large"):
        (tmp_path / "tinymath" / model).mkdir(parents=True)
        (tmp_path / "tinymath" / model / "config.json").touch()
    path = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name in ("compare", "mine"):
        variables = {"PATH": path, "OPD_HOME": str(tmp_path), "METHODS": "grpo", "SEEDS": "1"}
        assert run_recipe(tmp_path / "recipes" / name / "tiny_cpu.sh", cwd=tmp_path, **variables).returncode == 2
        assert f"opd.run_dir='{tmp_path}/runs/{name}/grpo-seed1'" in (tmp_path / "asked").read_text().splitlines()
