# SPDX-License-Identifier: Apache-2.0
"""How often the loss of a micro-batch asks its device for a number, which on an accelerator waits for all its work."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd_ext.divergence.config import Branch
from opd_ext.divergence.sampled import Surrogate
from opd_ext.objective.batch import MicroBatch
from opd_ext.objective.objective import Objective
from opd_ext.policy import Shaping

VOCABULARY, HIDDEN = 29, 8
SPANS = (Branch("forward_kl", {}, 1), Branch("reverse_kl", {}, 2))
OBJECTIVES = {
    "divergence": Objective(),
    "by sequence": Objective(reduction="seq-mean-token-mean"),
    "capped": Objective(importance_cap=2.0, rollout_cap=2.0),
    "position": Objective(surrogate=Surrogate(), credit="position", credit_args={"gamma": 0.5}),
    "spans": Objective(SPANS, credit="spans", shapings=(Shaping("complement"),), active_spans=frozenset({1})),
}
ASKS = {"aten::_local_scalar_dense", "aten::nonzero"}


class Asked(TorchDispatchMode):
    """Operations whose result the host needs: a scalar, the number of true entries, a length that is a tensor's sum."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        unsized = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None
        masked = name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += name in ASKS or unsized or masked
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def asked():
    """Counts them, and ``tolist``, which for a tensor on the host is no operation."""
    theirs, mode = torch.Tensor.tolist, Asked()

    def tolist(self):
        mode.count += 1
        return theirs(self)

    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(torch.Tensor, "tolist", tolist)
        yield mode


def _asks(objective: Objective, responses: int, length: int, classes: int) -> int:
    """Of loss, metrics and backward pass."""
    generator = torch.Generator().manual_seed(0)
    n = responses * length
    hidden, theirs = (torch.randn(n, HIDDEN, generator=generator) for _ in range(2))
    head, their_head = (torch.randn(VOCABULARY, HIDDEN, generator=generator) for _ in range(2))
    log_probs = -torch.rand(n, generator=generator)
    batch = MicroBatch(
        labels=torch.randint(VOCABULARY, (n,), generator=generator),
        mask=torch.ones(n),
        lengths=torch.full((responses,), length),
        num_tokens=n,
        num_sequences=responses,
        num_micro_batches=1,
        dp_size=1,
        rollout_log_probs=log_probs,
        old_log_probs=log_probs,
        sample_mask=torch.ones(responses),
        span_label=torch.arange(n) % 3,
    )
    tokens = {f"class{i}": [i] for i in range(classes)}
    objective = Objective(**{**vars(objective), "token_classes": tokens, "chunk_size": 4})
    inputs = hidden.requires_grad_(), head.requires_grad_()
    with asked() as mode:
        terms = objective(batch, *inputs, theirs, their_head)
        objective.sums(batch, terms)
        terms.loss.backward()
    return mode.count


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_host_asks_no_more_for_more_chunks_responses_or_metrics(name):
    few = _asks(OBJECTIVES[name], responses=2, length=6, classes=1)
    many = _asks(OBJECTIVES[name], responses=9, length=40, classes=12)
    assert few == many <= 8


def test_the_count_sees_what_asks():
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with asked() as mode:
        values[mask], values.sum().item(), mask.nonzero(), values.tolist(), mask.repeat_interleave(torch.ones(4).int())
    assert mode.count == 5
