# SPDX-License-Identifier: Apache-2.0
"""The loss as a textbook writes it: one sequence at a time, unpacked, all logits, autograd, float64.

Deliberately shares no code with ``opd_ext``, so that the engine is compared with the methods and not with itself.
"""

from pathlib import Path

import torch
from torch import Tensor

LABELS = {None: (0, 1, 2), 1: (1,), 2: (2,)}


def divergence(
    z: Tensor,
    w: Tensor,
    kind: str,
    temperature: float = 1.0,
    beta: float | None = None,
    entry_clip: float = torch.inf,
) -> Tensor:
    """Student logits z and teacher logits w [R, V] -> nats per token [R]."""
    logq, logp = torch.log_softmax(z / temperature, -1), torch.log_softmax(w / temperature, -1)
    q, p = logq.exp(), logp.exp()
    if kind == "reverse_kl":
        return (q * (logq - logp)).clamp(max=entry_clip).sum(-1)
    if kind == "forward_kl":
        return (p * (logp - logq)).clamp(max=entry_clip).sum(-1)
    logm = (beta * p + (1 - beta) * q).log()
    return beta * (p * (logp - logm)).sum(-1) + (1 - beta) * (q * (logq - logm)).sum(-1)


def weights_of(masks: list[Tensor], counted: list[Tensor], reduction: str) -> list[Tensor]:
    """Per sequence [R_i]; the denominators are those of ``counted``, where empty sequences are none."""
    tokens = sum(mask.sum() for mask in counted)
    sequences = sum(bool(mask.any()) for mask in counted)
    if reduction == "token-mean":
        return [mask / tokens for mask in masks]
    if reduction == "seq-mean-token-sum":
        return [mask / sequences for mask in masks]
    return [mask / (mask.sum().clamp(min=1) * sequences) for mask in masks]


def position_credit(gap: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """IW-OPD's weights by a loop over positions."""
    gap, passed, weights = gap.abs() * mask, 0.0, []
    for d, trained in zip(gap.tolist(), mask.tolist(), strict=True):
        weights.append(1 + gamma * max(0.0, 1 - passed / (gap.sum().item() + 1e-8)) * trained)
        passed += d
    return torch.tensor(weights, dtype=torch.float64)


def clipped_surrogate(logq: Tensor, old: Tensor, advantage: Tensor, low: float, high: float, dual: float) -> Tensor:
    """PPO's loss with both clips, per token."""
    ratio = (logq - old).exp()
    bounded = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
    return torch.where(advantage < 0, torch.minimum(bounded, -advantage * dual), bounded)


def dense_update(folder: Path, update, shift: int = 0) -> dict:
    """Loss, gradients and token means of ``update`` (an :class:`~tests.stack.engine_inputs.Update`).

    Args:
        folder: holds the model folders.
        shift: rows by which the teacher's logits are misaligned, for the control.
    """
    from transformers import Qwen3ForCausalLM

    def load(name: str) -> torch.nn.Module:
        return Qwen3ForCausalLM.from_pretrained(folder / name, dtype=torch.float64, attn_implementation="eager")

    student, teacher = load(update.model), load(update.teacher or update.model)
    objective, samples = update.objective, [s for s in update.samples if s.response]
    shapings = {shaping.name: shaping.args for shaping in objective.shapings}
    masks = [torch.tensor(s.mask, dtype=torch.float64) for s in samples]
    counted = [mask * (s.taught or update.denominator == "trained") for mask, s in zip(masks, samples, strict=True)]
    loss, sums, counts = torch.zeros((), dtype=torch.float64), {}, {}
    for sample, mask, weight in zip(samples, masks, weights_of(masks, counted, objective.reduction), strict=True):
        z = student(torch.tensor([sample.prompt + sample.response])).logits[0, len(sample.prompt) - 1 : -1]
        parts = {}
        if sample.taught:
            with torch.no_grad():
                ids = torch.tensor([sample.teacher_prompt + (sample.heard[1] if sample.heard else sample.read[0])])
                logits = teacher(ids).logits[0]
                if update.trust is not None:
                    logits = (1 - update.trust) * logits + update.trust * student(ids).logits[0]
            start = len(sample.teacher_prompt) - 1 - shift
            if sample.heard:
                theirs = logits[len(sample.teacher_prompt) - 1 : -1]
                credit, value, parts = _heard(update, sample, mask, z, theirs)
            else:
                w = logits[start + torch.tensor(sample.read[1]).nonzero()[:, 0], : z.shape[1]]
                credit, value, parts = _distillation(update, sample, mask, z, w)
            if "teacher_ratio" not in shapings:
                loss = loss + update.distillation_weight * (weight * credit * value).sum()
        logq = (z / objective.temperature).log_softmax(-1)
        sampled = logq.gather(-1, torch.tensor(sample.response)[:, None])[:, 0]
        if update.policy:
            advantage = torch.tensor(sample.advantage, dtype=torch.float64).expand(len(mask))
            if "teacher_ratio" in shapings and sample.taught:
                taught, bound = (w / objective.temperature).log_softmax(-1), shapings["teacher_ratio"]["bound"]
                gap = taught.gather(-1, torch.tensor(sample.response)[:, None])[:, 0] - _float64(sample.old_log_probs)
                factor = (advantage.sign() * gap).exp().clamp(1 - bound, 1 + bound)
                advantage = advantage * (1 - update.distillation_weight + update.distillation_weight * factor)
            if "complement" in shapings:
                gates = [update.gate if label in objective.active_spans else 1.0 for label in sample.spans]
                advantage = advantage * _float64(gates)
            if "untaught" in shapings and sample.taught:
                advantage = advantage * 0.0
            surrogate = clipped_surrogate(
                sampled,
                _float64(sample.old_log_probs),
                advantage,
                0.2,
                0.28,
                3.0,
            )
            total = sum(m.sum() for m in masks)
            loss = loss + (mask * surrogate).sum() / total
        gap = (sampled - _float64(sample.rollout_log_probs)).abs()
        plain = {"student_entropy": -(logq.exp() * logq).sum(-1), "student_log_prob": sampled, "rollout_gap": gap}
        for name, (per_token, where) in (parts | {name: (v, mask) for name, v in plain.items()}).items():
            sums[name] = sums.get(name, 0.0) + (where * per_token).sum().item()
            counts[name] = counts.get(name, 0.0) + where.sum().item()
    loss.backward()
    metrics = {name: sums[name] / counts[name] for name in sums if counts[name]}
    return {"loss": loss.item(), "grads": {n: p.grad for n, p in student.named_parameters()}, "metrics": metrics}


def _distillation(update, sample, mask: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor, dict]:
    """Constant factor and value per token, and what the metrics average over which tokens."""
    objective, labels = update.objective, torch.tensor(sample.response)[:, None]
    common = min(z.shape[-1], w.shape[-1])  # the rows that both heads have
    logq, logp = ((x / objective.temperature).log_softmax(-1) for x in (z, w))
    sampled, taught = (x.gather(-1, labels)[:, 0] for x in (logq, logp))
    old = _float64(sample.old_log_probs) if update.old_policy or update.policy else sampled.detach()
    credit = torch.ones_like(mask)
    if objective.credit == "position":
        credit = position_credit(taught - old, mask, **objective.credit_args)
    if objective.importance_cap is not None:
        credit = credit * (sampled.detach() - old).exp().clamp(max=objective.importance_cap)
    if objective.rollout_cap is not None:
        credit = credit * (old - _float64(sample.rollout_log_probs)).exp().clamp(max=objective.rollout_cap)
    used, value = torch.zeros_like(mask), torch.zeros_like(mask)
    if objective.surrogate is not None:
        clip = objective.surrogate.clip
        value = clipped_surrogate(sampled, old, (taught - old).detach(), clip, clip, objective.surrogate.dual_clip)
        used, shown = mask, sampled - taught
    else:
        for branch in objective.branches:
            here = mask * torch.isin(torch.tensor(sample.spans), torch.tensor(LABELS[branch.label]))
            value = value + here * divergence(z[:, :common], w[:, :common], branch.kind, **branch.kind_args)
            used = used + here
        shown = value
    teacher_entropy = -(logp.exp() * logp).sum(-1)
    shown = {"divergence": shown, "teacher_entropy": teacher_entropy, "teacher_log_prob": taught}
    return credit, value, {name: (per_token.detach(), used) for name, per_token in shown.items()}


def _heard(update, sample, mask: Tensor, z: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, dict]:
    """As :func:`_distillation`, of a teacher with tokens of its own, whose logits on them are ``theirs`` [T, V]."""
    objective, (own, tokens, spans) = update.objective, sample.heard
    logq, logp = ((x / objective.temperature).log_softmax(-1) for x in (z, theirs))
    sampled = logq.gather(-1, torch.tensor(sample.response)[:, None])[:, 0]
    taught = logp.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    heat = -(logp.exp() * logp).sum(-1)
    old = _float64(sample.old_log_probs) if update.old_policy or update.policy else sampled.detach()
    advantage, apart, said, entropy, sizes = (torch.zeros_like(mask) for _ in range(5))
    for number in sorted(set(own) - {-1}):
        mine = [j for j, other in enumerate(own) if other == number]
        whole = sum(taught[j] for j, other in enumerate(spans) if other == number)
        advantage[mine] = whole - sum(old[j] for j in mine)
        apart[mine] = (sum(sampled[j].detach() for j in mine) - whole) / len(mine)
        said[mine] = whole / len(mine)
        sizes[mine] = len(mine)
        entropy[mine] = torch.stack([heat[j] for j, other in enumerate(spans) if other == number]).mean()
    used = mask * torch.tensor([float(number >= 0) for number in own])
    clip, credit = objective.surrogate.clip, torch.ones_like(mask)
    if objective.credit == "position":  # the gap of a whole span, in equal parts
        credit = position_credit(advantage / sizes.clamp(min=1), mask, **objective.credit_args)
    if objective.rollout_cap is not None:
        credit = credit * (old - _float64(sample.rollout_log_probs)).exp().clamp(max=objective.rollout_cap)
    value = used * clipped_surrogate(sampled, old, advantage, clip, clip, objective.surrogate.dual_clip)
    shown = {"divergence": apart, "teacher_entropy": entropy, "teacher_log_prob": said}
    return credit, value, {name: (per_token, used) for name, per_token in shown.items()}


def _float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
