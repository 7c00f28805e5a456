# SPDX-License-Identifier: Apache-2.0
"""What a run does about its alarms: says so, ends, or asks to go back to the best checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from opd_ext.alarms import record, signs
from opd_ext.checkpoints import best
from opd_ext.checkpoints.layout import steps
from opd_ext.files import read_jsonl

if TYPE_CHECKING:
    from opd_ext.bridge.trainer import OPDTrainer


class Watch:
    """The recorded steps of a run, and its alarms.

    A rollback ends the trainer, too: the driver puts the checkpoint in charge and starts it again, so that weights,
    moments, teacher, state and place in the data are those of a resumed run by the same code.
    """

    def __init__(self, trainer: OPDTrainer):
        self._trainer, self._config = trainer, trainer.opd.alarms
        record.forget_after(trainer.run_dir, trainer.global_steps)
        path = trainer.run_dir / "metrics.jsonl"
        lines = read_jsonl(path) if path.is_file() else []
        self._steps = [_watched(line) for line in lines if line["phase"] == "train"]
        self._validated: dict[int, float] = best.validations(trainer.run_dir)

    def look(self, step: int, metrics: Mapping[str, float], validated: bool) -> dict[str, float]:
        """Look at a step that is over, and do what its alarms ask for.

        Args:
            metrics: of the step.
            validated: whether there was a validation.

        Returns:
            ``alarm/<name>``: 1 for every alarm that this step raises.
        """
        trainer = self._trainer
        self._steps.append(_watched({**metrics, "step": step}))
        if validated:
            self._validated = best.validations(trainer.run_dir)
        plan = trainer.protocol
        problems = sum(p.monitored for p in plan.problems) or len(plan.problems)
        found = signs.raised(self._steps, signs.Validations(self._validated, problems), self._config)
        if not found:
            return {}
        wanted = {alarm: self._config.action(alarm) for alarm in found}
        back = self._target(step) if "rollback" in wanted.values() else None
        records = []
        for alarm, why in found.items():
            done = "stop" if wanted[alarm] == "rollback" and back is None else wanted[alarm]
            goes = done == "rollback" and not any(it.done == "rollback" for it in records)
            done = "warn" if done == "rollback" and not goes else done  # one way back is enough
            records.append(record.Record(step, alarm, why, done, back if goes else None, goes))
        for it in records:
            trainer.log.note(f"ALARM at {it}", "bold red")
        record.append(trainer.run_dir, records)
        if any(it.done != "warn" for it in records):
            self._end(step, validate=not any(it.done == "rollback" for it in records))
        return {f"{record.PREFIX}{alarm}": 1.0 for alarm in found}

    def _target(self, step: int) -> int | None:
        """The checkpoint to go back to: of the best validation, else the newest; None if there is none left to try."""
        trainer = self._trainer
        if record.rollbacks(trainer.run_dir) >= self._config.max_rollbacks:
            return None
        # What the alarm is about has been going on for some steps.
        root = Path(trainer.config.trainer.default_local_dir)
        there = [at for at in steps(root) if at <= step - self._config.persist]
        validated = {at: share for at, share in self._validated.items() if at in there}
        return best.best_step(validated) if validated else max(there, default=None)

    def _end(self, step: int, validate: bool) -> None:
        trainer = self._trainer
        trainer.total_training_steps = step
        if validate and trainer.config.trainer.test_freq > 0:
            if not (trainer.run_dir / "generations" / f"val_{step}.jsonl").exists():
                trainer.on_validate_begin()
                trainer._validate()
                trainer.on_validate_end()


def _watched(line: Mapping[str, float]) -> dict[str, float]:
    """What alarms read, as ``metrics.jsonl`` gives it back: a resumed run sees the same numbers."""
    kept = {name: float(line[name]) for name in signs.WATCHED if name in line}
    return {**json.loads(json.dumps(kept)), "step": int(line["step"])}
