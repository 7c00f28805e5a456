# SPDX-License-Identifier: Apache-2.0
"""``opd.divergence``: its keys, their check and their words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opd_ext.divergence.divergences import divergence_names, get_divergence
from opd_ext.divergence.sampled import Surrogate
from opd_ext.errors import ABSENT, ConfigError, check_options, one_of, parameters, positive
from opd_ext.spans import SPAN_LABELS

SUPPORTS = ("full", "topk", "sampled")


@dataclass
class DivergenceTerm:
    """What is compared, and on which part of the vocabulary; every other key is an option of that divergence."""

    kind: str = "reverse_kl"  # a registered divergence: reverse_kl, forward_kl, jsd, ...
    support: str = "full"  # full | topk | sampled
    k: int | None = None  # topk only: how many tokens
    topk_by: str = "teacher"  # topk only: whose likeliest tokens (teacher.backend=server knows the teacher's)
    tail: str = "bucket"  # topk only: what becomes of the other tokens (bucket | renorm | none)
    beta: float | None = None  # jsd only, in (0, 1)
    clip: float | None = None  # nats; what it bounds says clip_mode
    clip_mode: str = "vocab_max"  # vocab_max: each vocabulary entry | token_scale: the token, direction kept | none
    temperature: float = 1.0  # divides both logits in the loss, whatever the rollout temperature was
    args: dict[str, Any] = field(default_factory=dict)
    """Options of a registered divergence that are no keys here; write them beside `kind`."""

    @property
    def registered(self) -> str:
        """Its name in the registry of divergences."""
        return f"topk_{self.kind}" if self.support == "topk" else self.kind

    def branch(self, label: int | None) -> Branch:
        """This divergence for the tokens with span label ``label``, or for all (None)."""
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

    def check_term(self, key: str) -> None:
        """Refuse a term that cannot work; ``key`` is where it stands. Raises ConfigError."""
        one_of(f"{key}.support", self.support, SUPPORTS)
        one_of(f"{key}.kind", self.kind, [name for name in divergence_names() if not name.startswith("topk_")])
        if self.support == "sampled":
            if self.kind != "reverse_kl":
                raise ConfigError(f"{key}.kind={self.kind} has no form on the sampled token: set reverse_kl.")
            if self.clip is not None or self.temperature != 1.0:
                raise ConfigError(
                    f"{key}.clip and .temperature are for divergences of distributions, not support=sampled."
                )
            return
        if self.registered not in divergence_names():
            raise ConfigError(f"{key}.support=topk is not defined for kind={self.kind}: set support=full.")
        if (self.support == "topk") != (self.k is not None):
            raise ConfigError(f"{key}.k belongs to support=topk and to no other: set both or neither.")
        one_of(f"{key}.topk_by", self.topk_by, ("student", "teacher"))
        one_of(f"{key}.tail", self.tail, ("bucket", "renorm", "none"))
        one_of(f"{key}.clip_mode", self.clip_mode, ("vocab_max", "token_scale", "none"))
        for name in ("temperature", "k", "clip"):
            if getattr(self, name) is not None:
                positive(f"{key}.{name}", getattr(self, name))
        if self.support == "topk" and self.tail == "renorm" and self.k == 1:
            raise ConfigError(
                f"{key}.k=1 with tail=renorm compares one token of probability 1 with another (gradient 0): set "
                "tail=bucket, or more tokens."
            )
        self._check_beta(key)
        allowed = parameters(get_divergence(self.registered), skip=2)
        check_options(key, f"kind={self.kind}", self.branch(None).kind_args, allowed)

    def _check_beta(self, key: str) -> None:
        if (self.kind == "jsd") != (self.beta is not None) and self.kind in ("jsd", "forward_kl", "reverse_kl"):
            raise ConfigError(f"{key}.beta belongs to kind=jsd and to no other: set both or neither.")
        if self.beta is not None and not 0 < self.beta < 1:
            raise ConfigError(
                f"{key}.beta={self.beta} must lie strictly between 0 and 1; for an end choose kind=forward_kl or "
                "kind=reverse_kl."
            )

    def __str__(self) -> str:
        kind = self.kind + (f"({self.beta})" if self.beta else "")
        support = f"top-{self.k} of the {self.topk_by}" if self.support == "topk" else self.support
        parts = [f"{kind}, {support}"]
        if self.clip is not None:
            parts.append(f"clip {self.clip}")
        if self.temperature != 1.0:
            parts.append(f"T {self.temperature}")
        return ", ".join(parts)


@dataclass
class DivergenceConfig(DivergenceTerm):
    """One divergence for all tokens, or one per class of annotated spans (`key`, `error`; null: none)."""

    key: DivergenceTerm | None = None  # of the decisive spans of right answers
    error: DivergenceTerm | None = None  # of the spans that led astray
    gradient: str = "auto"  # direct: of the divergence | policy: advantage of the sampled token | auto: by support
    ratio_clip: float = 0.2  # sampled only: PPO's clip of current to old policy
    dual_clip: float = 3.0  # sampled only: PPO's second clip, for negative advantages
    extrapolation: float = 1.0  # sampled only; ExOPD: beyond 1, past the teacher as seen from the initial model
    constant_advantage: float | None = None  # sampled only; a control: every token's, in place of the teacher's

    @property
    def present(self) -> bool:
        return self.kind != ABSENT

    @property
    def sampled(self) -> bool:
        """Whether it looks at the sampled token alone, and so at log-probs before the update."""
        return self.present and not self.terms and self.support == "sampled"

    @property
    def extrapolates(self) -> bool:
        return self.sampled and self.extrapolation != 1.0

    @property
    def terms(self) -> dict[str, DivergenceTerm]:
        """The divergences of span classes, by class; empty where one divergence is for all tokens."""
        found = {name: getattr(self, name) for name in SPAN_LABELS}
        return {name: term for name, term in found.items() if term is not None}

    @property
    def compared(self) -> tuple[DivergenceTerm, ...]:
        """What the loss is made of: the divergences of span classes, or the one for all tokens."""
        return tuple(self.terms.values()) or (self,)

    @property
    def active_spans(self) -> set[int]:
        """Labels of the annotated spans that have a divergence."""
        if not self.present:
            return set()
        return {SPAN_LABELS[name] for name in self.terms or SPAN_LABELS}

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Of the objective: none, one for all tokens, or one per span class."""
        if not self.present or self.sampled:
            return ()
        return tuple(term.branch(SPAN_LABELS[name]) for name, term in self.terms.items()) or (self.branch(None),)

    @property
    def surrogate(self) -> Surrogate | None:
        """Of the objective: what takes the place of branches on the sampled token."""
        if not self.sampled:
            return None
        return Surrogate(self.ratio_clip, self.dual_clip, self.extrapolation, self.constant_advantage)

    def check(self) -> None:
        """Refuse what cannot work, whatever the other places say.

        Raises:
            ConfigError: one sentence.
        """
        one_of("opd.divergence.gradient", self.gradient, ("auto", "direct", "policy"))
        for name, term in ({f".{name}": term for name, term in self.terms.items()} or {"": self}).items():
            term.check_term(f"opd.divergence{name}")
        if any(term.support == "sampled" for term in self.terms.values()):
            raise ConfigError("opd.divergence.key and .error compare distributions: set their support to full or topk.")
        sampled = self.support == "sampled"
        if self.constant_advantage is not None:
            self._check_constant()
        if self.gradient == "policy" and not sampled:
            raise ConfigError(
                f"opd.divergence.gradient=policy with support={self.support} has zero expected gradient, because "
                "that divergence does not depend on the sampled token; set gradient=direct, or support=sampled."
            )
        if self.gradient == "direct" and sampled:
            raise ConfigError(
                "opd.divergence.gradient=direct with support=sampled loses the teacher, whose log-prob is a constant; "
                "set gradient=policy, or support=full."
            )

    def _check_constant(self) -> None:
        if not self.sampled:
            raise ConfigError(
                f"opd.divergence.constant_advantage with support={self.support} replaces nothing: a divergence of "
                "distributions has no advantages; it is for support=sampled."
            )
        if self.constant_advantage == 0 or self.extrapolates:
            raise ConfigError("opd.divergence.constant_advantage must not be 0, and needs extrapolation=1.")

    def __str__(self) -> str:
        if self.terms:
            return "; ".join(f"{term} on {name} spans" for name, term in self.terms.items())
        extrapolated = f", extrapolated by {self.extrapolation:g}" if self.extrapolation != 1.0 else ""
        constant = f", every advantage {self.constant_advantage:g}" if self.constant_advantage is not None else ""
        return super().__str__() + extrapolated + constant


@dataclasses.dataclass(frozen=True)
class Branch:
    """A registered divergence with its options, and the tokens it is for.

    Those with span label ``label``, or all if that is None.
    """

    kind: str = "reverse_kl"
    kind_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: int | None = None
