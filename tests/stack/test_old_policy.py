# SPDX-License-Identifier: Apache-2.0
"""Old log-probs without a pass of their own: the real engine both ways, with verl's loss and with ours."""

import dataclasses

import pytest
import torch

from opd_ext.divergence.config import Branch
from opd_ext.divergence.sampled import Surrogate
from opd_ext.objective.objective import Objective
from opd_ext.policy import Shaping
from tests.stack.engine_cases import REORDERED, SPLITS, distance
from tests.stack.engine_harness import Rank, run_ranks
from tests.stack.engine_inputs import VOCABULARY, Update, make_samples, save_models, to_batch

CHUNK, HIDDEN = 4, 32
SAMPLES = make_samples([7, 12, 1, 9, 5, 15, 3, 8])
SOME = [dataclasses.replace(s, taught=i % 3 != 2) for i, s in enumerate(SAMPLES)]
GATED = Objective(
    (Branch("forward_kl", {}, 1),), credit="spans", shapings=(Shaping("complement"),), active_spans=frozenset({1})
)
SHAPED = Objective(surrogate=Surrogate(), shapings=(Shaping("teacher_ratio", {"bound": 0.2}),), temperature=0.6)
UPDATES = {
    "verl's own": Update(SAMPLES, policy=True, alone=True),
    "verl's own, corrected": Update(SAMPLES, policy=True, alone=True, sampler_cap=1.1),
    "verl's own, warm": Update(SAMPLES, policy=True, alone=True, rollout_temperature=0.6),
    "verl's own, checkpointed": Update(SAMPLES, policy=True, alone=True, gradient_checkpointing=True),
    "beside a divergence": Update(SOME, policy=True, distillation_weight=0.1),
    "beside a divergence, corrected": Update(SOME, policy=True, distillation_weight=0.1, sampler_cap=1.1),
    "gated by spans": Update(SOME, objective=GATED, policy=True, distillation_weight=0.5, gate=0.3),
    "shaped by the teacher": Update(SOME, objective=SHAPED, policy=True, rollout_temperature=0.6),
}
TIGHT = {"budget": 50, "teacher_budget": 50}  # of the update and of the pass, which then pack alike
CASES = UPDATES | {f"{name}, tight": dataclasses.replace(u, **TIGHT) for name, u in UPDATES.items()}
# Packed otherwise, sums of fp32 have another order: a pass is then as close as another split is (REORDERED).
OTHERWISE = {f"{name}, packed otherwise": dataclasses.replace(u, **SPLITS["tight"]) for name, u in UPDATES.items()}
SCORED = dataclasses.replace(UPDATES["beside a divergence"], objective=Objective(chunk_size=CHUNK))


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Rows of the largest tensor, as wide as the vocabulary, that any operation returns: logits, or parts of them."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor) and not each.is_nested and each.shape[-1:] == (VOCABULARY,):
                turned = each.shape[0] == HIDDEN  # the projection itself
                self.rows = max(self.rows, 0 if turned else each.numel() // VOCABULARY)
        return out


def job(rank: Rank) -> dict:
    both = {
        name: {old: rank.gradients(dataclasses.replace(update, old=old)) for old in ("pass", "update")}
        for name, update in (CASES | OTHERWISE).items()
    }
    return {"updates": both, "pass": score(rank)} if rank.world_size == 1 else {"updates": both}


def score(rank: Rank) -> dict:
    """The pass of a batch with a teacher and of one without, and the largest logits that each had."""
    student, _ = rank._prepared(SCORED)
    found = {}
    for name in ("taught", "alone"):
        batch = to_batch(SAMPLES, temperature=1.0)
        if name == "alone":
            batch = batch.exclude("teacher_input_ids", "has_teacher", "span_label")
        with Largest() as seen:
            found[name] = {key: list(v.unbind()) for key, v in rank.scores(student.engine, batch).items()}
        found[name]["largest"] = seen.rows
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old_policy")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def one(folder) -> dict:
    return run_ranks(1, folder, job)[0]


@pytest.fixture(scope="module")
def two(folder) -> dict:
    return run_ranks(2, folder, job)[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", ["one", pytest.param("two", marks=pytest.mark.slow)])
def test_an_update_that_is_its_own_old_policy_is_the_one_behind_a_pass(request, ranks, name):
    found = request.getfixturevalue(ranks)["updates"][name]
    assert distance(found["update"], found["pass"]) <= 1e-6


@pytest.mark.parametrize("name", OTHERWISE)
def test_packed_otherwise_a_pass_is_as_close_as_another_split(one, name):
    found = one["updates"][name]
    assert distance(found["update"], found["pass"]) <= REORDERED


def _responses(values: list[torch.Tensor], samples=SAMPLES) -> torch.Tensor:
    """Of every row what belongs to response tokens; elsewhere nobody reads."""
    rows = zip(values, samples, strict=True)
    return torch.cat([row[len(s.prompt) - 1 : len(s.prompt + s.response) - 1] for row, s in rows])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("field", ["log_probs", "entropy"])
def test_what_the_update_keeps_is_what_the_pass_would_have_said(one, name, field):
    found = one["updates"][name]
    ours, theirs = (_responses(found[old]["said"][field]) for old in ("update", "pass"))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6) and theirs.abs().max() > 1


def test_a_pass_that_dropped_out_of_step_would_be_seen(one):
    """The comparison is sharp: with the old log-probs of another policy the same update is another one."""
    found = one["updates"]["verl's own"]
    other = one["updates"]["verl's own, warm"]
    assert distance(found["update"], other["pass"]) > 1e-2


def test_the_chunked_pass_says_what_verls_says_and_holds_no_whole_logits(one):
    taught, alone = one["pass"]["taught"], one["pass"]["alone"]
    for field in ("log_probs", "entropy"):
        assert torch.allclose(_responses(taught[field]), _responses(alone[field]), rtol=0, atol=1e-5)
    assert 0 < taught["largest"] <= CHUNK < alone["largest"]
