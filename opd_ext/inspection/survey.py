# SPDX-License-Identifier: Apache-2.0
"""The signals of several methods on the same rollouts, micro-batch by micro-batch, as plain arrays."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_ext import lessons
from opd_ext.config.checks import foreign_tokenizers
from opd_ext.config.teachers import whose
from opd_ext.context import build_context
from opd_ext.credit.credits import keep_highest
from opd_ext.errors import present
from opd_ext.inspection.methods import CannotApply, Method
from opd_ext.inspection.models import LocalModel
from opd_ext.inspection.policy import AppliedPolicy, PolicySignals
from opd_ext.inspection.signals import SHOWN, Likeliest, Signals, likeliest, method_signals
from opd_ext.objective.batch import MicroBatch
from opd_ext.objective.byte_spans import SpanScores, joined, score, unspoken
from opd_ext.objective.objective import Objective
from opd_ext.teacher.kinds import TeacherOutput

MICRO_BATCH = 4096  # response tokens, at most, unless one response is longer
FORKS = 0.2  # share of a response's tokens at which the student is least sure: the high-entropy minority tokens

Row = Mapping[str, Any]


def plans(
    chosen: Method,
    rollouts: Sequence[Row],
    tokenizer: Any,
    template: Mapping[str, Any],
    tools: Any,
    stops: Sequence[int] = (),
) -> list:
    """The teacher's input per rollout, as the trainer plans it for each step's batch.

    Args:
        stops: ids that end a response, which a teacher of another tokenizer reads as its own end.

    Raises:
        CannotApply: the context finds no teacher for any of them.
    """
    opd = chosen.opd
    if not opd.distils:
        return [lessons.TeacherInput(None) for _ in rollouts]
    foreign = next(iter(foreign_tokenizers(opd, tokenizer, stops).values()), None)  # a view has one teacher
    context = build_context(opd.context, tokenizer if foreign is None else foreign.teacher.tokenizer)
    if context.in_turns:
        raise CannotApply("its teacher is told something in later turns, which is not shown here.")
    if opd.credit.annotates and not any(row.get("annotation") for row in rollouts):
        raise CannotApply("it needs annotated spans, and no annotator was at work in this run.")
    spans = opd.divergence.active_spans if opd.credit.annotates else None
    found: list[lessons.TeacherInput] = []
    try:
        for step, of_step in by_step(rollouts):
            mine = _own_rows(chosen, of_step)
            rows = [of_step[i] for i in mine]
            columns = [[row[name] for row in rows] for name in _COLUMNS]
            limit, moves = opd.max_pair_length, opd.credit.moves_spans
            inputs, _ = lessons.plan(
                rows, *columns, context, tokenizer, template, tools, limit, step, spans, moves, foreign
            )
            planned = dict(zip(mine, inputs, strict=True))
            found += [planned.get(i, lessons.TeacherInput(None)) for i in range(len(of_step))]
    except (ValueError, RuntimeError) as error:
        raise CannotApply(f"{error}.".replace("..", ".")) from None
    if not any(plan.ids for plan in found):
        too_long = any(plan.too_long for plan in found)
        why = f"no pair fits into opd.max_pair_length={opd.max_pair_length}" if too_long else _NO_TEACHER
        raise CannotApply(f"{why}.")
    return found


def _own_rows(chosen: Method, rows: Sequence[Row]) -> list[int]:
    """Places of the rollouts that are this teacher's; of one teacher all."""
    if chosen.whole is None or chosen.view is None:
        return list(range(len(rows)))
    of = whose(chosen.whole, [row.get("data_source") for row in rows], [row["extra_info"] for row in rows])
    return [i for i, own in enumerate(of) if chosen.whole.views[own].name == chosen.view.name]


_NO_TEACHER = "its context finds no teacher for any of these rollouts (a group without a sibling to learn from, say)"
_COLUMNS = ("prompts", "responses", "loss_mask", "raw_prompt", "extra_info")


def by_step(rollouts: Sequence[Row]) -> Iterator[tuple[int, list[Row]]]:
    """Rollouts that were trained together, in their order."""
    for step in dict.fromkeys(row["step"] for row in rollouts):
        yield step, [row for row in rollouts if row["step"] == step]


@dataclasses.dataclass
class Applied:
    """A method, ready for the rollouts of some steps.

    Attributes:
        inputs: the teacher's input of every rollout, in their order.
        own: the teacher's model, where it has weights of its own.
        temperature: of the rollouts.
        policy: its policy term, where it has one.
    """

    method: Method
    inputs: Sequence[lessons.TeacherInput]
    own: LocalModel | None
    temperature: float
    policy: AppliedPolicy | None = None

    def __post_init__(self) -> None:
        self.objective: Objective = self.method.opd.objective(self.temperature, {})
        self.counts: dict[int, tuple[int, int]] = {}
        self.taught: dict[int, bool] = {}

    def prepare(self, rollouts: Sequence[Row]) -> None:
        """Count what each step's reduction divides by, and say what is not as it would be in training."""
        notes, opd = self.method.notes, self.method.opd
        if self.objective.rollout_cap is not None and not all("rollout_log_probs" in row for row in rollouts):
            self.objective = dataclasses.replace(self.objective, rollout_cap=None)
            notes.append("The sampler's log-probs were not recorded, so its importance cap is taken to be 1.")
        if self.objective.reduction == "official":
            notes.append("Its reduction depends on how a batch was split; here a step is one micro-batch.")
        pairs = list(zip(rollouts, self.inputs, strict=True))
        for step in dict.fromkeys(row["step"] for row in rollouts):
            of_step = [pair for pair in pairs if pair[0]["step"] == step]
            left = [(row, plan) for row, plan in of_step if opd.policy.present or not plan.too_long]
            # As the engine counts them.
            used = [(row, plan) for row, plan in left if opd.denominator == "trained" or plan.ids is not None]
            trained = [sum(row["loss_mask"]) for row, _ in used]
            self.counts[step] = sum(trained), sum(map(bool, trained))
            self.taught[step] = any(plan.ids is not None for _, plan in of_step)
        if opd.distils and any(opd.schedule(step)[0] == 0 for step in self.counts):
            notes.append("At some of these steps its distillation term has faded out: weights are 0.")

    def signals(self, places: Sequence[int], rollouts: Sequence[Row], student: LocalModel, rows: list[Tensor]) -> Any:
        """Per rollout of ``places``, all of one step, the signals as arrays; None where nothing trains it.

        ``weight``, ``push`` and ``policy`` are in units of one trained token of the step: the step's loss is the sum of
        ``weight`` times ``per_token``, divided by that step's count of tokens.

        Args:
            rows: hidden states of the student, per rollout of ``places``.
        """
        there = [n for n, i in enumerate(places) if self._trains(self.inputs[i]) and rollouts[i]["responses"]]
        found: list[dict[str, np.ndarray] | None] = [None] * len(places)
        if not there:
            return found
        chosen = [rollouts[places[n]] for n in there]
        inputs = [self.inputs[places[n]] for n in there]
        step = chosen[0]["step"]
        (tokens, sequences), (strength, gate) = self.counts[step], self.method.opd.schedule(step)
        micro = dataclasses.replace(
            _micro_batch(chosen, inputs, student.device, self.objective.rollout_cap is not None),
            num_tokens=tokens,
            num_sequences=sequences,
            distillation_weight=strength,
            gate=gate,
        )
        if self.method.opd.teacher.foreign:
            micro = dataclasses.replace(micro, byte_spans=self._heard(student, chosen, inputs))
        hidden = torch.cat([rows[n] for n in there])
        signals, by_policy = self._both_terms(step, micro, hidden, student, chosen, inputs)
        values = _split(signals, by_policy if self.policy else None, self.method.opd.distils, micro, max(tokens, 1))
        for n, plan, each in zip(there, inputs, values, strict=True):
            found[n] = {**each, "taught": np.array(plan.ids is not None)}
        return found

    def _trains(self, plan: lessons.TeacherInput) -> bool:
        return self.policy is not None or plan.ids is not None

    def _both_terms(
        self,
        step: int,
        micro: MicroBatch,
        hidden: Tensor,
        student: LocalModel,
        rows: Sequence[Row],
        inputs: Sequence[lessons.TeacherInput],
    ) -> tuple[Signals, PolicySignals | None]:
        """In one loss, as they train; where a step trains without a teacher, each by itself."""
        policy = self.policy.watched(rows) if self.policy else None
        taught, reference = self.taught[step], None
        teacher = self._teacher(student, rows, inputs) if taught and micro.byte_spans is None else None
        if taught and self.objective.extrapolates:
            reference = torch.cat(student.teacher_output(_asked(rows, inputs), adapter=False).rows)
        together = taught and micro.distillation_weight > 0
        signals = None
        if taught:
            term = policy if together else None
            signals = method_signals(self.objective, micro, hidden, student.head, teacher, reference, term)
        if policy is not None and not together:
            # As the trainer: without a teacher nothing shapes the advantages.
            alone = dataclasses.replace(self.objective, shapings=())
            found = method_signals(alone, micro, hidden, student.head, None, None, policy)
            signals = found if signals is None else signals._replace(push=signals.push + found.push)
        by_policy = policy.signals(self.policy.advantages(rows)) if policy and self.policy else None
        return present(signals, "What nothing trains is not looked at."), by_policy

    def _teacher(
        self, student: LocalModel, rows: Sequence[Row], inputs: Sequence[lessons.TeacherInput]
    ) -> TeacherOutput:
        """What a kind of teacher says is made as in training; only who runs the models differs.

        Rows of no meaning, as many as a response has tokens, where there is no teacher.
        """
        found, head = self.method.opd.teacher.kind.output(student, self.own, _asked(rows, inputs))
        filled = [
            states if plan.ids is not None else head.new_zeros(len(row["responses"]), head.shape[1])
            for row, plan, states in zip(rows, inputs, found, strict=True)
        ]
        return TeacherOutput(filled, head)

    @torch.no_grad()
    def _heard(self, student: LocalModel, rows: Sequence[Row], inputs: Sequence[lessons.TeacherInput]) -> SpanScores:
        """What a teacher of another tokenizer says of the responses, in its own tokens."""
        spans = [plan.byte_spans if plan.ids is not None else None for plan in inputs]
        asked = [(plan.ids, len(own.teacher) if own else 1) for plan, own in zip(inputs, spans, strict=True)]
        found, head = self.method.opd.teacher.kind.output(student, self.own, asked)
        parts = []
        for row, plan, own, states in zip(rows, inputs, spans, found, strict=True):
            if own is None or plan.ids is None:
                parts.append(unspoken(len(row["responses"]), student.device))
                continue
            theirs, mine, labels = (
                torch.tensor(ids, device=student.device) for ids in (own.teacher, own.student, own.teacher_ids)
            )
            parts.append(score(*self.objective.scores(states, head, labels), theirs, mine))
        return joined(parts)


def _asked(rows: Sequence[Row], inputs: Sequence[lessons.TeacherInput]) -> list[tuple[list[int] | None, int]]:
    return [(plan.ids, len(row["responses"])) for plan, row in zip(inputs, rows, strict=True)]


def survey(
    applied: Sequence[Applied], student: LocalModel, rollouts: Sequence[Row], limit: int, temperature: float
) -> Iterator[tuple[int, dict[str, np.ndarray], dict[str, dict[str, np.ndarray] | None]]]:
    """Rollout by rollout: its place, what the student thinks of its own tokens, and every method's signals.

    Of the student: log-probs and entropies (nats) at the rollouts' ``temperature``, and its likeliest tokens. One
    micro-batch is in memory at a time, and the models.
    """
    measure = Objective(temperature=temperature)
    for places in _micro_batches(rollouts[:limit]):
        asked = [([*rollouts[i]["prompts"], *rollouts[i]["responses"]], len(rollouts[i]["responses"])) for i in places]
        rows = student.response_rows(asked)
        signals = {one.method.name: one.signals(places, rollouts, student, rows) for one in applied}
        for n, i in enumerate(places):
            labels = torch.tensor(rollouts[i]["responses"], dtype=torch.long, device=student.device)
            with torch.no_grad():
                log_prob, entropy = measure.scores(rows[n], student.head, labels)
            top = likeliest(rows[n], student.head, temperature, SHOWN)
            found = {"log_prob": log_prob, "entropy": entropy, "top": top.ids, "top_p": top.probabilities}
            numbers = {name: _numpy(value) for name, value in found.items()}
            yield i, numbers, {name: values[n] for name, values in signals.items()}


def _micro_batches(rollouts: Sequence[Row]) -> Iterator[list[int]]:
    """Places of consecutive rollouts of one step."""
    batch: list[int] = []
    size = 0
    for i, row in enumerate(rollouts):
        if batch and (size + len(row["responses"]) > MICRO_BATCH or row["step"] != rollouts[batch[0]]["step"]):
            yield batch
            batch, size = [], 0
        batch.append(i)
        size += len(row["responses"])
    if batch:
        yield batch


def _micro_batch(rows: Sequence[Row], inputs: Sequence[lessons.TeacherInput], device: str, sampled: bool) -> MicroBatch:
    def packed(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([value for row in rows for value in row[name]], dtype=dtype, device=device)

    annotated = any(plan.span_label is not None for plan in inputs)
    labels = [
        label
        for row, plan in zip(rows, inputs, strict=True)
        for label in plan.span_label or [0] * len(row["responses"])
    ]
    return MicroBatch(
        labels=packed("responses", torch.long),
        mask=packed("loss_mask", torch.long),
        lengths=torch.tensor([len(row["responses"]) for row in rows], device=device),
        num_tokens=0,
        num_sequences=0,
        num_micro_batches=1,
        dp_size=1,
        rollout_log_probs=packed("rollout_log_probs", torch.float32) if sampled else None,
        sample_mask=torch.tensor([plan.ids is not None for plan in inputs], device=device),
        span_label=torch.tensor(labels, device=device) if annotated else None,
    )


def _split(
    signals: Signals, policy: PolicySignals | None, distils: bool, micro: MicroBatch, tokens: int
) -> Iterator[dict[str, np.ndarray]]:
    """Per response the signals that the method has: of its distillation term, of its policy term."""
    per_token = {"push": signals.push * tokens}
    if distils:
        per_token |= _of_distillation(signals, micro, tokens)
    if policy is not None:
        per_token |= {"reward": policy.advantage, "ratio": policy.ratio, "gate": policy.gate}
        per_token |= {"policy": policy.weight * tokens}
    parts = {name: value.split(micro.sizes) for name, value in per_token.items()}
    for i in range(len(micro.sizes)):
        yield {name: _numpy(values[i]) for name, values in parts.items()}


def _of_distillation(signals: Signals, micro: MicroBatch, tokens: int) -> dict[str, Tensor]:
    """Zeros where there is no teacher."""
    terms, nothing = signals.terms, torch.zeros_like(signals.push)
    taught = present(micro.sample_mask, "Every micro-batch says who has a teacher.")[micro.sample]

    def where(mask: Tensor, value: Tensor | None) -> Tensor:
        return nothing if value is None else torch.where(mask, value, 0.0)

    gap = None if terms.teacher_log_prob is None else terms.teacher_log_prob - terms.student_log_prob
    if micro.byte_spans is not None and terms.divergence is not None:  # of a whole span, in equal parts
        gap = -terms.divergence
    top = signals.likeliest or Likeliest(nothing.long()[:, None], nothing[:, None])
    return {
        "divergence": where(terms.distilled, terms.divergence),
        "per_token": where(terms.distilled, terms.per_token),
        "weight": nothing if terms.weight is None else terms.weight * tokens,
        "clipped": where(taught, terms.clipped),
        "log_prob": where(taught, terms.teacher_log_prob),
        "entropy": where(taught, terms.teacher_entropy),
        "advantage": where(terms.distilled, gap),
        "distilled": terms.distilled,
        "top": top.ids,
        "top_p": top.probabilities,
        "overlap": where(taught, signals.overlap),
    }


def forks(entropy: np.ndarray, mask: Sequence[int], share: float = FORKS) -> np.ndarray:
    """The tokens at which the student is least sure, [R] bool: the ``share`` of the trained ones, at least one."""
    if not len(entropy):
        return np.zeros(0, dtype=bool)
    return keep_highest(torch.tensor(entropy)[None], torch.tensor(list(mask))[None], share)[0].numpy()


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy()
