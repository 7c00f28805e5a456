# SPDX-License-Identifier: Apache-2.0
"""Situations that end, or are told, before Ray starts; and a run that goes wrong later."""

import json

from opd_ext.bridge import checkpoint
from opd_ext.checkpoints import best
from tests.unit.preflight.conftest import rows


def other_end_of_a_turn(start, world) -> None:
    def base(folder) -> None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [371]}))

    status, said, started, printed = start("method=opd", f"opd.teacher.path={world.model(base)}")
    assert (status, len(started)) == (0, 1), said
    assert "note: The student ends with <|im_end|>, the teacher with <|endoftext|>" in printed


def distillation_and_rewards(start, world) -> None:
    """Nobody needs a grade to distil, and no other trainer takes over in silence."""
    plain = world.parquet(rows(reward_model=..., data_source=...))
    status, said, started, printed = start(f"data.train_files={plain}", f"data.val_files={plain}")
    assert (status, len(started)) == (0, 1), said
    assert "has no reward_model, so it is not graded and no accuracy is reported" in printed
    for mode in ("sync", "separate_async"):
        status, said, started, _ = start(f"trainer.v1.trainer_mode={mode}")
        assert status == 2 and "know nothing of a teacher" in said and len(started) == 1


def collapse(tmp_path) -> None:
    """Fine until a step and then at 0: the run ends there, and the checkpoint of its best validation is kept."""
    accuracies = {0: 0.5, 100: 0.7, 200: 0.6, 300: 0.0}
    lines = [{"step": step, "phase": "val", "val/accuracy": share} for step, share in accuracies.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = best.validations(tmp_path)
    assert found == accuracies
    until = {step: share for step, share in found.items() if step < 300}
    assert best.collapse(until, 256, 0.5) is None
    assert "at step 300" in best.collapse(found, 256, 0.5)
    for step in (100, 200, 300):
        known = {s: share for s, share in found.items() if s <= step}
        checkpoint.commit(checkpoint.begin(tmp_path, step), tmp_path, step, keep=1, best=best.best_step(known))
    assert checkpoint.steps(tmp_path) == [100, 300]


def thinking_switch_without_effect(start) -> None:
    _, _, started, printed = start("data.apply_chat_template_kwargs={enable_thinking: false}")
    assert len(started) == 1 and "note: The chat template has no enable_thinking" in printed
