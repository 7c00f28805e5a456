# SPDX-License-Identifier: Apache-2.0
"""The GPU recipes as they are planned: they fit, validate less than they train, and take the hours that they say."""

import functools
from pathlib import Path

import pytest

from opd_ext.config.compose import CONFIG_DIR
from opd_ext.plan.advice import FULL, advice
from opd_ext.plan.memory import phases
from opd_ext.plan.timing import server, times
from opd_ext.reference import costs

RECIPES = [recipe for method in sorted((CONFIG_DIR / "recipe").iterdir()) for recipe in costs.gpu_recipes(method.name)]
GUIDES = sorted((CONFIG_DIR.parents[1] / "recipes").glob("*/README.md"))
EVENING = 6  # hours


@functools.cache
def planned(recipe, *overrides):
    return costs.planned(recipe, *overrides)


def fits(run) -> bool:
    """Every phase leaves the fragments their 3 %, and one sequence of full length has room beside vLLM's weights."""
    room = server(run).room >= run.vllm_length
    return room and all(phase.bytes <= FULL * run.machine.memory for phase in phases(run))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_its_machine_and_the_plan_has_nothing_graver_to_say(recipe):
    run = planned(recipe)
    taken = times(run)
    assert fits(run)
    assert run.gpus == run.gpus_there, "the recipe uses its machine, and no more"
    assert taken.validating < 0.5 * taken.total
    grave = ("OUT OF MEMORY", "vLLM WILL NOT START", "generation waits")
    assert [each for each in advice(run, taken) if each.startswith(grave)] == []


def test_what_does_not_fit_is_seen():
    share = "actor_rollout_ref.rollout.gpu_memory_utilization"
    assert not fits(planned("crisp/qwen3_32b", f"{share}=0.6"))
    assert not fits(planned("crisp/qwen3_1_7b_gpu_1", "scale=gpu_1_24gb"))
    assert not fits(planned("crisp/qwen3_4b_gpu_1", f"{share}=0.12"))  # no room for a sequence
    run = planned("opsd/qwen3_1_7b", "opd.validation.monitor=null")
    assert times(run).validating > 0.5 * times(run).total


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "_gpu_1" in recipe])
def test_one_card_takes_an_evening(recipe):
    run = planned(recipe)
    assert (run.gpus, run.machine.name) == (1, "rtx4090" if recipe.endswith("_24gb") else "h100")
    assert times(run).total < EVENING * 3600


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_a_cluster_shards_within_its_nodes_whatever_their_number(nodes):
    run = planned("crisp/qwen3_8b", "scale=cluster", f"trainer.nnodes={nodes}", "data.train_batch_size=64")
    assert (run.ranks, run.sharding.shards, run.teacher_sharding.shards) == (8 * nodes, 8, 8)
    assert fits(run)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.parent.name)
def test_the_costs_in_a_guide_are_what_the_plan_says_now(guide: Path):
    written = costs.with_costs(guide)
    assert (written is not None) == bool(costs.gpu_recipes(guide.parent.name)), "a guide of GPU recipes has a table"
    assert written in (None, guide.read_text()), f"run python -m opd_ext.reference: {guide} is out of date"
