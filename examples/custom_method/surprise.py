# SPDX-License-Identifier: Apache-2.0
"""A method of one's own in one file: one new choice in each of the five places, and an annotator.

A teacher that starts to follow the student late and slowly is told that its reader is in a hurry. Where it is surprised
by what was sampled, the student moves towards it in squared Hellinger distance; a word of hesitation is marked, and the
policy term counts less there. `config/method/surprise.yaml` chooses all six; nothing of opd_ext is edited:

    PYTHONPATH=examples/custom_method opd train --config-dir examples/custom_method/config method=surprise
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_ext.context import TeacherContext, copy_messages, register_context
from opd_ext.credit import CreditInputs, register_annotator, register_credit
from opd_ext.credit.annotate import Annotator, Found, Request, Text
from opd_ext.divergence import log_probs, register_divergence
from opd_ext.policy import PolicyInputs, register_policy
from opd_ext.teacher import Teacher, register_teacher


@register_teacher("warm")
@dataclass(frozen=True)
class Warm(Teacher):
    """The initial model, then a copy of the student after step ``start``, then its slow moving average."""

    start: int = 20
    rate: float = 0.05

    def share(self, step: int, updates: int) -> float:
        return 1.0 if step == self.start else self.rate * (step > self.start and updates > 0)

    def __str__(self) -> str:
        return f"from {self.start}, {self.rate:g}"


@register_context("hurry")
@dataclass(frozen=True)
class Hurry(TeacherContext):
    """The student's messages behind a system message."""

    note: str = "The reader is in a hurry."

    def messages(self, sample: Mapping[str, Any]) -> list[dict]:
        return [{"role": "system", "content": self.note}, *copy_messages(sample)]


@register_divergence("hellinger")
def hellinger(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Squared Hellinger distance, 1 - sum_v sqrt(q_v p_v), in [0, 1] per token: [..., V], [..., V] -> [...]."""
    logq, logp = (log_probs(logits, temperature) for logits in (student_logits, teacher_logits.detach()))
    return 1.0 - (0.5 * (logq + logp)).exp().sum(dim=-1)


@register_credit("surprise")
def surprise(inputs: CreditInputs, margin: float = 0.0) -> Tensor:
    """1 where the student finds the sampled token likelier than the teacher by more than ``margin`` nats: [B, T]."""
    student, teacher = inputs.need("surprise", "student_log_prob", "teacher_log_prob")
    return (student - teacher > margin).to(torch.float32)


@register_annotator("hesitations")
class Hesitations(Annotator):
    """Marks words of hesitation; no language model is asked."""

    options = ("words",)

    async def find(self, request: Request, text: Text) -> Found:
        words = "|".join(map(re.escape, self.config.args.get("words", ["hmm", "wait"])))
        found = re.finditer(rf"\b({words})\b", text.text, re.IGNORECASE)
        spans = [(match.start(), match.end(), "hesitation") for match in found]
        return Found("ok" if spans else "empty", spans)


@register_policy("unhesitating")
def unhesitating(inputs: PolicyInputs, factor: float = 0.5) -> Tensor:
    """Advantages times ``factor`` on marked tokens: [B, T]."""
    marked = torch.zeros_like(inputs.mask) if inputs.span_label is None else inputs.span_label
    return torch.where(marked != 0, factor * inputs.advantages, inputs.advantages)
