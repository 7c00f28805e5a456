# SPDX-License-Identifier: Apache-2.0
"""``opd.alarms``: which signs of trouble a run looks for, and what it does about each."""

from dataclasses import dataclass

from opd_ext.errors import ConfigError, one_of, positive

ALARMS = ("entropy", "length", "accuracy", "divergence", "teacher", "hacking")
ACTIONS = ("off", "warn", "stop", "rollback")

FEWEST = 8
"""Steps before a change, below which their spread is not known."""


@dataclass
class AlarmsConfig:
    """What a run does when a sign of trouble comes up: off | warn | stop | rollback (to the best checkpoint)."""

    entropy: str = "warn"  # the student's entropy jumps, or has fallen to a tenth of what it was at first
    length: str = "warn"  # responses become much longer or shorter within a few steps
    accuracy: str = "warn"  # accuracy of training rollouts breaks down
    divergence: str = "warn"  # the divergence jumps, or loss, gradient or divergence is no number any more
    teacher: str = "warn"  # for ten steps nothing was taught: no rollout had a teacher
    hacking: str = "warn"  # training rollouts are graded better while validation falls: the grader is gamed
    window: int = 20  # steps that the last ones are held against
    persist: int = 3  # steps in a row that must be beyond: one odd batch is no trend
    spread: float = 6.0  # standard deviations; at 6 noise with heavy tails raises none in runs of hundreds of steps
    entropy_factor: float = 4.0  # up or down; OPD may take it to a third within a window, and be the better for it
    length_factor: float = 2.5  # up or down; CRISP's own halving takes tens of steps
    accuracy_drop: float = 0.5  # share of the accuracy that must be lost; half, as in opd.stop_on_collapse
    divergence_factor: float = 5.0  # up; a refreshed teacher begins a new window
    max_rollbacks: int = 2  # afterwards a rollback is a stop
    rollback_lr: float = 0.5  # learning rate after a rollback, as a factor: the same steps again would end the same

    def action(self, alarm: str) -> str:
        """What the run does when that alarm is raised."""
        actions = {
            "entropy": self.entropy,
            "length": self.length,
            "accuracy": self.accuracy,
            "divergence": self.divergence,
            "teacher": self.teacher,
            "hacking": self.hacking,
        }
        return actions[alarm]

    def check(self, save_freq: int) -> None:
        """Refuse what cannot work.

        Args:
            save_freq: ``trainer.save_freq``; without checkpoints there is nothing to go back to.

        Raises:
            ConfigError: one sentence.
        """
        for alarm in ALARMS:
            one_of(f"opd.alarms.{alarm}", self.action(alarm), ACTIONS)
            if self.action(alarm) == "rollback" and save_freq <= 0:
                raise ConfigError(f"opd.alarms.{alarm}=rollback needs checkpoints: set trainer.save_freq above 0.")
        for name in ("persist", "spread"):
            positive(f"opd.alarms.{name}", getattr(self, name))
        if self.window < FEWEST:
            raise ConfigError(f"opd.alarms.window={self.window} must be at least {FEWEST}, to know a spread.")
        for name in ("entropy_factor", "length_factor", "divergence_factor"):
            if not getattr(self, name) > 1:
                raise ConfigError(f"opd.alarms.{name}={getattr(self, name)} must be above 1.")
        positive("opd.alarms.accuracy_drop", self.accuracy_drop, at_most=1)
        positive("opd.alarms.max_rollbacks", self.max_rollbacks, zero=True)
        positive("opd.alarms.rollback_lr", self.rollback_lr, at_most=1)
