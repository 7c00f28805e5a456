# SPDX-License-Identifier: Apache-2.0
"""What must not go wrong around a step: seeds, checkpoints, and what a killed run leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from transformers import GenerationConfig

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

from opd_ext import files
from opd_ext.bridge import checkpoint, rollouts, saving
from opd_ext.bridge.agent_loop import rollout_seed
from opd_ext.bridge.runner import check_folder
from opd_ext.checkpoints.layout import CheckpointError, TrainerState, shards_per_replica
from opd_ext.config import schema
from opd_ext.config.compose import compose_config
from opd_ext.errors import RunError
from opd_ext.tokens.ends import stop_ids


def test_a_rollout_seed_depends_on_run_step_prompt_and_session_and_on_nothing_else():
    prompt = [{"role": "user", "content": "1 + 1"}]
    base = rollout_seed(1, 2, prompt, 3)
    assert base == rollout_seed(1, 2, [{"content": "1 + 1", "role": "user"}], 3)
    others = {
        rollout_seed(9, 2, prompt, 3),
        rollout_seed(1, 9, prompt, 3),
        rollout_seed(1, 2, [{"role": "user", "content": "1 + 2"}], 3),
        rollout_seed(1, 2, prompt, 9),
    }
    assert len(others | {base}) == 5
    assert all(0 <= seed < 2**63 for seed in others)


ON_A_FULL_DISK = """
import sys
from pathlib import Path
from opd_ext.bridge import checkpoint

root = Path(sys.argv[1])
assert not checkpoint.is_full(root)
(root / "global_step_4").mkdir()
folder = checkpoint.begin(root, 5)
with checkpoint.writing(folder, root, 5):
    with (folder / "weights").open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)) == 1 << 16:
            pass
    raise RuntimeError("unexpected pos 576 vs 470")  # what torch says of a short write
"""


def test_a_checkpoint_on_a_full_disk_says_so_and_leaves_the_disk_as_it_was(tmp_path):
    script, disk = tmp_path / "script.py", tmp_path / "disk"
    script.write_text(ON_A_FULL_DISK)
    disk.mkdir()
    mounted = f"mount -t tmpfs -o size=4m none {disk} && {{ {sys.executable} {script} {disk}; ls -A {disk}; }}"
    words = ["unshare", "--mount", "--map-root-user", "sh", "-c", mounted]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(checkpoint.__file__).parents[2])
    if "unshare: " in done.stderr or "mount: " in done.stderr:
        pytest.skip("this machine lets nobody mount a file system of their own")
    said = done.stderr.strip().split("\n")[-1]
    assert f"The disk of {disk} is full, so that the checkpoint of step 5 could not be written" in said, done.stderr
    assert said.endswith("goes on from the checkpoint of step 4.") and done.stdout.split() == ["global_step_4"]


def test_what_fails_beside_a_disk_with_room_is_raised_as_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), checkpoint.writing(tmp_path / "x", tmp_path, 5):
        raise RuntimeError("something else")


def test_every_end_of_a_response_that_the_model_names_counts(tmp_path):
    """Qwen3 stops at 151645 or 151643; its tokenizer knows the first alone (TRL 7039)."""
    tokenizer = SimpleNamespace(eos_token_id=151645, get_vocab=dict)
    GenerationConfig(eos_token_id=[151645, 151643]).save_pretrained(tmp_path)
    found = stop_ids(str(tmp_path), tokenizer)
    assert found == [151643, 151645]
    assert rollouts.token_classes(tokenizer, found) == {"eos": found}
    assert stop_ids(str(tmp_path / "no model"), tokenizer) == [151645]


def write_checkpoint(root, step, keep=None):
    folder = checkpoint.begin(root, step)
    (folder / "actor").mkdir()
    checkpoint.TrainerState(global_step=step, teacher_version=step - 1).write(folder)
    return checkpoint.commit(folder, root, step, keep)


def test_a_checkpoint_appears_whole_and_the_tracker_names_it(tmp_path):
    final = write_checkpoint(tmp_path / "ckpt", 5)
    assert final.name == "global_step_5"
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "5"
    assert checkpoint.TrainerState.read(final).teacher_version == 4


def test_a_save_that_is_killed_leaves_the_last_checkpoint_in_charge(tmp_path):
    write_checkpoint(tmp_path, 5)
    folder = checkpoint.begin(tmp_path, 6)
    (folder / "half").write_text("...")
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "5"
    assert not (tmp_path / "global_step_6").exists()
    checkpoint.begin(tmp_path, 6)
    assert not (folder / "half").exists()


def test_a_kill_between_rename_and_tracker_resumes_from_the_older_one_and_saves_again(tmp_path):
    write_checkpoint(tmp_path, 5)
    folder = checkpoint.begin(tmp_path, 6)
    with patch.object(checkpoint, "write_whole", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        checkpoint.commit(folder, tmp_path, 6, None)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "5"
    assert write_checkpoint(tmp_path, 6).exists()
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "6"


def test_a_checkpoint_that_makes_room_for_a_new_one_comes_back_if_that_fails(tmp_path):
    (write_checkpoint(tmp_path, 5) / "mark").touch()
    folder, rename = checkpoint.begin(tmp_path, 5), os.rename
    turns = iter([rename, KeyboardInterrupt, rename])

    def second_fails(source, target):
        if (turn := next(turns)) is KeyboardInterrupt:
            raise turn
        turn(source, target)

    with patch.object(files.os, "rename", second_fails), pytest.raises(KeyboardInterrupt):
        checkpoint.commit(folder, tmp_path, 5, None)
    assert (tmp_path / "global_step_5" / "mark").exists()


def test_a_kill_between_the_two_renames_of_a_checkpoint_loses_nothing(tmp_path):
    """What a kill leaves: the old one in the scratch folder, and nothing under its name."""
    (write_checkpoint(tmp_path, 5) / "mark").touch()
    scratch = tmp_path / ".global_step_5.k1ll_ed"
    scratch.mkdir()
    os.rename(tmp_path / "global_step_5", scratch / "old")
    checkpoint.mend(tmp_path)
    assert (tmp_path / "global_step_5" / "mark").exists() and not scratch.exists()


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for step in (2, 4, 10):
        write_checkpoint(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.glob("global_step_*")) == ["global_step_10", "global_step_4"]


def test_a_folder_without_state_is_not_taken_for_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a complete checkpoint"):
        checkpoint.TrainerState.read(tmp_path)


def test_metrics_beyond_the_resumed_step_and_half_written_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 2, 3)) + '{"step": 3, "x')
    files.drop_lines_after(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    files.drop_lines_after(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_problem_that_is_sampled_more_often_weighs_no_more():
    """One problem right in one of four samples, one right in its only sample: (1/4 + 1) / 2, not 2 / 5."""
    row = {"response_tokens": 8, "truncated": False, "data_source": "a", "index": 0}
    rows = [{**row, "uid": "p0", "acc": acc} for acc in (1.0, 0.0, 0.0, 0.0)]
    rows.append({**row, "uid": "p1", "acc": 1.0, "response_tokens": 24, "data_source": "b"})
    found = rollouts.summarise_by_source(rows, "val")
    assert (found["val/accuracy"], found["val/tokens_mean"], found["val/samples"]) == (0.625, 16.0, 5.0)
    assert (found["val/a/accuracy"], found["val/b/accuracy"]) == (0.25, 1.0)
    assert rollouts.summarise_sources(rows, "val") == {k: v for k, v in found.items() if k.count("/") == 2}


def test_rollout_metrics_are_means_over_samples():
    rows = [
        {"acc": 1.0, "response_tokens": 10, "truncated": False, "format_ok": 1.0},
        {"acc": 0.0, "response_tokens": 0, "truncated": True, "format_ok": 0.0},
    ]
    assert rollouts.summarise(rows, "val") == {
        "val/accuracy": 0.5,
        "val/tokens_mean": 5.0,
        "val/tokens_min": 0.0,
        "val/tokens_max": 10.0,
        "val/truncated": 0.5,
        "val/empty": 0.5,
        "val/samples": 2.0,
        "val/format_ok": 0.5,
    }


def test_a_response_is_truncated_if_it_used_its_limit_without_an_end():
    stops = [2, 4]
    assert rollouts.is_truncated([5, 5, 5], stops, 3) and not rollouts.is_truncated([5, 5, 4], stops, 3)
    assert not rollouts.is_truncated([5, 5, 2], stops, 3)
    assert not rollouts.is_truncated([5, 5], stops, 3) and not rollouts.is_truncated([], stops, 3)


def _row(index, acc):
    return {
        "data_source": "d",
        "index": index,
        "input": f"q{index}",
        "acc": acc,
        "response_tokens": 5,
        "truncated": False,
    }


def test_several_samples_per_problem_give_pass_at_k():
    rows = [_row(0, 1.0), _row(0, 0.0), _row(1, 0.0), _row(1, 0.0)]
    assert rollouts.summarise(rows, "val")["val/pass_at_2"] == 0.5
    assert not any("pass_at" in name for name in rollouts.summarise(rows[:1] + rows[2:3], "val"))
    assert not any("pass_at" in name for name in rollouts.summarise(rows[:3], "val")), "unequal numbers of samples"


# ---------------------------------------------------------------------- one disk, and complete


def _ranks(*sees):
    """What ranks do that see the trainer's disk, or (False) one of their own."""

    def ask(folder):
        for rank, shared in enumerate(sees):
            assert checkpoint.leave_token(folder if shared else f"{folder}-of-node-{rank}", rank) == shared
        return [f"node{rank}" for rank in range(len(sees))]

    return ask


def test_ranks_that_write_where_the_trainer_reads_leave_no_trace(tmp_path):
    (tmp_path / "ckpt" / ".shared_killed").mkdir(parents=True)
    checkpoint.check_shared(tmp_path / "ckpt", _ranks(True, True))
    assert not list((tmp_path / "ckpt").iterdir())


def test_a_rank_with_a_disk_of_its_own_is_named_before_the_first_step(tmp_path):
    with patch.object(checkpoint, "PATIENCE_S", 0.0), pytest.raises(CheckpointError) as refused:
        checkpoint.check_shared(tmp_path, _ranks(True, False, True, False))
    assert "what 2 of 4 ranks write there (on node1, node3) does not arrive here" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_trainer_on_a_node_without_the_run_folder_is_one_sentence(tmp_path):
    with pytest.raises(RunError, match="is not on node .*, where Ray has put the trainer"):
        check_folder(tmp_path)
    (tmp_path / "config.yaml").touch()
    check_folder(tmp_path)


@pytest.mark.parametrize(
    "lost", ["actor/model_world_size_4_rank_1.pt", "actor/optim_world_size_4_rank_0.pt",
             "actor/extra_state_world_size_4_rank_3.pt", "teacher/world_size_4_rank_1.pt", None]
)  # fmt: skip
def test_a_checkpoint_gets_its_name_only_with_a_file_of_every_rank(tmp_path, lost):
    """Four ranks, two replicas: the first two write weights and moments, all of them RNG."""
    wanted = {("actor/model_", 2), ("actor/optim_", 2), ("actor/extra_state_", 4), ("teacher/", 2)}
    for kind, count in wanted:
        for rank in range(count):
            path = tmp_path / f"{kind}world_size_4_rank_{rank}.pt"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    everything = tmp_path, 4, shards_per_replica(4, fsdp_size=2), ["model", "optimizer", "extra"], [""]
    if lost is None:
        checkpoint.check_complete(*everything)
        return
    (tmp_path / lost).unlink()
    with (
        patch.object(checkpoint, "PATIENCE_S", 0.0),
        pytest.raises(CheckpointError, match=f"{lost} is missing in .* .1 missing in all"),
    ):
        checkpoint.check_complete(*everything)


@pytest.mark.parametrize("method, last", [("trace", 40), ("crisp", 10**6)])
def test_a_teacher_is_saved_as_long_as_a_later_step_reads_it(method, last):
    """TRACE's divergence has a weight in step 40 for the last time; nobody reads the teacher that comes after it."""
    opd = schema.load(compose_config([f"method={method}", "scale=node_8xh200"]).opd)
    trainer = SimpleNamespace(opd=opd, adapters={}, state=TrainerState(teacher_version=1))
    held = []
    for trainer.global_steps in (1, last - 1, last, last + 1):
        held.append(saving._held_teachers(trainer) == [""])
    assert held == [True, True, method == "crisp", method == "crisp"]
    trainer.state.teacher_version = 0
    assert not saving._held_teachers(trainer), "still the initial model"
