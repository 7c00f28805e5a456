# SPDX-License-Identifier: Apache-2.0
"""How far into a response training looks: a horizon that may grow (``opd.horizon``), for any method.

The teacher's signal is densest early in a response, and a prefix trains almost what the whole does (Truncated and
Progressive On-Policy Distillation, arXiv 2605.31490). What lies beyond the horizon trains nothing; if rollouts stop
there, it is not sampled either, which is where the time goes.
"""

import math
from dataclasses import dataclass

from opd_ext.errors import ConfigError, positive


@dataclass
class HorizonConfig:
    """Tokens of a response, from its first on, that train: a share of ``opd.rollout.train_tokens``.

    Of the limit and not of the response, whose length nobody knows while it is being sampled.
    """

    start: float = 1.0  # share of opd.rollout.train_tokens that trains at the first step
    end: float = 1.0  # share that trains from step `steps` + 1 on
    steps: int = 0  # in which it goes from start to end, linearly
    stop: bool = False  # rollouts of training stop there; else they end as they would, and what is beyond is masked

    @property
    def limited(self) -> bool:
        """Whether there is a step at which less than a whole response trains."""
        return self.end < 1 or (self.steps > 0 and self.start < 1)

    def tokens(self, step: int, limit: int) -> int:
        """Tokens that train at a step, which counts from 1, of a limit of ``limit`` tokens; at least 1.

        >>> [HorizonConfig(start=0.25, end=1.0, steps=3).tokens(step, 128) for step in (1, 2, 3, 4, 9)]
        [32, 64, 96, 128, 128]
        """
        done = 1.0 if self.steps == 0 else min(1.0, (step - 1) / self.steps)
        return max(1, math.ceil((self.start + done * (self.end - self.start)) * limit - 1e-9))

    def check(self) -> None:
        """
        Raises:
            ConfigError: one sentence.
        """
        for name in ("start", "end"):
            positive(f"opd.horizon.{name}", getattr(self, name), at_most=1)
        positive("opd.horizon.steps", self.steps, zero=True)
        if self.steps == 0 and self.start != 1 and self.start != self.end:
            raise ConfigError(
                f"opd.horizon.start={self.start:g} is never used with opd.horizon.steps=0: set the steps in which it "
                f"goes to end={self.end:g}."
            )
        if self.stop and not self.limited:
            raise ConfigError("opd.horizon.stop=true stops nothing: set opd.horizon.end below 1, or start and steps.")

    def __str__(self) -> str:
        if not self.limited:
            return "whole responses"
        share = f"{self.end:g} of the limit"
        if self.steps:
            share = f"{self.start:g} to {share} in {self.steps} steps"
        return f"the first tokens, {share}, {'where rollouts stop' if self.stop else 'the rest is masked'}"
