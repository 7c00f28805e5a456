# SPDX-License-Identifier: Apache-2.0
"""The `opd` section of the configuration: its types and its defaults. What is refused: :mod:`opd_ext.config.checks`.

A wrong key, value or type becomes one sentence (:class:`ConfigError`) before Ray starts.
"""

import dataclasses
import importlib
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_ext.config.refusals import refusal
from opd_ext.context.config import ContextConfig
from opd_ext.credit.annotate.config import AnnotatorConfig
from opd_ext.credit.config import CreditConfig
from opd_ext.divergence.config import DivergenceConfig, DivergenceTerm
from opd_ext.errors import ABSENT, ConfigError, one_of
from opd_ext.objective.objective import DENOMINATORS, Objective
from opd_ext.objective.reduction import REDUCTIONS
from opd_ext.policy.config import PolicyConfig
from opd_ext.spans import SPAN_LABELS
from opd_ext.teacher.config import TeacherConfig


@dataclass
class HeadConfig:
    """The chunked LM head (memory and precision, never the result)."""

    chunk_size: int = 1024
    fp32: bool = False


@dataclass
class RolloutConfig:
    """Limits of generation per phase (tokens) and the polling of finished rollouts (seconds)."""

    train_tokens: int = 8192
    val_tokens: int = 8192
    poll_interval: float = 0.05


@dataclass
class OPDConfig:
    """Everything under `opd`: the five places of a method and the settings of a run.

    A place that a method leaves empty is there all the same, and does nothing: nobody asks whether it is None.
    """

    run_dir: str = "runs/opd"
    method: str = "crisp"
    scale: str = "cpu_tiny"
    device: str = "cuda"
    world: str | None = None  # folder of the data sets of a world (config/world), the miniature world's models included
    seed: int = 1
    world_lib: str | None = None
    external_lib: Any = None
    console: str = "table"
    warm_python: bool = False
    reduction: str = "token-mean"
    denominator: str = "trained"
    max_pair_length: int | None = None
    max_teacher_entropy: float | None = 0.95
    stop_on_success: float | None = None
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(weights=ABSENT))
    context: ContextConfig = field(default_factory=lambda: ContextConfig(kind=ABSENT))
    divergence: DivergenceConfig = field(default_factory=lambda: DivergenceConfig(kind=ABSENT))
    credit: CreditConfig = field(default_factory=CreditConfig)
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(loss=ABSENT))
    head: HeadConfig = field(default_factory=HeadConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    @property
    def external_libs(self) -> list[str]:
        """Modules that register themselves: the world's, then the user's."""
        own = [self.external_lib] if isinstance(self.external_lib, str) else list(self.external_lib or ())
        return [self.world_lib, *own] if self.world_lib else own

    def import_external_libs(self) -> None:
        """Import the user's modules: their decorated functions and classes register themselves.

        Raises:
            ConfigError: naming the module that cannot be imported.
        """
        for library in self.external_libs:
            try:
                importlib.import_module(library)
            except ImportError as error:
                raise ConfigError(f"opd.external_lib: {library} cannot be imported ({error}).") from None

    @property
    def distils(self) -> bool:
        """Whether there is a teacher at all; GRPO and CISPO have none."""
        return self.divergence.present

    @property
    def needs_teacher_engine(self) -> bool:
        """Whether the teacher has weights of its own, and has them here: a served one is elsewhere."""
        return self.teacher.kind.own_weights and self.teacher.backend == "engine"

    def schedule(self, step: int) -> tuple[float, float]:
        """Weight of the distillation term and gate of the policy term on spans, at a step that counts from 1."""
        return self.credit.schedule(step) if self.distils else (0.0, 1.0)

    def objective(self, temperature: float, token_classes: dict[str, list[int]]) -> Objective:
        """The loss that this section describes.

        Args:
            temperature: of the rollouts.
            token_classes: see :class:`opd_ext.objective.objective.Objective`.
        """
        return Objective(
            branches=self.divergence.branches,
            surrogate=self.divergence.surrogate,
            credit=self.credit.kind,
            credit_args=dict(self.credit.args),
            importance_cap=self.credit.importance_cap,
            rollout_cap=self.credit.rollout_cap,
            shapings=self.policy.shapings,
            active_spans=frozenset(self.divergence.active_spans),
            literal_spans=self.credit.inactive_span == "literal",
            reduction=one_of("opd.reduction", self.reduction, REDUCTIONS),
            denominator=one_of("opd.denominator", self.denominator, DENOMINATORS),
            temperature=temperature,
            chunk_size=self.head.chunk_size,
            fp32=self.head.fp32,
            token_classes=token_classes,
        )


_PLACES = {
    "teacher": (TeacherConfig, "weights"),
    "context": (ContextConfig, "kind"),
    "divergence": (DivergenceConfig, "kind"),
    "credit": (CreditConfig, "kind"),
    "policy": (PolicyConfig, "loss"),
}
"""The five places: their types, and the key that says ``none`` where a method leaves one empty."""


def load(section: DictConfig) -> OPDConfig:
    """Typed view of the `opd` section.

    Raises:
        ConfigError: for a key that does not exist or a value of the wrong type.
    """
    content: Any = OmegaConf.to_container(section)
    for name, (kind, choice) in _PLACES.items():
        empty = {} if kind is CreditConfig else {choice: ABSENT}  # there is always a credit
        content[name] = {choice: getattr(kind(), choice), **(content.get(name) or empty)}
        _collect_options(content[name], kind)
    for name in SPAN_LABELS:
        _collect_options(content["divergence"].get(name), DivergenceTerm)
    if content["credit"].get("annotator") is None:
        content["credit"].pop("annotator", None)
    _collect_options(content["credit"].get("annotator"), AnnotatorConfig)
    try:
        opd: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OPDConfig), content))
    except OmegaConfBaseException as error:
        error.full_key = f"opd.{error.full_key}"
        raise refusal(error, (), "opd train") from None
    return opd


def _collect_options(section: dict[str, Any] | None, kind: type) -> None:
    """Move the keys that ``kind`` does not define into its ``args``, in place: options of what is registered."""
    if not isinstance(section, dict):
        return
    known = {entry.name for entry in dataclasses.fields(kind)}
    for key in [key for key in section if key not in known]:
        section.setdefault("args", {})[key] = section.pop(key)
