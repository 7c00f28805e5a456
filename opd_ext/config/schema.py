# SPDX-License-Identifier: Apache-2.0
"""The `opd` section of the configuration: its types and its defaults. What is refused: :mod:`opd_ext.config.checks`.

A wrong key, value or type becomes one sentence (:class:`ConfigError`) before Ray starts.
"""

import dataclasses
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_ext.alarms.config import AlarmsConfig
from opd_ext.config.assumptions import PlanConfig
from opd_ext.config.overrides import keys_of
from opd_ext.config.refusals import refusal
from opd_ext.config.teachers import NamedTeacher, View, completed, shared_name
from opd_ext.context.config import ContextConfig
from opd_ext.credit.annotate.config import AnnotatorConfig
from opd_ext.credit.config import CreditConfig
from opd_ext.credit.horizon import HorizonConfig
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
    """Limits of generation per phase (tokens), of waiting for it (seconds), and what a rollout that fails does."""

    train_tokens: int = 8192  # new tokens at most, per training rollout
    val_tokens: int = 8192  # new tokens at most, per validation rollout
    failed: str = "stop"  # a rollout that raises (grader, tool, agent loop): stop: ends the run; zero: scores 0
    poll_interval: float = 0.05  # seconds between looks into the replay buffer (verl: 2.0)
    grading_seconds: float = 600.0  # that the reward function may take for one rollout; then it has failed
    tool_seconds: float = 60.0  # that a tool may take for one call; then the model is told so
    silence_seconds: float = 3600.0  # without one rollout that arrives while some are awaited; then the run ends


@dataclass
class OPDConfig:
    """Everything under `opd`: the five places of a method and the settings of a run.

    A place that a method leaves empty is there all the same, and does nothing: nobody asks whether it is None.
    """

    run_dir: str = "runs/opd"  # config, metrics, generations, checkpoints, report
    method: str = "crisp"  # name of the preset in config/method that is composed; runs are compared by it
    control: str | None = None  # name of the preset in config/control that is composed; an arm of `opd compare`
    scale: str = "cpu_tiny"  # name of the preset in config/scale that is composed
    device: str = "cuda"  # what trains: cpu | cuda (set by the scale)
    world: str | None = None  # folder of the data sets of a world (config/world), the miniature world's models included
    seed: int = 1
    """Decides data order, a LoRA's first A, and with step, prompt and session every request's seed."""
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
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)  # signs of trouble, and what a run does about them
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(weights=ABSENT))
    """First place: whose weights teach; null: nobody's."""
    context: ContextConfig = field(default_factory=lambda: ContextConfig(kind=ABSENT))
    """Second place: what the teacher sees that the student does not; null: no teacher."""
    divergence: DivergenceConfig = field(default_factory=lambda: DivergenceConfig(kind=ABSENT))
    """Third place: what is compared, on what support; null: no distillation term."""
    credit: CreditConfig = field(default_factory=CreditConfig)  # fourth place: which tokens count, and how much
    horizon: HorizonConfig = field(default_factory=HorizonConfig)
    """How many tokens of a response train, from its first on; e.g. {start: 0.1, end: 0.3, steps: 100, stop: true}"""
    policy: PolicyConfig = field(default_factory=lambda: PolicyConfig(loss=ABSENT))
    """Fifth place: the RL term that goes along; null: none."""
    teachers: dict[str, NamedTeacher] = field(default_factory=dict)
    """Several teachers by name, in place of the one; each row has the one that its key names."""
    teacher_key: str | None = None  # with teachers, what of a row names its own: data_source, or a field of extra_info
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
        return bool(self.teachers) or self.divergence.present

    @property
    def told_in_turns(self) -> str:
        """Kind of a context that speaks in later turns of a rollout, too; empty if none does."""
        return next((view.opd.context.kind for view in self.views if view.opd.context.in_turns), "")

    @property
    def views(self) -> tuple[View, ...]:
        """The teachers, each with the settings that a run with it alone would have; one where nobody names several."""
        alone: list[tuple[str, OPDConfig, float]] = [("", self, 1.0)]
        if self.teachers:
            alone = [
                (
                    name,
                    dataclasses.replace(
                        self,
                        teacher=teacher,
                        context=teacher.context,
                        divergence=teacher.divergence,
                        teachers={},
                        teacher_key=None,
                    ),
                    teacher.weight,
                )
                for name, teacher in self.teachers.items()
            ]
        found: list[View] = []
        for name, opd, weight in alone:
            weights = server = None
            if opd.teacher.holds_weights:
                weights = shared_name(opd.teacher, [(other.opd.teacher, other.weights) for other in found], name)
            if opd.distils and opd.teacher.backend == "vllm":
                server = shared_name(opd.teacher, [(other.opd.teacher, other.server) for other in found], name)
            found.append(View(name, opd, weight, weights, server))
        return tuple(found)

    @property
    def teacher_servers(self) -> dict[str, View]:
        """The servers of ours (``backend=vllm``), by name, and the first teacher that has each."""
        found: dict[str, View] = {}
        for view in self.views:
            if view.server is not None:
                found.setdefault(view.server, view)
        return found

    @property
    def teacher_weights(self) -> dict[str, View]:
        """The sets of weights that teachers have of their own here, by name, and the first teacher that has each.

        A set is a model, or beside a LoRA student an adapter: :func:`opd_ext.config.teachers.adapter_weights`.
        """
        found: dict[str, View] = {}
        for view in self.views:
            if view.weights is not None:
                found.setdefault(view.weights, view)
        return found

    @property
    def samples_tokens(self) -> bool:
        """Whether a divergence looks at the sampled token alone, and so at log-probs before the update."""
        return any(view.opd.divergence.sampled for view in self.views)

    @property
    def active_spans(self) -> set[int]:
        """Labels of the annotated spans that have a divergence, with any teacher."""
        return set().union(*(view.opd.divergence.active_spans for view in self.views))

    @property
    def backends(self) -> set[str]:
        """Where teachers are asked: engine, vllm, server."""
        return {view.opd.teacher.backend for view in self.views} if self.distils else set()

    @property
    def asks(self) -> bool:
        """Whether the update asks a teacher itself: verl's servers have answered before."""
        return bool(self.backends - {"server"})

    @property
    def served_topk(self) -> int | None:
        """How many of its likeliest tokens a teacher on verl's servers is asked for; None: none is, or for no more
        than the sampled token."""
        served = [view.opd.divergence for view in self.views if self.distils and view.opd.teacher.backend == "server"]
        return max(
            (term.k for each in served for term in each.compared if term.support == "topk" and term.k), default=None
        )

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
            placement=self.credit.token_placement,
            prefix=self.credit.prefix,
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
        if not isinstance(content.get(name) or {}, dict):
            raise ConfigError(f"opd.{name}={content[name]} must be a section: did you mean opd.{name}.{choice}?")
        empty = {} if kind is CreditConfig else {choice: ABSENT}  # there is always a credit
        content[name] = {choice: getattr(kind(), choice), **(content.get(name) or empty)}
        _collect_options(content[name], kind)
    completed(content)
    for teacher in content["teachers"].values():
        _collect_options(teacher, NamedTeacher)
        _collect_options(teacher["context"], ContextConfig)
        _collect_options(teacher["divergence"], DivergenceConfig)
    for divergence in (content["divergence"], *(teacher["divergence"] for teacher in content["teachers"].values())):
        for name in SPAN_LABELS:
            _collect_options(divergence.get(name), DivergenceTerm)
    if content["credit"].get("annotator") is None:
        content["credit"].pop("annotator", None)
    _collect_options(content["credit"].get("annotator"), AnnotatorConfig)
    for key, value in _no_switches(OPDConfig, content, "opd."):
        raise ConfigError(f"{key}={value} must be true or false.")
    try:
        opd: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(OPDConfig), content))
    except OmegaConfBaseException as error:
        error.full_key = f"opd.{error.full_key}"
        keys: Any = OmegaConf.to_container(OmegaConf.structured(OPDConfig))
        raise refusal(error, (), "opd train", known=lambda: keys_of(keys, "opd.")) from None
    return opd


def _no_switches(kind: Any, content: dict[str, Any], section: str) -> Iterator[tuple[str, Any]]:
    """Fields that are true or false, and something else in ``content``: OmegaConf would take 7 for true."""
    for name, hint in get_type_hints(kind).items():
        value = content.get(name)
        if hint is bool and name in content and not isinstance(value, bool):
            yield f"{section}{name}", value
        elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
            yield from _no_switches(hint, value, f"{section}{name}.")


def _collect_options(section: dict[str, Any] | None, kind: type) -> None:
    """Move the keys that ``kind`` does not define into its ``args``, in place: options of what is registered."""
    if not isinstance(section, dict):
        return
    known = {entry.name for entry in dataclasses.fields(kind)}
    for key in [key for key in section if key not in known]:
        section.setdefault("args", {})[key] = section.pop(key)
