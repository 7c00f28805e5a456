# SPDX-License-Identifier: Apache-2.0
"""Every model that a recipe names has a size before anything is fetched; what has none is called unknown."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig
from typer.testing import CliRunner

from opd_ext.cli import app
from opd_ext.config.checks import check, external_models
from opd_ext.config.compose import CONFIG_DIR, compose_config
from opd_ext.pipelines import command
from opd_ext.plan.shapes import model_shape, of_config
from opd_ext.tinymath.levels import FIRST, LONG, TOOLS

RECIPES = sorted(f"{file.parent.name}/{file.stem}" for file in (CONFIG_DIR / "recipe").glob("*/*.yaml"))
PIPELINES = sorted((CONFIG_DIR / "pipelines" / "recipe").glob("*/*.yaml"))


@pytest.fixture(autouse=True)
def nothing_fetched(tmp_path, monkeypatch):
    """A new user: neither data nor models nor runs, and an empty cache of the hub."""
    monkeypatch.setenv("OPD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OPD_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_models_of_a_recipe_have_sizes(recipe):
    config = compose_config([f"recipe={recipe}"])
    paths = [config.actor_rollout_ref.model.path, *external_models(check(config)).values()]
    assert [path for path in paths if model_shape(path) is None] == []


@pytest.mark.parametrize("file", PIPELINES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_models_of_a_recipe_for_a_pipeline_have_sizes(file):
    config = command.compose(file.parent.name, [f"recipe={file.parent.name}/{file.stem}"])
    diffusion = getattr(config, "diffusion", None)
    paths = [config.model, getattr(config, "teacher", None), diffusion.model if diffusion else None]
    assert [path for path in paths if path and model_shape(path) is None] == []


@pytest.mark.parametrize("level", [FIRST, LONG, TOOLS], ids=lambda level: level.name)
def test_the_miniature_worlds_have_the_sizes_that_they_are_built_with(level):
    words = len(level.make_tokenizer())
    for name, spec in level.specs.items():
        shape = model_shape(f"/nowhere/{level.name}/{name}")
        vocabulary = words + (name == "diffusion")  # and a mask
        assert (shape.layers, shape.hidden, shape.vocabulary, shape.query, shape.inner) == (
            spec.layers, spec.hidden_size, vocabulary, spec.heads * spec.head_dim, spec.intermediate_size
        )  # fmt: skip


def test_a_shipped_world_is_counted_alike_by_name_and_in_its_folder():
    for name in ("base", "large", "diffusion"):
        folder = Path(__file__).parents[3] / "opd_ext" / "tinymath" / "shipped" / name
        by_name, counted = model_shape(f"/nowhere/tinymath/{name}"), model_shape(str(folder))
        assert (by_name.parameters, by_name.active, by_name.tensors) == (
            counted.parameters, counted.active, counted.tensors
        )  # fmt: skip


def test_published_sizes():
    """SmolLM2-135M's and gpt-oss-20b's parameters as the hub counts them; Ling-mini-2.0's 16.26 B, 1.4 B active."""
    assert model_shape("/nowhere/models/smollm2").parameters == 134_515_008
    ling = model_shape("inclusionAI/Ling-mini-2.0")
    assert ling.parameters == pytest.approx(16.26e9, rel=0.002)
    assert ling.active + ling.head == pytest.approx(1.1e9, rel=0.1)  # the embedding, of which a row is read, is 0.3
    config = GptOssConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                          num_key_value_heads=2, head_dim=16, vocab_size=101, num_local_experts=4,
                          num_experts_per_tok=2)  # fmt: skip
    with torch.device("meta"):
        parameters = list(AutoModelForCausalLM.from_config(config).parameters())
    shape = of_config(config, "a model", "its config")
    assert (shape.parameters, shape.tensors) == (sum(p.numel() for p in parameters), len(parameters))
    assert model_shape("openai/gpt-oss-20b").parameters == 20_914_757_184


def test_a_hub_model_that_nobody_listed_is_sized_by_the_config_in_the_cache(tmp_path):
    assert model_shape("somebody/something") is None
    hub = tmp_path / "hub" / "models--somebody--something"
    snapshot = hub / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shipped = Path(__file__).parents[3] / "opd_ext" / "tinymath" / "shipped" / "large"
    shutil.copy(shipped / "config.json", snapshot)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0123")
    found = model_shape("somebody/something")
    assert (found.name, found.parameters) == ("somebody/something", model_shape(str(shipped)).parameters)
    config = json.loads((shipped / "config.json").read_text()) | {
        "model_type": "nobodys",
        "auto_map": {"AutoConfig": "m.C"},
    }
    (snapshot / "config.json").write_text(json.dumps(config))
    assert model_shape("somebody/something") is None  # its code would have to run


def test_a_model_that_is_still_to_be_trained_is_sized_by_the_folder_named_after_it_and_that_is_said(tmp_path):
    teacher = model_shape("/nowhere/runs/sft-smollm2_cpu/train/sft/checkpoints/global_step_120/huggingface")
    assert teacher.guessed and teacher.parameters == model_shape("HuggingFaceTB/SmolLM2-135M").parameters
    assert model_shape("/nowhere/runs/my-qwen3-1.7b/huggingface").hidden == 2048
    assert model_shape("/nowhere/runs/qwen3-1/huggingface") is None
    told = CliRunner().invoke(app, ["plan", "opd", "recipe=opd/smollm2_cpu"])
    assert told.exit_code == 0, told.output
    assert "has the size of smollm2, after which a folder is named" in " ".join(told.output.split())
    assert "no estimate" not in told.output and "whole run" in told.output


def test_a_plan_without_words_has_an_estimate():
    told = CliRunner().invoke(app, ["plan", "--json"])
    assert told.exit_code == 0 and json.loads(told.stdout)["student"]["vocabulary"] == 373, told.output


def test_what_a_pipeline_does_with_an_unknown_model_is_unknown_and_not_nothing():
    words = ["ssd", "recipe=ssd/smollm2_cpu", "model=somebody/something"]
    told = CliRunner().invoke(app, ["plan", *words])
    assert told.exit_code == 0 and "0.0" not in told.output, told.output
    assert "no estimate of what somebody/something does" in " ".join(told.output.split())
    plain = json.loads(CliRunner().invoke(app, ["plan", *words, "--json"]).stdout)
    assert (plain["seconds"], plain["disk"], plain["gpus"]) == (None, None, None)
    assert plain["unknown"] == list(plain["stages"])
