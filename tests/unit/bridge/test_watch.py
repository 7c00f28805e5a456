# SPDX-License-Identifier: Apache-2.0
"""What a run does about an alarm: its records, whether it ends, where it goes back to. The stack test runs it whole."""

import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from opd_ext.alarms.config import AlarmsConfig
from opd_ext.alarms.record import read
from opd_ext.bridge.watch import Watch
from tests.unit.alarms.test_signs import after, steps

BREAKS = steps(length=after(30, lambda _, value: value * 4))
RAISED = 33


def follow(folder, lines=BREAKS, config=None, resumed=0):
    """Watch steps beyond ``resumed`` as the trainer does, until the run is over; returns what became of it."""
    folder.mkdir(exist_ok=True)
    for step in (10, 20, 30):
        (folder / "checkpoints" / f"global_step_{step}").mkdir(parents=True, exist_ok=True)
    log = [*lines[:resumed]] if resumed else []
    validations = [{"step": 10, "phase": "val", "val/accuracy": 0.5}, {"step": 20, "phase": "val", "val/accuracy": 0.6}]
    recorded = [{**line, "phase": "train"} for line in log] + validations
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in recorded))
    trainer = SimpleNamespace(
        run_dir=folder,
        global_steps=resumed,
        total_training_steps=60,
        opd=SimpleNamespace(alarms=config or AlarmsConfig()),
        protocol=SimpleNamespace(problems=[SimpleNamespace(monitored=False)] * 100),
        config=OmegaConf.create({"trainer": {"test_freq": 10, "default_local_dir": str(folder / "checkpoints")}}),
        told=[],
        validated=[],
        on_validate_begin=lambda: None,
        on_validate_end=lambda: None,
    )
    trainer.log = SimpleNamespace(note=lambda text, style="": trainer.told.append(text))
    trainer._validate = lambda: trainer.validated.append(step)
    watch = Watch(trainer)
    found = {}
    for line in lines[resumed:]:
        step = line["step"]
        if step > trainer.total_training_steps:
            break
        if numbers := watch.look(step, {key: it for key, it in line.items() if key != "step"}, validated=step == 20):
            found[step] = numbers
    return trainer, found


def test_a_warning_is_told_and_changes_nothing(tmp_path):
    trainer, found = follow(tmp_path / "run")
    assert found == {RAISED: {"alarm/length": 1.0}} and trainer.total_training_steps == 60
    (record,) = read(trainer.run_dir)
    assert (record.step, record.alarm, record.done) == (RAISED, "length", "warn")
    assert trainer.told == [f"ALARM at {record}"] and trainer.validated == []


def test_a_resumed_run_raises_the_same_alarm_once(tmp_path):
    follow(tmp_path / "run")
    _, found = follow(tmp_path / "run", resumed=31)
    assert list(found) == [RAISED] and len(read(tmp_path / "run")) == 1


def test_a_stop_ends_the_run_after_a_validation(tmp_path):
    trainer, _ = follow(tmp_path / "run", config=AlarmsConfig(length="stop"))
    assert trainer.total_training_steps == RAISED and trainer.validated == [RAISED]
    assert [record.done for record in read(trainer.run_dir)] == ["stop"]


def test_a_rollback_goes_to_the_best_validation_that_has_a_checkpoint(tmp_path):
    trainer, _ = follow(tmp_path / "run", config=AlarmsConfig(length="rollback"))
    (record,) = read(trainer.run_dir)
    assert (record.done, record.to, record.pending) == ("rollback", 20, True)
    assert trainer.total_training_steps == RAISED and trainer.validated == []


@pytest.mark.parametrize("most, done", [(0, ["stop"]), (1, ["rollback", "stop"]), (2, ["rollback", "rollback"])])
def test_after_so_many_ways_back_the_next_is_a_stop(tmp_path, most, done):
    config = AlarmsConfig(length="rollback", max_rollbacks=most)
    follow(tmp_path / "run", config=config)
    if most:
        follow(tmp_path / "run", config=config, resumed=20)
    assert [record.done for record in read(tmp_path / "run")] == done


def test_two_alarms_of_one_step_go_back_once(tmp_path):
    both = steps(length=after(30, lambda _, value: value * 4), entropy=after(30, lambda _, value: value * 8))
    trainer, found = follow(tmp_path / "run", both, AlarmsConfig(length="rollback", entropy="rollback"))
    assert found[RAISED] == {"alarm/entropy": 1.0, "alarm/length": 1.0}
    assert sorted(record.done for record in read(trainer.run_dir)) == ["rollback", "warn"]
