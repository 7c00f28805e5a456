# SPDX-License-Identifier: Apache-2.0
"""Several teachers in one micro-batch: equal ones are one, different ones are each their own samples' alone."""

import dataclasses

import pytest
import torch
from torch.overrides import TorchFunctionMode

from opd_ext.divergence.config import Branch
from opd_ext.divergence.sampled import Surrogate
from opd_ext.objective.batch import MicroBatch
from opd_ext.objective.chunks import Side
from opd_ext.objective.lessons import Lesson, taught
from opd_ext.objective.metrics import means
from opd_ext.objective.objective import Objective
from opd_ext.policy import Shaping

LENGTHS = [3, 0, 5, 1, 4, 2, 6]
N, V, H, WIDE = sum(LENGTHS), 23, 6, 9
ASSIGNED = {"a": [0, 3, 6], "b": [1, 4], "c": [2, 5]}  # the sample without a token is b's
SPANS = (Branch("forward_kl", {"entry_clip": 0.05}, 1), Branch("reverse_kl", {}, 2))

OBJECTIVES = {
    "reverse_kl": Objective(),
    "forward_kl, by sequence": Objective((Branch("forward_kl"),), reduction="seq-mean-token-mean"),
    "official": Objective(reduction="official"),
    "position credit, capped": Objective(
        credit="position", credit_args={"gamma": 0.5}, importance_cap=1.1, rollout_cap=1.2
    ),
    "sampled": Objective(surrogate=Surrogate(), temperature=0.7),
    "extrapolated": Objective(surrogate=Surrogate(extrapolation=1.5)),
    "spans": Objective(SPANS, credit="spans"),
    "gated spans": Objective(SPANS, credit="spans", shapings=(Shaping("complement"),), active_spans=frozenset({1, 2})),
}


def _batch() -> MicroBatch:
    random = torch.Generator().manual_seed(3)
    return MicroBatch(
        labels=torch.randint(0, V, (N,), generator=random),
        mask=torch.randint(0, 4, (N,), generator=random).bool().double(),
        lengths=torch.tensor(LENGTHS),
        num_tokens=40,
        num_sequences=9,
        num_micro_batches=2,
        dp_size=2,
        rollout_log_probs=-torch.rand(N, generator=random, dtype=torch.float64),
        old_log_probs=-3.1 - 0.1 * torch.rand(N, generator=random, dtype=torch.float64),
        sample_mask=torch.tensor([True, True, True, True, False, True, True]),
        span_label=torch.randint(0, 3, (N,), generator=random),
        distillation_weight=0.6,
        gate=0.3,
    )


def _tensor(*shape: int, seed: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _policy(log_prob, entropy, shape):
    advantages = torch.linspace(-1, 1, N, dtype=torch.float64)
    return -(log_prob * (shape(advantages) if shape else advantages)).sum() / N


def _rows(samples) -> list[int]:
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    return [row for i in samples for row in range(starts[i], starts[i] + LENGTHS[i])]


def _lessons(objectives, teachers, reference=None, weights=None) -> list[Lesson]:
    """One per name of ``ASSIGNED``; ``teachers`` are (hidden [N, Ht], weight [V, Ht])."""
    found = []
    for name, samples in ASSIGNED.items():
        rows, (rows_of_all, head) = _rows(samples), teachers[name]
        own = None if reference is None else reference[rows]
        weight = (weights or {}).get(name, 1.0)
        found.append(Lesson(objectives[name], samples, Side(rows_of_all[rows], head), own, weight))
    return found


def _computed(loss_of) -> dict:
    hidden, weight = (_tensor(*shape, seed=s).requires_grad_() for s, shape in ((0, (N, H)), (1, (V, H))))
    terms = loss_of(hidden, weight)
    terms.loss.backward()
    return {"terms": terms, "loss": terms.loss.item(), "grads": (hidden.grad, weight.grad)}


def _assert_equal(actual, expected):
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-12, abs=1e-12)
    assert any(grad.abs().max() > 1e-4 for grad in expected["grads"])
    for mine, theirs in zip(actual["grads"], expected["grads"], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("policy", [None, _policy], ids=["alone", "with a policy term"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_three_equal_teachers_are_one(name, policy):
    objective, batch = OBJECTIVES[name], _batch()
    teacher, head, reference = _tensor(N, WIDE, seed=4), _tensor(V, WIDE, seed=5), _tensor(N, H, seed=6)
    reference = reference if objective.extrapolates else None
    one = _computed(lambda h, w: objective(batch, h, w, teacher, head, policy, reference))
    lessons = _lessons(dict.fromkeys(ASSIGNED, objective), dict.fromkeys(ASSIGNED, (teacher, head)), reference)
    three = _computed(lambda h, w: taught(batch, h, w, lessons, policy))
    _assert_equal(three, one)
    said, expected = (means(objective.sums(batch, found["terms"])) for found in (three, one))
    assert said == pytest.approx(expected, rel=1e-12)


def test_each_sample_learns_from_its_own_teacher_alone():
    """Against one batch per teacher, in which the other samples have none."""
    batch = _batch()
    objectives = {
        "a": Objective(),
        "b": Objective((Branch("jsd", {"beta": 0.3}),)),
        "c": Objective(surrogate=Surrogate()),
    }
    teachers = {
        name: (_tensor(N, width, seed=10 + i), _tensor(height, width, seed=20 + i))
        for i, (name, width, height) in enumerate((("a", H, V), ("b", WIDE, V + 3), ("c", H, V)))
    }
    weights = {"a": 1.0, "b": 0.5, "c": 2.0}
    together = _computed(lambda h, w: taught(batch, h, w, _lessons(objectives, teachers, weights=weights)))
    apart = []
    for name, samples in ASSIGNED.items():
        mask = torch.tensor([i in samples for i in range(len(LENGTHS))]) & batch.sample_mask
        own = dataclasses.replace(batch, sample_mask=mask, distillation_weight=0.6 * weights[name])
        apart.append(_computed(lambda h, w, name=name, own=own: objectives[name](own, h, w, *teachers[name])))
    summed = {
        "loss": sum(each["loss"] for each in apart),
        "grads": [sum(each["grads"][i] for each in apart) for i in range(2)],
    }
    _assert_equal(together, summed)
    marks = {name: torch.isin(torch.arange(N), torch.tensor(_rows(samples))) for name, samples in ASSIGNED.items()}
    said = means(objectives["a"].sums(batch, together["terms"], marks))
    for each, name in zip(apart, ASSIGNED, strict=True):
        if f"teacher/{name}/divergence" in said:
            alone = means(objectives[name].sums(batch, each["terms"]))["divergence"]
            assert said[f"teacher/{name}/divergence"] == pytest.approx(alone, rel=1e-12)
    shares = [said[f"teacher/{name}/token_share"] for name in ASSIGNED]
    assert shares[1] == 0.0 and sum(shares) == pytest.approx(1.0)  # b's sample with tokens has no teacher


def test_a_lesson_without_samples_changes_no_name_of_a_metric():
    """verl lines up what the micro-batches of a batch report."""
    batch, teacher = _batch(), (_tensor(N, H, seed=4), _tensor(V, H, seed=5))
    kinds = {
        "a": Objective((Branch("forward_kl", {"entry_clip": 0.1}),)),
        "b": Objective(),
        "c": Objective(credit="position"),
    }
    marks = {name: torch.ones(N, dtype=torch.bool) for name in kinds}
    hidden, weight = _tensor(N, H, seed=0), _tensor(V, H, seed=1)
    full = _lessons(kinds, dict.fromkeys(ASSIGNED, teacher))
    everyone = list(range(len(LENGTHS)))
    for chosen in range(3):
        rows = [dataclasses.replace(each, samples=[], teacher=None) for each in full]
        rows[chosen] = dataclasses.replace(full[chosen], samples=everyone, teacher=Side(*teacher))
        sums = kinds["a"].sums(batch, taught(batch, hidden, weight, rows), marks)
        assert sums.keys() == kinds["a"].sums(batch, taught(batch, hidden, weight, full), marks).keys()


def test_several_teachers_need_no_gradient_of_the_head_more_than_one():
    """The vocabulary projection's gradient is the largest tensor of an update; lessons add to the same one."""
    batch, teacher = _batch(), (_tensor(N, H, seed=4), _tensor(V, H, seed=5))
    lessons = _lessons(dict.fromkeys(ASSIGNED, Objective()), dict.fromkeys(ASSIGNED, teacher))
    hidden, weight = _tensor(N, H, seed=0).requires_grad_(), _tensor(V, H, seed=1).requires_grad_()
    made = []

    class Zeros(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.zeros_like and result.shape == (V, H):
                made.append(result)
            return result

    with Zeros():
        taught(batch, hidden, weight, lessons).loss.backward()
    assert len(made) == 1 and weight.grad.abs().max() > 0


def test_a_sample_in_no_lesson_is_named():
    batch, teacher = _batch(), (_tensor(N, H, seed=4), _tensor(V, H, seed=5))
    lessons = _lessons(dict.fromkeys(ASSIGNED, Objective()), dict.fromkeys(ASSIGNED, teacher))[:2]
    with pytest.raises(ValueError, match="must be in one lesson"):
        taught(batch, _tensor(N, H, seed=0), _tensor(V, H, seed=1), lessons)
