# SPDX-License-Identifier: Apache-2.0
"""A method of one's own in one file: a divergence and a credit that the package does not have.

Squared Hellinger distance, on the tokens at which the teacher is more surprised than the student by what was sampled.
`config/method/surprise.yaml` chooses both; nothing of opd_ext is edited:

    PYTHONPATH=examples/custom_method opd train --config-dir examples/custom_method/config method=surprise
"""

import torch
from torch import Tensor

from opd_ext.credit.credits import CreditInputs, register_credit
from opd_ext.divergence.divergences import log_probs, register_divergence


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
