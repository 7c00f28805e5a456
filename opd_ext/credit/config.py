# SPDX-License-Identifier: Apache-2.0
"""``opd.credit``: its keys, their check and their words."""

from dataclasses import dataclass, field
from typing import Any

from opd_ext.credit.annotate import annotator_names, get_annotator
from opd_ext.credit.annotate.config import AnnotatorConfig
from opd_ext.credit.credits import credit_names, get_credit
from opd_ext.credit.placement import OWN, PREFIX, RANDOM, placement_names
from opd_ext.credit.schedule import trace_schedule
from opd_ext.errors import ABSENT, ConfigError, check_options, one_of, parameters, positive


@dataclass
class CreditConfig:
    """Which tokens count, and how much; every other key is an option of that credit."""

    kind: str = "uniform"  # a registered credit: uniform, position, spans, entropy, ...
    weight: float = 1.0  # of the whole distillation term
    hold: int | None = None  # steps at full weight before it falls; null: for ever
    decay: int = 30  # steps in which it then falls to 0
    importance_cap: float | None = None  # cap of current to old policy (SDPO: 2)
    rollout_cap: float | None = None  # cap of old policy to rollout engine (IW-OPD: 5)
    placement: str = OWN
    """A control of where credit lies: own | flat (its mean) | random (other tokens) | prefix (the first ones)."""
    prefix: float = 0.1  # placement=prefix: the share of a response's tokens, from its first on, that count
    inactive_span: str = "nonspan"  # spans of a class without divergence: nonspan (plain policy term) | literal (gated)
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)  # who marks spans, if anybody
    args: dict[str, Any] = field(default_factory=dict)  # options of the credit; write them beside `kind`

    @property
    def annotates(self) -> bool:
        return self.annotator.kind != ABSENT

    @property
    def reads_old_log_probs(self) -> bool:
        return self.importance_cap is not None or self.rollout_cap is not None

    def schedule(self, step: int) -> tuple[float, float]:
        """Weight of the distillation term and gate of the policy term on spans, at a step that counts from 1."""
        if self.hold is None:
            return self.weight, 0.0
        return trace_schedule(step - 1, self.weight, self.hold, self.decay)

    def check(self) -> None:
        """Refuse what cannot work, whatever the other places say.

        Raises:
            ConfigError: one sentence.
        """
        one_of("opd.credit.kind", self.kind, credit_names())
        self._check_placement()
        one_of("opd.credit.inactive_span", self.inactive_span, ("nonspan", "literal"))
        check_options("opd.credit", f"kind={self.kind}", self.args, parameters(get_credit(self.kind), skip=1))
        positive("opd.credit.weight", self.weight, zero=True)
        for name in ("importance_cap", "rollout_cap", "decay"):
            if getattr(self, name) is not None:
                positive(f"opd.credit.{name}", getattr(self, name))
        if self.hold is not None:
            positive("opd.credit.hold", self.hold, zero=True)
        if self.kind == "spans" and not self.annotates:
            raise ConfigError("opd.credit.kind=spans needs spans: set opd.credit.annotator.kind.")
        one_of("opd.credit.annotator.kind", self.annotator.kind, annotator_names())
        one_of("opd.credit.annotator.failed", self.annotator.failed, ("stop", "plain"))
        annotator = get_annotator(self.annotator.kind)
        check_options("opd.credit.annotator", f"kind={self.annotator.kind}", self.annotator.args, annotator.options)
        try:
            annotator.check(self.annotator)
        except ValueError as error:
            raise ConfigError(f"opd.credit.{error}.") from None

    def _check_placement(self) -> None:
        one_of("opd.credit.placement", self.placement, placement_names())
        positive("opd.credit.prefix", self.prefix, at_most=1)
        if self.kind == "uniform" and self.placement not in (OWN, PREFIX):
            raise ConfigError(
                f"opd.credit.placement={self.placement} changes nothing with kind=uniform: all tokens count alike."
            )
        if self.kind == "spans" and self.placement not in (OWN, RANDOM):
            raise ConfigError(
                f"opd.credit.placement={self.placement} does not go with kind=spans, which has places and no weights: "
                "set placement=random."
            )

    @property
    def token_placement(self) -> str:
        """What the objective does with credits; spans are moved as spans, before it sees them."""
        return OWN if self.kind == "spans" else self.placement

    @property
    def moves_spans(self) -> bool:
        return self.kind == "spans" and self.placement == RANDOM

    def __str__(self) -> str:
        options = ", ".join(f"{name} {value}" for name, value in self.args.items())
        parts = [self.kind + (f"({options})" if options else "")]
        if self.placement != OWN:
            parts.append(f"placed {self.placement}" + (f" {self.prefix:g}" if self.placement == PREFIX else ""))
        if self.annotates:
            parts.append(f"annotator {self.annotator.kind}")
        caps = {"importance": self.importance_cap, "rollout": self.rollout_cap}
        parts += [f"{name} cap {cap:g}" for name, cap in caps.items() if cap is not None]
        if self.hold is not None:
            parts.append(f"{self.weight:g} for {self.hold} steps, 0 after {self.hold + self.decay}")
        return ", ".join(parts)
