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

from opd_ext.objective.loss import Branch, Objective, Surrogate
from opd_ext.objective.schedule import trace_schedule
from opd_ext.teacher.annotate.config import AnnotatorConfig

SPAN_LABELS = {"key": 1, "error": 2}


class ConfigError(ValueError):
    """One sentence: which key is wrong and what it may be."""


@dataclass
class TeacherConfig:
    """Whose weights the teacher has, and when they are refreshed."""

    weights: str = "periodic"
    interval: int = 50  # optimiser steps between refreshes of `periodic`; 0: never
    rate: float = 0.05  # `ema`: share of the student mixed in per step; `trust_region`: share of the live student
    path: str | None = None  # `external`: folder or hub id of the teacher
    backend: str = "engine"  # engine: colocated with the student; server: verl's teacher servers on their own devices


@dataclass
class ContextConfig:
    """What the teacher sees that the student does not; every other key is an option of that context."""

    kind: str = "same"
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = self.args.get("text")
        return f"{self.kind}:{shown}" if shown else self.kind


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


@dataclass
class CreditConfig:
    """Which tokens count, and how much; every other key is an option of that credit."""

    kind: str = "uniform"
    weight: float = 1.0  # of the whole distillation term
    hold: int | None = None  # steps at full weight before it falls; null: for ever
    decay: int = 30  # steps in which it then falls to 0
    importance_cap: float | None = None  # cap of current to old policy (SDPO: 2)
    rollout_cap: float | None = None  # cap of old policy to rollout engine (IW-OPD: 5)
    inactive_span: str = "nonspan"  # spans of a class without divergence: nonspan (plain policy term) | literal (gated)
    annotator: AnnotatorConfig | None = None
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class PolicyConfig:
    """The RL term that goes along: a loss of verl's registry on verl's advantages."""

    loss: str = "vanilla"
    weight: float = 1.0
    gate: str = "none"  # complement: on annotated spans it grows as the divergence fades | untaught: no teacher there
    prompt_mean: bool = False  # every prompt's group counts the same, not every token
    shaping: float | None = (
        None  # RLSD: the teacher multiplies advantages within 1 +- this, and adds no term of its own
    )
    anchor: str = "old"  # old: ratio to the policy before the update | sampler: to the rollout engine


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
    """Everything under `opd`: the five places of a method and the settings of a run."""

    run_dir: str = "runs/opd"
    method: str = "crisp"
    scale: str = "cpu_tiny"
    device: str = "cuda"
    world: str | None = None  # folder of the miniature world, where a scale uses it
    seed: int = 1
    external_lib: Any = None
    console: str = "table"
    warm_python: bool = False
    reduction: str = "token-mean"
    denominator: str = "trained"
    max_pair_length: int | None = None
    max_teacher_entropy: float | None = 0.95
    stop_on_success: float | None = None
    teacher: TeacherConfig | None = None
    context: ContextConfig | None = None
    divergence: DivergenceConfig | None = None
    credit: CreditConfig = field(default_factory=CreditConfig)
    policy: PolicyConfig | None = None
    head: HeadConfig = field(default_factory=HeadConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    @property
    def external_libs(self) -> list[str]:
        """Module names of `external_lib` as a list."""
        if self.external_lib is None:
            return []
        return [self.external_lib] if isinstance(self.external_lib, str) else list(self.external_lib)

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
        return self.divergence is not None

    @property
    def needs_teacher_engine(self) -> bool:
        """A live teacher and a base are in the student and a served one is elsewhere; every other has weights here."""
        return self.distils and self.teacher.weights not in ("live", "base") and self.teacher.backend == "engine"

    @property
    def annotates(self) -> bool:
        return self.credit.annotator is not None and self.credit.annotator.kind != "none"

    @property
    def active_spans(self) -> set[int]:
        """Labels of the annotated spans that have a divergence."""
        if not self.distils:
            return set()
        of_class = {label for name, label in SPAN_LABELS.items() if getattr(self.divergence, name) is not None}
        return of_class if self.divergence.by_class else set(SPAN_LABELS.values())

    def schedule(self, step: int) -> tuple[float, float]:
        """Weight of the distillation term and gate of the policy term on spans, at a step that counts from 1."""
        if not self.distils:
            return 0.0, 1.0
        if self.credit.hold is None:
            return self.credit.weight, 0.0
        return trace_schedule(step - 1, self.credit.weight, self.credit.hold, self.credit.decay)

    def objective(self, temperature: float, token_classes: dict[str, list[int]]) -> Objective:
        """The loss that this section describes.

        Args:
            temperature: of the rollouts.
            token_classes: see :class:`opd_ext.objective.loss.Objective`.
        """
        branches, surrogate = (), None
        if self.distils and self.divergence.support == "sampled":
            divergence = self.divergence
            surrogate = Surrogate(divergence.ratio_clip, divergence.dual_clip, divergence.extrapolation)
        elif self.distils and self.divergence.by_class:
            terms = {name: getattr(self.divergence, name) for name in SPAN_LABELS}
            branches = tuple(term.branch(SPAN_LABELS[name]) for name, term in terms.items() if term is not None)
        elif self.distils:
            branches = (self.divergence.branch(None),)
        return Objective(
            branches=branches,
            surrogate=surrogate,
            credit=self.credit.kind,
            credit_args=dict(self.credit.args),
            importance_cap=self.credit.importance_cap,
            rollout_cap=self.credit.rollout_cap,
            shaping=self.policy.shaping if self.policy else None,
            reduction=self.reduction,
            temperature=temperature,
            chunk_size=self.head.chunk_size,
            fp32=self.head.fp32,
            token_classes=token_classes,
        )


def load(section: DictConfig) -> OPDConfig:
    """Typed view of the `opd` section.

    Raises:
        ConfigError: for a key that does not exist or a value of the wrong type.
    """
    content = OmegaConf.to_container(section)
    for name, kind in (("context", ContextConfig), ("divergence", DivergenceConfig), ("credit", CreditConfig)):
        _collect_options(content.get(name), kind)
    for name in SPAN_LABELS:
        _collect_options((content.get("divergence") or {}).get(name), DivergenceTerm)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OPDConfig), content))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"opd.{error.full_key}: {reason}; see `opd train --cfg` for the keys that exist.") from None


def _collect_options(section: dict[str, Any] | None, kind: type) -> None:
    """Move the keys that ``kind`` does not define into its ``args``, in place: options of what is registered."""
    if not isinstance(section, dict):
        return
    known = {entry.name for entry in dataclasses.fields(kind)}
    for key in [key for key in section if key not in known]:
        section.setdefault("args", {})[key] = section.pop(key)
