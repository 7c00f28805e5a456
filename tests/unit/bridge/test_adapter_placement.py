# SPDX-License-Identifier: Apache-2.0
"""Who is built beside a student: a reference engine for a teacher that is a model, none for one that is an adapter."""

import os

import pytest

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

from verl.trainer.ppo.utils import Role

from opd_ext import plugin
from opd_ext.bridge import saving
from opd_ext.bridge.trainer import SyncTrainer
from opd_ext.checkpoints.layout import TrainerState
from opd_ext.config.checks import check
from opd_ext.config.compose import compose_config

LORA = ("actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.lora.merge=true")
PERIODIC, EMA = ("method=crisp",), ("method=sdpo",)
SEVERAL = (
    *PERIODIC,
    "opd.teacher_key=difficulty",
    "opd.teachers={past: {interval: 3, rows: [1]}, first: {weights: frozen, rows: [2]},"
    " now: {weights: live, rows: [3]}, large: {path: /models/large, weights: external, rows: [4]}}",
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    plugin.register()


def trainer(*words: str) -> SyncTrainer:
    config = compose_config([*words, "scale=cpu_tiny"])
    check(config)
    found = SyncTrainer(config)
    found._init_resource_pool_mgr()
    found.global_steps = 1
    return found


@pytest.mark.parametrize(
    ("words", "engine", "models", "adapters"),
    [
        (PERIODIC, True, {"": None}, {}),
        ((*PERIODIC, *LORA), False, {}, {"": True}),
        ((*EMA, *LORA), False, {}, {"": True}),
        ((*PERIODIC, *LORA, "opd.teacher.weights=trust_region"), False, {}, {"": False}),
        ((*PERIODIC, *LORA, "opd.teacher.weights=base"), False, {}, {}),
        (SEVERAL, True, {"past": None, "first": None, "large": "/models/large"}, {}),
        ((*SEVERAL, *LORA), True, {"large": "/models/large"}, {"past": True, "first": False}),
        (("method=grpo", "actor_rollout_ref.actor.use_kl_loss=true"), True, {}, {}),
        (("method=grpo", "actor_rollout_ref.actor.use_kl_loss=true", *LORA), False, {}, {}),
    ],
)
def test_a_second_model_is_there_for_whom_it_is_needed(words, engine, models, adapters):
    found = trainer(*words)
    assert list(found.role_worker_mapping) == [Role.ActorRolloutRef if engine else Role.ActorRollout]
    assert found.config.actor_rollout_ref.teacher_paths == models
    assert found.config.actor_rollout_ref.teacher_adapters == adapters, "and whether each ever moves"


def test_an_adapter_that_moves_is_saved_before_it_has_moved():
    """Its A begins at random, so that nobody else has it; a model's first weights are where the run got them."""
    for words, held in ((PERIODIC, []), ((*PERIODIC, *LORA), [""])):
        found = trainer(*words)
        assert saving._held_teachers(found) == held
        found.state = TrainerState(teacher_version=1)
        assert saving._held_teachers(found) == [""]
    fading = trainer("method=rlsd", *LORA, "opd.credit.decay=3")
    assert saving._held_teachers(fading) == [""]
    fading.global_steps = 5
    assert saving._held_teachers(fading) == [], "no later step reads it"
