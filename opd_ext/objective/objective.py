# SPDX-License-Identifier: Apache-2.0
"""The loss of one micro-batch, composed from its places, and the sums from which a step's metrics are made.

    loss = policy(log_prob)
         + sum_t token_weight_t * lambda * credit_t * clip_t * D_t        D_t: one divergence, or one per span class

``D`` is a divergence of two distributions, or, on the sampled token, the clipped policy-gradient surrogate whose
advantage is the teacher's log-ratio. Everything but ``D`` and the policy term is a constant of the gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd_ext.credit.credits import CreditInputs, get_credit
from opd_ext.credit.placement import OWN, get_placement
from opd_ext.divergence.config import Branch
from opd_ext.divergence.known import TopK
from opd_ext.divergence.sampled import Surrogate, clipped_surrogate, sampled_advantage
from opd_ext.objective.batch import MicroBatch, PolicyTerm, Shape, Terms, chosen
from opd_ext.objective.chunks import Side
from opd_ext.objective.head import GradientSum, HeadOutput, Mode, divergence_head
from opd_ext.objective.metrics import token_sums
from opd_ext.objective.reduction import Reduction, token_weights
from opd_ext.objective.shares import Share
from opd_ext.policy.shapings import PolicyInputs, Shaping, replaces_divergence
from opd_ext.ratios import importance_clip

Denominator = Literal["trained", "distilled"]
DENOMINATORS: tuple[Denominator, ...] = ("trained", "distilled")


@dataclasses.dataclass(frozen=True)
class Objective:
    """The configured loss; see the module's docstring for its form.

    Attributes:
        branches: divergences; more than one only with different span labels.
        surrogate: takes the place of the branches in losses on the sampled token.
        credit, credit_args: a registered credit and its options.
        placement, prefix: where the credits of a response lie, see :mod:`opd_ext.credit.placement`.
        importance_cap: cap of ``exp(logp - old_logp)`` on the distillation term (SDPO: 2); None: off.
        rollout_cap: cap of ``exp(old_logp - rollout_logp)`` (IW-OPD: 5, SDPO: 2); None: off.
        shapings: what the advantages of the policy term go through where a teacher is at hand.
        active_spans: labels of the annotated spans that have a divergence.
        literal_spans: other spans count as spans too, for a shaping that asks.
        reduction: see :func:`opd_ext.objective.reduction.token_weights`.
        denominator: whose tokens and sequences a mean counts: all that are ``trained``, or the ``distilled`` ones.
        temperature: of the rollouts; divides the logits of log-probs and entropies.
        chunk_size: rows of logits held at a time.
        fp32: vocabulary projection in float32.
        token_classes: token ids whose divergence is reported apart, by label.
    """

    branches: tuple[Branch, ...] = (Branch(),)
    surrogate: Surrogate | None = None
    credit: str = "uniform"
    credit_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    placement: str = OWN
    prefix: float = 0.1
    importance_cap: float | None = None
    rollout_cap: float | None = None
    shapings: tuple[Shaping, ...] = ()
    active_spans: frozenset[int] = frozenset()
    literal_spans: bool = False
    reduction: Reduction = "token-mean"
    denominator: Denominator = "trained"
    temperature: float = 1.0
    chunk_size: int = 1024
    fp32: bool = False
    token_classes: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)

    @property
    def clips(self) -> bool:
        """Whether a bound takes vocabulary entries their gradient, so that their share is reported."""
        return any(branch.kind_args.get("entry_clip") is not None for branch in self.branches)

    @property
    def extrapolates(self) -> bool:
        """Whether the loss needs a reference beside the teacher (ExOPD)."""
        return self.surrogate is not None and self.surrogate.extrapolation != 1.0

    def __call__(
        self,
        batch: MicroBatch,
        hidden: Float[Tensor, "_n H"],
        weight: Float[Tensor, "V H"],
        teacher_hidden: Float[Tensor, "_n Ht"] | None = None,
        teacher_weight: Float[Tensor, "_VT Ht"] | None = None,
        policy: PolicyTerm | None = None,
        reference_hidden: Float[Tensor, "_n H"] | None = None,
    ) -> Terms:
        """Loss and per-token terms of one micro-batch; of several teachers: :func:`opd_ext.objective.lessons.taught`.

        Args:
            hidden, teacher_hidden: rows that predict the response tokens, n = N unless ranks share the batch. No
                teacher: the policy term alone.
            weight, teacher_weight: vocabulary projections.
            policy: the policy term, or None.
            reference_hidden: rows of the reference that a surrogate extrapolates from; its head is ``weight``.
        """
        student, teacher = Side(hidden, weight), Side.given(teacher_hidden, teacher_weight)
        return self.finished(batch, self.distilled(batch, student, teacher, policy is None, reference_hidden), policy)

    def distilled(
        self,
        batch: MicroBatch,
        student: Side,
        teacher: Side | None,
        alone: bool,
        reference_hidden: Float[Tensor, "_n H"] | None = None,
        total: GradientSum | None = None,
    ) -> Terms:
        """The distillation term; ``alone``: no policy term follows. ``total``: see the head."""
        if reference_hidden is not None:
            with torch.no_grad():
                reference = self._head(batch, Side(reference_hidden, student.weight), None, mode="recompute")
            batch = dataclasses.replace(batch, reference_log_prob=reference.student_log_prob)
        if teacher is None and not batch.is_answered:
            return self._without_teacher(batch, student)
        if self.surrogate is None and self.branches[0].label is not None:
            return self._on_spans(batch, student, teacher, total or GradientSum())
        return self._everywhere(batch, student, teacher, alone, total)

    def finished(self, batch: MicroBatch, terms: Terms, policy: PolicyTerm | None) -> Terms:
        """``terms`` with the policy term, if there is one; all but the loss are detached."""
        if policy is not None:
            shape = self._shape(batch, terms) if self.shapings else None
            if shape is not None and any(replaces_divergence(shaping.name) for shaping in self.shapings):
                terms = terms._replace(
                    loss=terms.student_log_prob.sum() * 0.0, weight=torch.zeros_like(batch.mask).float()
                )
            policy_loss = policy(terms.student_log_prob, terms.student_entropy, shape)
            terms = terms._replace(loss=terms.loss + policy_loss)
        found = {name: term for name, term in terms._asdict().items() if name != "loss" and term is not None}
        return terms._replace(**{name: term.detach() for name, term in found.items()})

    def scores(
        self,
        hidden: Float[Tensor, "_n H"],
        weight: Float[Tensor, "V H"],
        labels: Int[Tensor, " N"],
        share: Share | None = None,
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Log-probs of the labels and entropies in nats, as the loss itself sees them; ``share`` as in a batch."""
        out = self._shared_head(share, Side(hidden, weight), None, labels=labels, mode="recompute")
        log_prob, entropy = out.need("student_log_prob", "student_entropy")
        return log_prob, entropy

    # ------------------------------------------------------------------ the forms

    def _without_teacher(self, batch: MicroBatch, student: Side) -> Terms:
        out = self._head(batch, student, None, mode="recompute")
        log_prob, entropy = out.need("student_log_prob", "student_entropy")
        # A loss of 0 that still reaches every parameter: all ranks must run the same backward pass.
        return Terms(log_prob.sum() * 0.0, log_prob, entropy, torch.zeros_like(batch.mask, dtype=torch.bool))

    def weighs_beforehand(self, alone: bool) -> bool:
        """Whether the weight of every token is known before the pass, which then forms the gradient."""
        known = getattr(get_credit(self.credit), "known_beforehand", False)
        return bool(alone and known and self.surrogate is None and not (self.importance_cap or self.rollout_cap))

    def _everywhere(
        self, batch: MicroBatch, student: Side, teacher: Side | None, alone: bool, total: GradientSum | None
    ) -> Terms:
        """One divergence, or the surrogate, for all tokens."""
        if self.weighs_beforehand(alone):
            return self._at_once(batch, student, teacher, total)
        branch = None if self.surrogate else self.branches[0]
        out = self._head(batch, student, teacher, branch=branch, mode="recompute")
        if batch.teacher_log_prob is not None:
            out = out._replace(teacher_log_prob=batch.teacher_log_prob)
        log_prob, entropy = out.need("student_log_prob", "student_entropy")
        if (spans := batch.byte_spans) is not None:
            out = out._replace(teacher_log_prob=spans.shared(spans.log_prob), teacher_entropy=spans.entropy)
        distilled, weights = batch.distilled(), self._weights(batch)
        credit = self._credit(batch, out) * self._caps(batch, log_prob)
        if self.surrogate is None:
            (divergence,) = out.need("divergence")
            per_token = divergence
        else:
            (teacher_log_prob,) = out.need("teacher_log_prob")
            divergence = log_prob - teacher_log_prob
            if spans is not None:
                divergence = spans.shared(spans.total(log_prob)) - teacher_log_prob
            per_token = _surrogate_loss(self.surrogate, batch, log_prob, teacher_log_prob)
        # Where nothing is distilled the terms mean nothing and may be infinite; 0 * inf would be NaN.
        weights, per_token = weights * credit, torch.where(distilled, per_token, 0.0)
        return Terms(
            (weights * per_token).sum(),
            log_prob,
            entropy,
            distilled,
            divergence,
            out.teacher_log_prob,
            out.teacher_entropy,
            credit,
            out.clipped,
            weights,
            per_token,
        )

    def _at_once(self, batch: MicroBatch, student: Side, teacher: Side | None, total: GradientSum | None) -> Terms:
        """One divergence for all tokens, whose weights are known: the head forms the gradient within its pass."""
        weights = self._weights(batch) * self._credit(batch, None)
        branch = self.branches[0]
        out = self._head(batch, student, teacher, branch=branch, token_weight=weights, mode="forward", total=total)
        loss, log_prob, entropy = out.need("loss", "student_log_prob", "student_entropy")
        return Terms(
            loss,
            log_prob,
            entropy,
            batch.distilled(),
            out.divergence,
            out.teacher_log_prob if batch.teacher_log_prob is None else batch.teacher_log_prob,
            out.teacher_entropy,
            clipped=out.clipped,
            weight=weights,
            per_token=out.divergence,
        )

    def _on_spans(self, batch: MicroBatch, student: Side, teacher: Side | None, total: GradientSum) -> Terms:
        """A divergence per class of annotated tokens: only their rows meet the teacher."""
        terms = self._without_teacher(batch, student)
        weights = self._weights(batch) * self._caps(batch, terms.student_log_prob)
        of_teacher = ("teacher_log_prob", "teacher_entropy") if teacher is not None else ()
        values = {name: torch.zeros_like(weights) for name in ("divergence", *of_teacher)}
        # Micro-batches report the same quantities whether or not they have a marked row: verl lines up their lists.
        if self.clips:
            values["clipped"] = torch.zeros_like(weights)
        loss, distilled = terms.loss, terms.distilled
        for branch in self.branches:
            rows = (batch.distilled() & (batch.span_label == branch.label)).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            share, own = (None, rows) if batch.share is None else batch.share.pick(rows)
            out = self._shared_head(
                share,
                Side(student.hidden[own], student.weight),
                None if teacher is None else Side(teacher.hidden[own], teacher.weight),
                labels=batch.labels[rows],
                known=chosen(batch.teacher_topk, rows),
                branch=branch,
                token_weight=weights[rows],
                mode="forward",
                total=total,
            )
            loss = loss + out.need("loss")[0]
            distilled = distilled.index_fill(0, rows, True)
            for name, value in values.items():
                if (found := getattr(out, name)) is not None:
                    value[rows] = found.to(value.dtype)
        weights = torch.where(distilled, weights, 0.0)
        return terms._replace(loss=loss, distilled=distilled, weight=weights, per_token=values["divergence"], **values)

    # ------------------------------------------------------------------ pieces

    def _head(self, batch: MicroBatch, student: Side, teacher: Side | None, **options: Any) -> HeadOutput:
        known = batch.teacher_topk if options.get("branch") else None
        return self._shared_head(batch.share, student, teacher, labels=batch.labels, known=known, **options)

    def _shared_head(
        self,
        share: Share | None,
        student: Side,
        teacher: Side | None,
        *,
        labels: Int[Tensor, " N"],
        mode: Mode,
        known: TopK | None = None,
        branch: Branch | None = None,
        token_weight: Float[Tensor, " N"] | None = None,
        total: GradientSum | None = None,
    ) -> HeadOutput:
        """The head on this rank's rows; what is per token is of all rows, and so is what comes back."""
        teacher_hidden, teacher_weight = teacher or (None, None)
        out = divergence_head(
            student.hidden,
            student.weight,
            teacher_hidden,
            teacher_weight,
            labels=labels if share is None else labels[share.own],
            token_weight=token_weight if share is None or token_weight is None else token_weight[share.own],
            kind=branch.kind if branch else None,
            kind_args=branch.kind_args if branch else None,
            temperature=self.temperature,
            chunk_size=self.chunk_size,
            mode=mode,
            matmul_dtype=torch.float32 if self.fp32 else None,
            total=total,
            known=known if share is None else chosen(known, share.own),
        )
        return out if share is None else out.shared(share, token_weight)

    def _weights(self, batch: MicroBatch) -> Float[Tensor, " N"]:
        """Reduction times annealing, 0 where nothing is distilled."""
        return self.reduced(batch) * batch.distilled() * batch.distillation_weight

    def reduced(self, batch: MicroBatch) -> Float[Tensor, " N"]:
        """What the reduction alone makes of every token."""
        if batch.reduced is not None:
            return batch.reduced
        return token_weights(
            batch.mask,
            self.reduction,
            num_tokens=batch.num_tokens,
            num_sequences=batch.num_sequences,
            num_micro_batches=batch.num_micro_batches,
            dp_size=batch.dp_size,
            sequence_lens=batch.lengths,
        )

    def _credit(self, batch: MicroBatch, out: HeadOutput | None) -> Float[Tensor, " N"]:
        """The registered credit; it sees whole responses, so their packing does not matter."""
        found = {} if out is None else out._asdict()
        if batch.old_log_probs is not None:
            found["student_log_prob"] = batch.old_log_probs
        if (spans := batch.byte_spans) is not None and (own := found.get("student_log_prob")) is not None:
            found["student_log_prob"] = spans.shared(spans.total(own))  # as the teacher's: only spans are comparable
        found["span_label"] = batch.span_label
        names = [name for name in CreditInputs._fields if name != "mask" and found.get(name) is not None]
        inputs = {name: batch.padded(found[name].detach()) for name in names}
        mask, labels = batch.padded(batch.mask), batch.padded(batch.labels)
        credit = get_credit(self.credit)(CreditInputs(mask, **inputs), **self.credit_args)
        return batch.packed(get_placement(self.placement)(credit, mask, labels, self.prefix))

    def _caps(self, batch: MicroBatch, log_prob: Float[Tensor, " N"]) -> Float[Tensor, " N"] | float:
        """Truncated importance weights: current to old policy, old policy to rollout engine."""
        old = log_prob.detach() if batch.old_log_probs is None else batch.old_log_probs
        factor: Tensor | float = 1.0
        if self.importance_cap is not None:
            factor = factor * importance_clip(log_prob, old, self.importance_cap)
        if self.rollout_cap is not None:
            if batch.rollout_log_probs is None:
                raise ValueError("A rollout cap needs rollout log-probs: set rollout.calculate_log_probs=true.")
            factor = factor * importance_clip(old, batch.rollout_log_probs, self.rollout_cap)
        return factor

    def _shape(self, batch: MicroBatch, terms: Terms) -> Shape:
        old = terms.student_log_prob.detach() if batch.old_log_probs is None else batch.old_log_probs
        taught = torch.ones_like(batch.lengths) if batch.sample_mask is None else batch.sample_mask
        inputs = {
            "mask": batch.mask,
            "taught": taught.bool()[batch.sample],
            "distilled": terms.distilled,
            "student_log_prob": old,
            "teacher_log_prob": terms.teacher_log_prob,
            "span_label": batch.span_label,
        }
        present = {name: batch.padded(value.detach()) for name, value in inputs.items() if value is not None}

        def shape(advantages: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
            for shaping in self.shapings:
                seen = PolicyInputs(
                    batch.padded(advantages),
                    **present,
                    distillation_weight=batch.distillation_weight,
                    gate=batch.gate,
                    active_spans=self.active_spans,
                    literal_spans=self.literal_spans,
                )
                advantages = batch.packed(shaping(seen))
            return advantages

        return shape

    def sums(
        self, batch: MicroBatch, terms: Terms, taught: Mapping[str, Bool[Tensor, " N"]] | None = None
    ) -> dict[str, float]:
        """See :func:`opd_ext.objective.metrics.token_sums`."""
        return token_sums(batch, terms, self.token_classes, taught)


def _surrogate_loss(
    surrogate: Surrogate,
    batch: MicroBatch,
    log_prob: Float[Tensor, " N"],
    teacher_log_prob: Float[Tensor, " N"],
) -> Float[Tensor, " N"]:
    """The clipped policy-gradient term whose advantage is the teacher's log-ratio on the sampled token."""
    old = log_prob.detach() if batch.old_log_probs is None else batch.old_log_probs
    clip, dual_clip, extrapolation, constant = dataclasses.astuple(surrogate)
    if (spans := batch.byte_spans) is not None:
        teacher_log_prob = spans.as_tokens(old)
    if constant is None:
        advantage = sampled_advantage(old, teacher_log_prob, batch.reference_log_prob, extrapolation)
    else:
        advantage = torch.full_like(old, constant)
    return clipped_surrogate(log_prob, old, advantage, clip, clip, dual_clip).loss
