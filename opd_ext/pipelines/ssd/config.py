# SPDX-License-Identifier: Apache-2.0
"""The settings of SSD."""

from dataclasses import dataclass, field

from opd_ext.errors import ConfigError, positive
from opd_ext.pipelines.settings import PipelineConfig, check_decoding
from opd_ext.sampling.config import Decoding


@dataclass
class SSDConfig(PipelineConfig):
    """Simple self-distillation: one arm per way of sampling."""

    max_tokens: int = 1024  # of a sampled response
    drop_shortest: float = 0.0  # share of the responses, the shortest in characters, that is not trained on
    arms: dict[str, Decoding] = field(default_factory=dict)
    """Name -> how its samples are drawn; `control` must be there."""
    sweep: list[float] = field(default_factory=list)  # T_train of further arms without truncation
    diagnose: int = 128  # prompts whose base samples show what happened at locks and forks; 0: none

    def check(self) -> None:
        super().check()
        if "base" in self.arms:
            raise ConfigError("arms=base is the name of the model itself: choose another name.")
        if "control" not in self.arms:
            raise ConfigError(
                f"arms={list(self.arms)} must have one that is named control: temperature 1, no truncation."
            )
        control = self.arms["control"]
        if control.temperature != 1.0 or control.top_k > 0 or control.top_p != 1.0:
            raise ConfigError(
                f"arms.control={control} (temperature / top-k / top-p) must be temperature=1, top_k=-1, top_p=1: it is "
                "what the other arms are compared with."
            )
        for arm, decoding in self.arms.items():
            positive(f"arms.{arm}.temperature", decoding.temperature)
            check_decoding(f"arms.{arm}", decoding)
        for temperature in self.sweep:
            positive("sweep", temperature)
        self.check_limit("max_tokens", self.max_tokens)
        if not 0 <= self.drop_shortest < 1:
            raise ConfigError(f"drop_shortest={self.drop_shortest} must be in [0, 1).")
