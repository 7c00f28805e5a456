# SPDX-License-Identifier: Apache-2.0
"""The settings of T3S."""

from dataclasses import dataclass, field

from opd_ext.errors import ConfigError, one_of
from opd_ext.pipelines.settings import TracedConfig, TrainConfig, check_decoding, check_training

T3S_ARMS = ("t3s", "inverse", "random", "lowest")


@dataclass
class BottleneckConfig:
    """Where the pilot's training accuracy is lowest."""

    n: int = 4  # samples per training prompt and checkpoint
    temperature: float = 0.6  # of these samples
    top_k: int = -1  # -1: all
    top_p: float = 0.95  # 1: all
    standard_errors: float = 2.0  # the dip must exceed so many
    step: int | None = None  # name it instead of looking for it


@dataclass
class DiffusionConfig:
    """T3S for a masked-diffusion model: the selection comes from the autoregressive ``model``."""

    model: str | None = None  # folder or hub id
    tau: float = 0.2  # nats that a token must have lost to be restored always
    ratio: list[float] = field(default_factory=lambda: [0.3, 0.8])  # of masked response tokens, drawn per sample
    mask_token_id: int | None = None  # null: what the model's config says; so for the next two
    attention: str | None = None  # full (LLaDA) | block (LLaDA-2.0)
    block_size: int | None = None  # tokens of a block, where attention=block
    threshold: float = 0.95  # confidence from which a token is written
    batch_size: int = 32  # prompts that are denoised at a time; each step holds a [batch, length, length] mask
    max_tokens: int | None = None  # of an answer; null: evaluate.max_tokens
    train: TrainConfig = field(default_factory=TrainConfig)  # the fine-tuning of the masked-diffusion model

    def check(self) -> None:
        """Raises ConfigError, one sentence."""
        if self.attention is not None:
            one_of("diffusion.attention", self.attention, ("full", "block"))
        if not self.model:
            raise ConfigError("diffusion.model is missing: set it to a folder with a model, or its hub id.")
        if len(self.ratio) != 2 or not 0 <= self.ratio[0] <= self.ratio[1] <= 1:
            raise ConfigError(f"diffusion.ratio={self.ratio} must be [low, high] with 0 <= low <= high <= 1.")
        check_training("diffusion.train", self.train)


@dataclass
class T3SConfig(TracedConfig):
    """Training-trajectory-aware token selection."""

    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)  # how the pilot's dip is looked for
    threshold: float = 0.0  # nats; an anchor's confidence rose by more
    always_keep_eos: bool = False  # train the end of the response even where it is an anchor
    arms: list[str] = field(default_factory=lambda: ["t3s", "inverse", "random", "lowest"])
    """Selections that are trained, besides plain fine-tuning, which is the pilot."""
    rrt: bool = True  # evaluate base + (final - bottleneck) too, which needs no second training
    diffusion: DiffusionConfig | None = None  # null: the autoregressive model alone

    def check(self) -> None:
        super().check()
        for arm in self.arms:
            one_of("arms", arm, T3S_ARMS)
        if self.train.save_every >= self.train.steps:
            raise ConfigError(
                f"train.save_every={self.train.save_every} must be below train.steps={self.train.steps}: the pilot's "
                "checkpoints are what the bottleneck is looked for in."
            )
        check_decoding("bottleneck", self.bottleneck)
        if self.diffusion is not None:
            self.diffusion.check()

    @property
    def models(self) -> dict[str, str | None]:
        diffusion = {"diffusion.model": self.diffusion.model} if self.diffusion is not None else {}
        return super().models | diffusion
