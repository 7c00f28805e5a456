# SPDX-License-Identifier: Apache-2.0
"""SSD, simple self-distillation (Zhang et al., arXiv 2604.01193): the mathematics and the rules for data.

A model is fine-tuned on its own samples, drawn at a shifted temperature and cut to the likely tokens. Per state the
population target is ``q = truncate(p_0^(1/T))``, and everything that the method does follows from it:
:func:`truncated_distribution` is that target, :func:`split_loss` says which part of the loss does what.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

STUB_CHARACTERS = 10


def truncated_distribution(
    logits: Float[Tensor, "*states V"], temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "*states V"]:
    """What a sampler draws from: temperature, then top-k, then top-p among the survivors, renormalised.

    vLLM's order and rules: everything at least as likely as the k-th token stays, so ties survive top-k; top-p drops
    the unlikely end, of equals the last first, while its mass among the survivors is at most ``1 - top_p``; the
    likeliest token always stays.

    Args:
        temperature: 0 is greedy decoding: all mass on the likeliest token, the first of equals.
        top_k: number of tokens; 0 or less: all.
        top_p: mass, in (0, 1].

    Returns:
        Probabilities in the dtype of ``logits``, exactly 0 outside the support.

    Raises:
        ValueError: a setting is out of its range.

    >>> import torch
    >>> logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    >>> truncated_distribution(logits, temperature=1.0, top_p=0.7)  # the least set that has 0.7, renormalised
    tensor([0.6250, 0.3750, 0.0000, 0.0000])
    >>> truncated_distribution(logits, temperature=0.5, top_k=2)
    tensor([0.7353, 0.2647, 0.0000, 0.0000])
    >>> truncated_distribution(logits, temperature=0.0)
    tensor([1., 0., 0., 0.])
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it cannot be negative.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it is a probability mass in (0, 1].")
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1)
    tempered = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = tempered.topk(top_k, dim=-1).values[..., -1:]
        tempered = tempered.masked_fill(tempered < least, float("-inf"))
    if top_p < 1:
        descending, order = tempered.sort(dim=-1, descending=True, stable=True)
        mass_from_here = descending.softmax(-1).flip(-1).cumsum(-1).flip(-1)
        dropped = mass_from_here <= 1 - top_p
        dropped[..., 0] = False
        tempered = tempered.masked_fill(dropped.gather(-1, order.argsort(-1)), float("-inf"))
    return tempered.softmax(-1)


@dataclasses.dataclass(frozen=True)
class LossSplit:
    """Terms of the cross entropy of a student under a truncated target, nats per state; they sum to ``total``.

    ``support``: what the student still puts outside the support. ``shape``: a Rényi entropy inside it, rewarded for
    T > 1 and punished for T < 1. ``alignment``: a divergence that is 0 for the model that was sampled.
    ``constant``: of the target alone.
    """

    support: Float[Tensor, "*states"]
    shape: Float[Tensor, "*states"]
    alignment: Float[Tensor, "*states"]
    constant: Float[Tensor, "*states"]

    @property
    def total(self) -> Float[Tensor, "*states"]:
        return self.support + self.shape + self.alignment + self.constant


def split_loss(
    student_logits: Float[Tensor, "*states V"], target: Float[Tensor, "*states V"], temperature: float
) -> LossSplit:
    """Cross entropy of the student under ``target``, split exactly (arXiv 2604.01193, section on the loss).

    ``CE = -log p(S) + (1 - T) H_{1/T}(pi) + T KL(q || Temper_T(pi)) + T H(q)`` with pi the student on the support S of
    the target, renormalised, Temper_T(pi) ~ pi^(1/T), and H_a the Rényi entropy.

    Args:
        target: from :func:`truncated_distribution` at the same ``temperature``.
    """
    inside = target > 0
    logp = student_logits.log_softmax(-1)
    log_mass = logp.masked_fill(~inside, float("-inf")).logsumexp(-1)
    log_inside = torch.where(inside, logp - log_mass.unsqueeze(-1), float("-inf"))
    log_tempered_sum = (log_inside / temperature).logsumexp(-1)
    tempered = torch.where(inside, log_inside / temperature - log_tempered_sum.unsqueeze(-1), 0.0)
    entropy = -torch.special.xlogy(target, target).sum(-1)
    return LossSplit(
        support=-log_mass,
        shape=-temperature * log_tempered_sum,
        alignment=temperature * (-(target * tempered).sum(-1) - entropy),
        constant=temperature * entropy,
    )


def kept_mass(logits: Float[Tensor, "*states V"], target: Float[Tensor, "*states V"]) -> Float[Tensor, "*states"]:
    """Probability at temperature 1 that a model gives to the support of a target."""
    return (logits.softmax(-1) * (target > 0)).sum(-1)


def is_stub(text: str) -> bool:
    """Whether a response is dropped: nothing, or a single line of fewer than ten characters.

    The paper filters nothing else: the method keeps wrong, truncated and odd responses alike.
    """
    stripped = text.strip()
    return "\n" not in stripped and len(stripped) < STUB_CHARACTERS


def are_short(texts: Sequence[str], share: float) -> list[bool]:
    """Which responses are among the shortest; the rule of the release (``generate.py``), of which the paper is silent.

    Args:
        texts: responses; white space around them and empty ones do not count.
        share: of the responses. Those as long as the first that stays stay, too.

    >>> are_short(["one", "", "two", "four", "fives"], share=0.5)
    [True, True, True, False, False]
    """
    lengths = [len(text.strip()) for text in texts]
    counted = sorted(length for length in lengths if length)
    least = counted[int(round(len(counted) * share, 6))] if counted else 0
    return [length < least for length in lengths]
