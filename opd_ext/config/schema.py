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

from opd_ext.config.assumptions import PlanConfig
from opd_ext.config.overrides import keys_of
from opd_ext.config.refusals import refusal
from opd_ext.context.config import ContextConfig
from opd_ext.credit.annotate.config import AnnotatorConfig
from opd_ext.credit.config import CreditConfig
from opd_ext.divergence.config import DivergenceConfig, DivergenceTerm
from opd_ext.errors import ABSENT, ConfigError, one_of
from opd_ext.objective.objective import DENOMINATORS, Objective
from opd_ext.objective.reduction import REDUCTIONS
from opd_ext.policy.config import PolicyConfig
from opd_ext.protocol import ValidationConfig
from opd_ext.spans import SPAN_LABELS
from opd_ext.teacher.config import TeacherConfig


@dataclass
class HeadConfig:
    """The chunked LM head (memory and precision, never the result)."""

    chunk_size: int | None = None
    """Rows of the vocabulary projection held at a time, never the result; null: by device."""
    fp32: bool = False  # vocabulary projection in fp32 instead of the model's compute dtype

    def rows(self, device: str) -> int:
        """Rows per chunk on a ``device``, ``cuda`` or ``cpu``.

        Every chunk adds its part of the weight's gradient: a bf16 product is written and read, the fp32 sum read and
        written, 12 bytes per weight. For a vocabulary of 152k and 4096 hidden units that is 7.5 GB or 1.6 ms of an
        H200's 4.8 TB/s, whereas the four products of 1024 rows take about 6.4 ms at 800 TFLOP/s: a quarter on top. Of
        4096 rows it is 6 %, for 2 GB more of bf16 logits (student and teacher).
        """
        if self.chunk_size is not None:
            return self.chunk_size
        return 4096 if device == "cuda" else 1024


@dataclass
class RolloutConfig:
    """Limits of generation per phase (tokens) and the polling of finished rollouts (seconds)."""

    train_tokens: int = 8192  # new tokens at most, per training rollout
    val_tokens: int = 8192  # new tokens at most, per validation rollout
    failed: str = "stop"  # a rollout that raises (grader, tool, agent loop): stop: ends the run; zero: scores 0
    poll_interval: float = 0.05  # seconds between looks into the replay buffer (verl: 2.0)


@dataclass
class OPDConfig:
    """Everything under `opd`: the five places of a method and the settings of a run.

    A place that a method leaves empty is there all the same, and does nothing: nobody asks whether it is None.
    """

    run_dir: str = "runs/opd"  # config, metrics, generations, checkpoints, report
    method: str = "crisp"  # name of the preset in config/method that is composed; runs are compared by it
    scale: str = "cpu_tiny"  # name of the preset in config/scale that is composed
    device: str = "cuda"  # what trains: cpu | cuda (set by the scale)
    world: str | None = None  # folder of the data sets of a world (config/world), the miniature world's models included
    seed: int = 1  # decides data order and, with step, prompt and session, the seed of every rollout request
    world_lib: str | None = None  # what the world of a scale registers, imported like external_lib
    external_lib: Any = None  # Python module(s) to import in every process: your own @register_... classes
    console: str = "table"  # table: one readable row per step; full: also everything verl, Ray and vLLM print
    warm_python: bool = False  # fork Ray's and vLLM's processes from one that has imported the stack (CPU, one machine)
    reduction: str = "token-mean"  # token-mean | seq-mean-token-mean | seq-mean-token-sum | official (parity only)
    denominator: str = "trained"
    """Whose tokens or sequences a mean counts: trained (all) | distilled (those with a teacher)."""
    max_pair_length: int | None = None
    """Tokens of prompt + response; a pair that is longer, student's or teacher's, is dropped."""
    max_teacher_entropy: float | None = 0.95
    """A teacher with more than this share of log V has lost its weights: stop; null: off."""
    selftest: bool = True  # before the first update: head, packing, teacher, sampler and ends compared, once per run
    stop_on_success: float | None = None
    """A score: the run ends at the first rollout that reaches it (test-time self-distillation)."""
    stop_on_collapse: float | None = 0.5
    """A share: a validation with less of the best accuracy, beyond chance, ends the run; null: off."""
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(weights=ABSENT))
    """First place: whose weights teach; null: nobody's."""
    context: ContextConfig = field(default_factory=lambda: ContextConfig(kind=ABSENT))
    """Second place: what the teacher sees that the student does not; null: no teacher."""
    divergence: DivergenceConfig = field(default_factory=lambda: DivergenceConfig(kind=ABSENT))
    """Third place: what is compared, on what support; null: no distillation term."""
    credit: CreditConfig = field(default_factory=CreditConfig)  # fourth place: which tokens count, and how much
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(loss=ABSENT))
    """Fifth place: the RL term that goes along; null: none."""
    head: HeadConfig = field(default_factory=HeadConfig)  # the chunked LM head
    rollout: RolloutConfig = field(default_factory=RolloutConfig)  # limits of generation
    plan: PlanConfig = field(default_factory=PlanConfig)  # what `opd plan` reckons with; a run does not read it
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """e.g. {sets: {aime24: {n: 32, every: 50}}, monitor: {problems: 64, n: 1}}"""

    @property
    def external_libs(self) -> list[str]:
        """Modules that register themselves: the world's, then the user's."""
        own = list(self.external_lib or ()) if isinstance(self.external_lib, (list, tuple)) else [self.external_lib]
        own = [library for library in own if library is not None]
        return [self.world_lib, *own] if self.world_lib else own

    def import_external_libs(self) -> None:
        """Import the user's modules: their decorated functions and classes register themselves.

        Raises:
            ConfigError: naming the module that cannot be imported.
        """
        for library in self.external_libs:
            if not isinstance(library, str):
                raise ConfigError(
                    f"opd.external_lib={self.external_lib} must be the name of a module, or a list of them."
                )
            try:
                importlib.import_module(library)
            except Exception as error:  # code of the user's, with whatever is wrong in it
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                raise ConfigError(f"opd.external_lib: {library} cannot be imported ({reason}).") from None

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
            chunk_size=self.head.rows(self.device),
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
        keys: Any = OmegaConf.to_container(OmegaConf.structured(OPDConfig))
        raise refusal(error, (), "opd train", known=lambda: keys_of(keys, "opd.")) from None
    return opd


def _collect_options(section: dict[str, Any] | None, kind: type) -> None:
    """Move the keys that ``kind`` does not define into its ``args``, in place: options of what is registered."""
    if not isinstance(section, dict):
        return
    known = {entry.name for entry in dataclasses.fields(kind)}
    for key in [key for key in section if key not in known]:
        section.setdefault("args", {})[key] = section.pop(key)
