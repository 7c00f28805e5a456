# SPDX-License-Identifier: Apache-2.0
"""The distillation loss as a textbook writes it: one sequence at a time, unpacked, all logits, autograd, float64.

Deliberately shares no code with ``opd_ext``, so that the engine is compared with the method and not with itself.
"""

from pathlib import Path

import torch
from torch import Tensor


def divergence(z: Tensor, w: Tensor, kind: str, temperature: float = 1.0, beta: float | None = None) -> Tensor:
    """Student logits z and teacher logits w [R, V] -> nats per token [R]."""
    logq, logp = torch.log_softmax(z / temperature, -1), torch.log_softmax(w / temperature, -1)
    q, p = logq.exp(), logp.exp()
    if kind == "reverse_kl":
        return (q * (logq - logp)).sum(-1)
    if kind == "forward_kl":
        return (p * (logp - logq)).sum(-1)
    logm = (beta * p + (1 - beta) * q).log()
    return beta * (p * (logp - logm)).sum(-1) + (1 - beta) * (q * (logq - logm)).sum(-1)


def weights_of(masks: list[Tensor], reduction: str) -> list[Tensor]:
    """Per sequence [R_i]; sequences without a trained token do not count as sequences."""
    tokens = sum(mask.sum() for mask in masks)
    sequences = sum(bool(mask.any()) for mask in masks)
    if reduction == "token-mean":
        return [mask / tokens for mask in masks]
    if reduction == "seq-mean-token-sum":
        return [mask / sequences for mask in masks]
    return [mask / (mask.sum().clamp(min=1) * sequences) for mask in masks]


def dense_update(folder: Path, update, shift: int = 0) -> dict:
    """Loss, gradients and token means of ``update`` (an :class:`~tests.stack.engine_harness.Update`).

    Args:
        folder: holds the model folders.
        shift: rows by which the teacher's logits are misaligned, for the control.
    """
    from transformers import Qwen3ForCausalLM

    def load(name: str) -> torch.nn.Module:
        return Qwen3ForCausalLM.from_pretrained(folder / name, dtype=torch.float64, attn_implementation="eager")

    student, teacher = load(update.model), load(update.teacher or update.model)
    objective, samples = update.objective, [s for s in update.samples if s.response]
    masks = [torch.tensor(s.mask, dtype=torch.float64) for s in samples]
    loss, means = torch.zeros((), dtype=torch.float64), {}
    for sample, mask, weight in zip(samples, masks, weights_of(masks, objective.reduction), strict=True):
        z = student(torch.tensor([sample.prompt + sample.response])).logits[0, len(sample.prompt) - 1 : -1]
        with torch.no_grad():
            logits = teacher(torch.tensor([sample.teacher_prompt + sample.response])).logits[0]
        start = len(sample.teacher_prompt) - 1 - shift
        w = logits[start : start + len(sample.response)]
        value = divergence(z, w, objective.kind, **objective.kind_args)
        loss = loss + (weight * value).sum()
        for name, per_token in _metrics(value.detach(), z.detach(), w, sample).items():
            means[name] = means.get(name, 0.0) + (mask * per_token).sum().item() / sum(m.sum().item() for m in masks)
    loss.backward()
    return {"loss": loss.item(), "grads": {n: p.grad for n, p in student.named_parameters()}, "metrics": means}


def _metrics(value: Tensor, z: Tensor, w: Tensor, sample) -> dict[str, Tensor]:
    logq, logp, labels = z.log_softmax(-1), w.log_softmax(-1), torch.tensor(sample.response)[:, None]
    sampled = logq.gather(-1, labels)[:, 0]
    return {
        "divergence": value,
        "student_entropy": -(logq.exp() * logq).sum(-1),
        "teacher_entropy": -(logp.exp() * logp).sum(-1),
        "student_log_prob": sampled,
        "teacher_log_prob": logp.gather(-1, labels)[:, 0],
        "rollout_gap": (sampled - torch.tensor(sample.rollout_log_probs, dtype=torch.float64)).abs(),
    }
