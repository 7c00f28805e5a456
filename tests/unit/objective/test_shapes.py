# SPDX-License-Identifier: Apache-2.0
"""While tests run, whoever passes a tensor of another shape than the signature says is stopped there and then."""

import importlib
import inspect
import pkgutil
import typing

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, ones, zeros

from opd_ext.credit import position_weights
from opd_ext.divergence import register_divergence, reverse_kl, sampled_advantage, topk_divergence
from opd_ext.objective.batch import MicroBatch
from opd_ext.objective.head import chunked_divergence
from opd_ext.objective.objective import Objective
from opd_ext.objective.reduction import token_weights
from opd_ext.pipelines.ssd import truncated_distribution
from opd_ext.pipelines.t3s import keep_mask
from opd_ext.policy import span_gate
from opd_ext.ratios import importance_clip
from opd_ext.teacher import ema_shards
from tests.shapes import CHECKED


def _batch(tokens: int = 3, **other: Tensor) -> MicroBatch:
    tensors = {"labels": zeros(tokens).long(), "mask": ones(tokens), "lengths": torch.tensor([tokens]), **other}
    return MicroBatch(**tensors, num_tokens=tokens, num_sequences=1, num_micro_batches=1, dp_size=1)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: reverse_kl(zeros(2, 5), zeros(3, 5)), id="other tokens"),
        pytest.param(lambda: reverse_kl(zeros(2, 5), zeros(2, 1)), id="what would broadcast"),
        pytest.param(lambda: topk_divergence(zeros(2, 5), zeros(2, 6), 3, "jsd", beta=0.5), id="other vocabulary"),
        pytest.param(lambda: sampled_advantage(zeros(3), zeros(3, 1)), id="a column for a row"),
        pytest.param(lambda: importance_clip(zeros(2, 3), zeros(3, 2), cap=2.0), id="transposed"),
        pytest.param(lambda: position_weights(zeros(3), zeros(3), ones(3)), id="no batch"),
        pytest.param(lambda: span_gate(zeros(3), zeros(3), 0.5, [1]), id="labels that are no integers"),
        pytest.param(lambda: token_weights(ones(3), "official", sequence_lens=ones(1)), id="lengths likewise"),
        pytest.param(lambda: keep_mask(zeros(3), zeros(3), ones(2)), id="a mask of another length"),
        pytest.param(lambda: truncated_distribution(zeros(5).long(), 1.0), id="integer logits"),
        pytest.param(lambda: ema_shards({"w": zeros(2).long()}, {"w": zeros(2).long()}, 0.5), id="integer weights"),
        pytest.param(lambda: _batch(3, mask=ones(4)), id="fields that do not fit together"),
        pytest.param(lambda: Objective()(_batch(), zeros(3, 2), zeros(5, 3)), id="hidden states of another model"),
    ],
)
def test_a_wrong_shape_raises(call):
    with pytest.raises(TypeCheckError):
        call()


def test_a_divergence_of_a_users_own_must_return_one_number_per_token():
    @register_divergence("forgotten_sum")
    def forgotten_sum(student_logits, teacher_logits):
        return student_logits - teacher_logits

    with pytest.raises(TypeCheckError):
        chunked_divergence(zeros(3, 2), zeros(5, 2), zeros(3, 2), zeros(5, 2), ones(3), "forgotten_sum")


def _modules():
    for name in CHECKED:
        module = importlib.import_module(name)
        yield module
        for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}."):
            yield importlib.import_module(found.name)


def _bare(hint) -> bool:
    return hint is Tensor or any(_bare(part) for part in typing.get_args(hint))


def test_no_public_function_takes_or_returns_a_tensor_without_its_shape():
    """Hints that Python cannot resolve would be checked by nobody: they raise here."""
    bare, stated = [], 0
    for module in _modules():
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__:
                hints = typing.get_type_hints(inspect.unwrap(function))
                stated += "jaxtyping" in repr(hints)
                places = [f"{module.__name__}.{name}: {argument}" for argument, hint in hints.items() if _bare(hint)]
                bare += [place for place in places if not name.startswith("_")]
    assert not bare and stated > 30
