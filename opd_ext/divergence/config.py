# SPDX-License-Identifier: Apache-2.0
"""``opd.divergence``: its keys, their check and their words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class DivergenceTerm:
    """What is compared, and on which part of the vocabulary."""

    kind: str = "reverse_kl"
    support: str = "full"  # full | topk | sampled
    k: int | None = None  # topk only: how many tokens
    topk_by: str = "teacher"  # topk only: whose likeliest tokens
    tail: str = "bucket"  # topk only: what becomes of the other tokens (bucket | renorm | none)
    beta: float | None = None  # jsd only, in (0, 1)
    clip: float | None = None  # nats; what it bounds says clip_mode
    clip_mode: str = "vocab_max"  # vocab_max: each vocabulary entry | token_scale: the token, direction kept | none
    temperature: float = 1.0  # divides both logits in the loss, whatever the rollout temperature was
    args: dict[str, Any] = field(default_factory=dict)  # every other key: options of a registered divergence

    @property
    def registered(self) -> str:
        """Its name in the registry of divergences."""
        return f"topk_{self.kind}" if self.support == "topk" else self.kind

    def branch(self, label: int | None) -> Branch:
        """The same for the objective."""
        clipped = self.clip is not None and self.clip_mode != "none"
        options = {
            "temperature": self.temperature,
            "beta": self.beta,
            "entry_clip": self.clip if clipped else None,
            "entry_clip_mode": self.clip_mode if clipped else None,
            **({"k": self.k, "support": self.topk_by, "tail": self.tail} if self.support == "topk" else {}),
            **self.args,
        }
        return Branch(self.registered, {name: value for name, value in options.items() if value is not None}, label)


@dataclass
class DivergenceConfig(DivergenceTerm):
    """One divergence for all tokens, or one per class of annotated spans (`key`, `error`; null: none)."""

    key: DivergenceTerm | None = None
    error: DivergenceTerm | None = None
    gradient: str = "auto"  # direct: of the divergence | policy: advantage of the sampled token | auto: by support
    ratio_clip: float = 0.2  # sampled only: PPO's clip of current to old policy
    dual_clip: float = 3.0  # sampled only
    extrapolation: float = 1.0  # sampled only; ExOPD: beyond 1, past the teacher as seen from the initial model

    @property
    def by_class(self) -> bool:
        return self.key is not None or self.error is not None


@dataclasses.dataclass(frozen=True)
class Branch:
    """One divergence and the tokens it is for: those with span label ``label``, or all if that is None."""

    kind: str = "reverse_kl"
    kind_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: int | None = None
