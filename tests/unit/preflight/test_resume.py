# SPDX-License-Identifier: Apache-2.0
"""What a run goes on from is looked at before anything starts: a checkpoint that will do, and all that will not."""

import json

import pytest
import torch

from opd_ext.checkpoints.layout import EXTRA, MODEL, OPTIMISER, TEACHER, TrainerState, shard_name

LORA = ("actor_rollout_ref.model.lora.merge=true", "opd.teacher.weights=base", "~opd.teacher.interval")
RANKS = 2


@pytest.fixture
def saved(tmp_path):
    """``saved(lora=0, teacher=0)``: a checkpoint of two ranks after step 3 in the run folder of ``start``."""

    def write(lora: int = 0, teacher: int = 0):
        folder = tmp_path / "run" / "checkpoints" / "global_step_3"
        (folder / "actor").mkdir(parents=True)
        for rank in range(RANKS):
            for kind in (MODEL, OPTIMISER, EXTRA):
                torch.save({"weight": torch.ones(2)}, folder / "actor" / shard_name(kind, RANKS, rank))
        if lora:
            (folder / "actor" / "lora_train_meta.json").write_text(json.dumps({"r": lora, "lora_alpha": 32}))
        TrainerState(global_step=3, teacher_version=teacher).write(folder)
        (folder.parent / "latest_checkpointed_iteration.txt").write_text("3")
        return folder

    return write


def test_another_number_of_ranks_is_told_and_starts(start, saved, presets_composed_once):
    saved()
    status, said, started, _ = start()
    assert (status, len(started)) == (0, 1), said
    _, _, _, printed = start("--dry-run")
    assert "from step 3; 2 trainer ranks saved it, 1 go on" in printed


def test_a_queue_is_not_left_behind(start, saved, presets_composed_once):
    """Where the next batch is in the queue, the data are a batch further than in a synchronous run."""
    saved()
    status, said, started, _ = start("asynchronous=one_step_off")
    assert status == 2 and not started and "was saved with opd, which has taken other prompts" in said


def test_vllm_may_move_between_two_starts(start, saved, presets_composed_once):
    folder = saved()
    TrainerState(global_step=3, trainer_mode="opd_separate").write(folder)
    status, said, started, _ = start("asynchronous=one_step_off")
    assert (status, len(started)) == (0, 1), said


def test_the_adapter_that_was_saved_starts(start, saved, presets_composed_once):
    saved(lora=8)
    alpha = "actor_rollout_ref.model.lora_alpha=32"
    status, said, started, _ = start("actor_rollout_ref.model.lora_rank=8", alpha, *LORA)
    assert (status, len(started)) == (0, 1), said


def _no_state(folder):
    (folder / "state.json").unlink()


def _lost_moments(folder):
    (folder / "actor" / shard_name(OPTIMISER, RANKS, 1)).unlink()


def _cut_off(folder):
    path = folder / "actor" / shard_name(MODEL, RANKS, 1)
    path.write_bytes(path.read_bytes()[:100])


def _two_worlds(folder):
    (folder / "actor" / shard_name(MODEL, 3, 0)).touch()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (_no_state, "is not a complete checkpoint of this trainer"),
        (_lost_moments, "has weights of 2 ranks and moments of 1"),
        (_cut_off, "model_world_size_2_rank_1.pt cannot be read"),
        (_two_worlds, "shards of 2 and 3 ranks side by side"),
    ],
)
def test_an_incomplete_checkpoint_is_one_sentence(start, saved, presets_composed_once, spoil, says):
    spoil(saved())
    status, said, started, _ = start()
    assert (status, started) == (2, []) and says in said and "trainer.resume_from_path" in said, said
    assert start("trainer.resume_mode=disable")[0] == 0, "anew is possible"


@pytest.mark.parametrize(
    "words, lora, says",
    [
        (("actor_rollout_ref.model.lora_rank=8", *LORA), 0, "lora_rank=8, and the run was saved with 0"),
        (("actor_rollout_ref.model.lora_rank=8", *LORA), 4, "lora_rank=8, and the run was saved with 4"),
        ((), 8, "lora_rank=0, and the run was saved with 8"),
        (
            ("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_alpha=16", *LORA),
            8,
            "lora_alpha=16, and the run was saved with 32",
        ),
    ],
)
def test_another_adapter_is_one_sentence(start, saved, presets_composed_once, words, lora, says):
    saved(lora)
    status, said, started, _ = start(*words)
    assert (status, started) == (2, []) and says in said, said


def test_a_teacher_that_moved_must_be_there_if_it_is_read_again(start, saved, presets_composed_once):
    folder = saved(teacher=2)
    status, said, started, _ = start("opd.teacher.interval=1")
    assert (status, started) == (2, []) and "holds no teacher" in said
    (folder / "teacher").mkdir()
    torch.save({}, folder / "teacher" / shard_name(TEACHER, RANKS, 0))
    assert start("opd.teacher.interval=1")[0] == 0


def test_an_adapter_that_teaches_must_be_there_from_the_first_checkpoint_on(start, saved, presets_composed_once):
    """Its A began at random: a run that was saved with another teacher does not have it."""
    folder = saved(lora=8)
    adapter = ("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_alpha=32", LORA[0])
    status, said, started, _ = start(*adapter, "opd.teacher.interval=2")
    assert (status, started) == (2, []) and "holds no adapter of the teacher, and opd.teacher.weights=periodic" in said
    assert start(*adapter, "opd.teacher.weights=trust_region")[0] == 0, "one that never moves is the base"
    (folder / "teacher").mkdir()
    torch.save({}, folder / "teacher" / shard_name(TEACHER, RANKS, 0))
    assert start(*adapter, "opd.teacher.interval=2")[0] == 0


@pytest.mark.parametrize(
    ("versions", "single", "said"),
    [
        ({"gone": 2}, 0, "holds weights of the teacher gone, and by that name"),
        ({}, 2, "was saved with one teacher, which had moved"),
        ({"past": 2}, 0, "holds no teacher past"),
    ],
)
def test_several_teachers_go_on_with_their_own_weights_or_not_at_all(
    start, saved, presets_composed_once, versions, single, said
):
    folder = saved(teacher=single)
    TrainerState(global_step=3, teacher_version=single, teacher_versions=versions).write(folder)
    words = "opd.teacher_key=data_source", "opd.teachers={past: {interval: 2, rows: [sums]}, live: {weights: live}}"
    status, told, started, _ = start(*words)
    assert (status, started) == (2, []) and said in told
    if "past" in versions:
        (folder / "teachers" / "past").mkdir(parents=True)
        torch.save({}, folder / "teachers" / "past" / shard_name(TEACHER, RANKS, 0))
        assert start(*words)[0] == 0


def test_a_checkpoint_that_is_named_must_exist(start, tmp_path, presets_composed_once):
    status, said, started, _ = start(
        "trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}/global_step_9"
    )
    assert (status, started) == (2, []) and "global_step_9 does not exist" in said
