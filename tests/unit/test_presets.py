# SPDX-License-Identifier: Apache-2.0
"""Every setting has one home: a method's the algorithm, a recipe's model and data, a scale's the machine."""

from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from opd_ext.config.compose import CONFIG_DIR, compose_config
from opd_ext.config.overrides import quoted
from tests.unit.test_published import PUBLISHED


@pytest.fixture
def compose(presets_composed_once):
    return lambda *overrides: compose_config(list(overrides))


def test_crisp_14b_differs_from_8b_in_the_model_and_the_run_folder(compose):
    small, large = (str(OmegaConf.to_container(compose(f"recipe=crisp/{name}"))) for name in ("qwen3_8b", "qwen3_14b"))
    assert "'path': 'Qwen/Qwen3-14B'" in large
    assert small.replace("Qwen3-8B", "Qwen3-14B").replace("crisp-qwen3-8b", "crisp-qwen3-14b") == large


def leaves(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as text."""
    if not isinstance(value, dict):
        return {prefix[1:]: str(value)}
    return {key: leaf for name, part in value.items() for key, leaf in leaves(part, f"{prefix}.{name}").items()}


def differences(*configs: DictConfig) -> set[str]:
    """Dotted keys in which two configurations differ, but for what follows from the names of run and model."""
    follows = ("run_dir", "default_local_dir", "experiment_name", "served_model_name", "tokenizer_path")
    first, second = (leaves(OmegaConf.to_container(config)) for config in configs)
    keys = (key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
    return {key for key in keys if not key.endswith(follows)}


def test_opsd_8b_has_another_model_and_the_clip_of_that_size(compose):
    small, large = compose("recipe=opsd/qwen3_1_7b"), compose("recipe=opsd/qwen3_8b")
    machine = {"actor_rollout_ref.rollout.tensor_model_parallel_size"}
    assert differences(small, large) - machine == {"actor_rollout_ref.model.path", "opd.divergence.clip"}
    assert (large.actor_rollout_ref.model.path, large.opd.divergence.clip) == ("Qwen/Qwen3-8B", 0.06)


@pytest.mark.parametrize("choice", ["recipe={}/qwen3_0_6b", "method={}"])
def test_iw_opd_and_its_baseline_differ_in_the_credit_alone(choice, compose):
    changed = differences(*(compose("scale=node_8xh200", choice.format(method)) for method in ("opd", "iw_opd")))
    assert changed == {"opd.method", "opd.credit.kind", "opd.credit.gamma"}


@pytest.mark.parametrize("choice", ["recipe={}/qwen3_8b", "method={}"])
def test_trace_and_grpo_are_two_arms_of_one_study(choice, compose):
    changed = differences(*(compose("scale=node_8xh200", choice.format(method)) for method in ("grpo", "trace")))
    shared = {key for key in changed if not key.startswith("opd.")}
    # The entropy is a metric; a pair with the teacher's note is longer.
    assert {key.rpartition(".")[2] for key in shared} == {
        "calculate_entropy",
        "ppo_max_token_len_per_gpu",
        "log_prob_max_token_len_per_gpu",
    }


RECIPE_FILES = sorted((CONFIG_DIR / "recipe").glob("*/*.yaml"))


@pytest.mark.parametrize("file", RECIPE_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_repeats_nothing_that_it_builds_on(file, compose):
    """Its settings differ from those of its method, world and scale, or of the recipe that it varies."""
    content = OmegaConf.to_container(OmegaConf.load(file))
    defaults = content.pop("defaults")
    parent = next((entry for entry in defaults if isinstance(entry, str) and "/" in entry), None)
    chosen = {key: value for entry in defaults if isinstance(entry, dict) for key, value in entry.items()}
    groups = [f"{key.rpartition('/')[2]}={value}" for key, value in chosen.items()]
    builds_on = [f"recipe={parent}"] if parent else groups
    assert parent or chosen["override /method"] == file.parent.name
    config, base = compose(f"recipe={file.parent.name}/{file.stem}"), compose(*builds_on)
    settings = leaves(content)
    for key in settings:
        if OmegaConf.select(config, key) == OmegaConf.select(base, key) and key != "actor_rollout_ref.model.path":
            # Unless it would follow from another one of them; and a recipe names its model, even the default one.
            others = [
                f"{other}={quoted(value) if '{' in value else value}"  # a template has braces of its own
                for other, value in settings.items()
                if other != key and "${" not in value
            ]
            assert OmegaConf.select(config, key) != OmegaConf.select(compose(*builds_on, *others), key), key


@pytest.mark.parametrize("recipe", ["recipe=sdpo/qwen3_8b", "recipe=crisp/qwen3_14b"])
def test_a_choice_on_the_command_line_wins_over_a_recipes(recipe, compose):
    for overrides in ([recipe, "scale=cpu_tiny"], ["scale=cpu_tiny", recipe]):
        assert compose(*overrides).opd.device == "cpu"
    assert compose(recipe, "method=tip").opd.method == compose("method=tip", recipe).opd.method == "tip"
    assert compose(recipe, "opd.seed=7").opd.seed == 7
    other = compose(recipe, "recipe=cispo/qwen3_8b_base")
    assert other == compose("recipe=cispo/qwen3_8b_base")


# ---------------------------------------------------------------------- a machine: scale=

MACHINE = (
    "opd.scale",
    "opd.device",
    "opd.plan",  # what the machine is made of
    "opd.warm_python",
    "data.dataloader_num_workers",
    "actor_rollout_ref.model.enable_gradient_checkpointing",
    "actor_rollout_ref.model.use_remove_padding",
    "actor_rollout_ref.model.override_config.attn_implementation",
    *(f"actor_rollout_ref.{part}.fsdp_config" for part in ("actor", "ref")),
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu",
    *(
        f"actor_rollout_ref.rollout.{key}"
        for key in (
            "dtype",
            "tensor_model_parallel_size",
            "gpu_memory_utilization",
            "free_cache_engine",
            "enable_sleep_mode",
            "enforce_eager",
            "load_format",
            "max_num_batched_tokens",
            "max_num_seqs",
            "enable_prefix_caching",
            "enable_chunked_prefill",
            "agent.num_workers",
            "checkpoint_engine",
            "engine_kwargs",
        )
    ),
    "reward.num_workers",
    "trainer.nnodes",
    "trainer.n_gpus_per_node",
    "transfer_queue",
    "ray_kwargs",
)


@pytest.mark.parametrize("file", sorted((CONFIG_DIR / "scale").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_scale_is_a_machine_and_nothing_else(file):
    content = OmegaConf.to_container(OmegaConf.load(file))
    content.pop("defaults", None)  # the world that a small machine brings along
    keys = set(leaves(content))
    assert {key for key in keys if not any(key == own or key.startswith(f"{own}.") for own in MACHINE)} == set()
    published = set().union(*PUBLISHED.values())
    assert not keys & published


def test_a_world_is_data_and_grader_and_leaves_the_algorithm_alone():
    keys = set(leaves(OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "world" / "math.yaml"))))
    assert {key.split(".")[0] for key in keys} == {"opd", "data", "reward"}
    assert not keys & set().union(*PUBLISHED.values())
