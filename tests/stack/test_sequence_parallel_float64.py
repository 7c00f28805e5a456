# SPDX-License-Identifier: Apache-2.0
"""Ranks that share sequences compute what one rank does, to the last digits of float64: every method, and LoRA.

In float32 (test_sequence_parallel.py) two orders of the same sum hide whatever is smaller than 1e-6. Here models,
passes, hidden states that travel, losses and gradients are float64, through verl's engine, FSDP2 and gloo.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch

from opd_ext.teacher.kinds import Base, External, Frozen, Live, Periodic
from tests.stack import engine_cases, test_sequence_parallel
from tests.stack.engine_cases import METHODS, MIXED, SAMPLES
from tests.stack.engine_harness import Rank, run_ranks
from tests.stack.engine_inputs import EngineSpec, Update, save_models
from tests.stack.test_adapter_teachers import Hybrid, gradients
from tests.stack.test_old_policy import UPDATES as OLD_POLICY
from tests.stack.test_sequence_parallel import CASES, NAMES, PRESETS, SPLIT, preset, with_rows
from tests.stack.wide_floats import allow_float64

# Of the loss, and of each gradient relative to its largest entry; 16 digits, of which sums over 400 positions, ranks
# and micro-batches lose one. Measured: 3.2e-15 at most, of four ranks that take eight sequences one by one, and of
# pairs. A number that is cut to float32 on its way between ranks shows at 1e-8; a row that is dealt wrongly at 1e-2.
EXACT = 1e-12
ENTROPIES = 1e-6  # nats of unit scale: bridge/old_policy.py reads whole logits as float32, for metrics alone
RANK = 4  # of the adapters
LORA = {
    "an adapter that moves": Update(SAMPLES),
    "beside a policy": METHODS["mixed"],
    "spans": METHODS["spans"],
    "checkpointed": Update(SAMPLES, gradient_checkpointing=True),
    "one by one": Update(SAMPLES, rows=1),
    "the base": Update(SAMPLES, kind=Base()),
    "the student itself": Update(SAMPLES, kind=Live()),
    "a second model": Update(SAMPLES, kind=Frozen()),
    "several": Update(engine_cases.CUT, several=MIXED),
    "a policy alone": dataclasses.replace(OLD_POLICY["verl's own"], old="update"),
}


def job(cases: dict[str, Update], rank: Rank) -> dict:
    """All updates; of four ranks also some of two pairs, which share and split the batch."""
    allow_float64()
    found = {"shared": {name: with_rows(rank, widened(update)) for name, update in cases.items()}}
    found["lora"] = {name: with_adapters(rank, update) for name, update in LORA.items()}
    if rank.world_size == 4:
        pairs = Rank(rank.folder, sequence_parallel=2)
        found["pairs"] = {name: pairs.gradients(widened(cases[name])) for name in SPLIT}
        found["lora of pairs"] = {name: with_adapters(pairs, update) for name, update in LORA.items()}
    return found


def widened(update: Update) -> Update:
    return dataclasses.replace(update, param_dtype="fp64")


def with_adapters(rank: Rank, update: Update) -> dict:
    """An update of a student whose adapter has moved: while B is 0, as at the start, A has no gradient."""
    from opd_ext.bridge.teachers import Tutor

    update = dataclasses.replace(widened(update), lora_rank=RANK)
    hybrid = Hybrid(rank.worker(update.student)).disturb()

    def second(name: str):
        engine = rank.worker(EngineSpec(name, forward_only=True, param_dtype="fp64")).engine
        engine.engine_config.infer_max_token_len_per_gpu = update.teacher_budget // rank.sequence_parallel
        return engine

    own = {Base: None, Live: None, Frozen: "untied_teacher"}.get(type(update.kind), hybrid.teacher)
    own = second(own) if isinstance(own, str) else own
    if not update.several:
        return gradients(rank, update, Tutor(update.kind or Periodic(), own, update.objective))
    (_, past, a), (_, wide, b), (_, live, c) = update.several
    return gradients(
        rank,
        update,
        Tutor(Periodic(), hybrid.teacher, past, "past", a),
        Tutor(External("wide"), second("wide"), wide, "wide", b),
        Tutor(Live(), None, live, "live", c),
    )


# ---------------------------------------------------------------------- what they found


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[int], list[dict]]:
    """What every one of so many ranks found, all of which share."""
    folder = tmp_path_factory.mktemp("float64")
    save_models(folder, heads=4, key_heads=2)
    cases = CASES | {f"preset: {method}": preset(method) for method in PRESETS}

    @functools.cache
    def found(ranks: int) -> list[dict]:
        return run_ranks(ranks, folder, functools.partial(job, cases), sequence_parallel=ranks)

    return found


def equal(actual: dict, expected: dict, distance: Callable, pair: int | None = None) -> None:
    """Loss, gradients, metrics, and what the update says of its rows: of a ``pair`` those of its half of the batch."""
    assert {grad.dtype for grad in expected["grads"].values()} == {torch.float64}
    assert distance(actual, expected) < EXACT
    assert actual["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        # Means of values of unit scale.
        assert math.isclose(actual["metrics"][name], value, rel_tol=EXACT, abs_tol=EXACT), name
    for field, rows in expected["said"].items():
        own = rows if pair is None else rows[pair * len(rows) // 2 : (pair + 1) * len(rows) // 2]
        for a, b in zip(actual["said"][field], own, strict=True):
            # The last place of a row predicts whatever lies behind it in the pack.
            assert (a - b)[:-1].abs().max() < (ENTROPIES if field == "entropy" else EXACT), field


pytestmark = pytest.mark.slow  # 77 updates in processes of 1, 2 and 4
of_ranks = pytest.mark.parametrize("ranks", [2, 4])
# verl's own updates, without a teacher: each rank projects its stretch, and our head has no row.
VERLS = {name for name, update in CASES.items() if update.alone} | {"preset: grpo", "preset: cispo"}


@of_ranks
@pytest.mark.parametrize("name", NAMES)
def test_ranks_that_share_make_the_update_of_one(run, ranks, name):
    (one,) = run(1)
    for rank in run(ranks):
        equal(rank["shared"][name], one["shared"][name], test_sequence_parallel.distance)


@pytest.mark.parametrize("name", SPLIT)
def test_pairs_that_share_and_split_the_batch_make_the_update_of_one(run, name):
    """The official reduction is a mean over micro-batches of two, which are the same four whoever has them."""
    (one,) = run(1)
    for i, rank in enumerate(run(4)):
        equal(rank["pairs"][name], one["shared"][name], test_sequence_parallel.distance, pair=i // 2)


@of_ranks
@pytest.mark.parametrize("name", [name for name in NAMES if name not in VERLS])
def test_every_method_shares_the_work_of_the_head(run, ranks, name):
    """Rows of the student, and of the teacher where it has hidden states: all of them, once, and evenly."""
    whole = torch.tensor(run(1)[0]["shared"][name]["rows"])
    each = torch.tensor([rank["shared"][name]["rows"] for rank in run(ranks)])
    assert whole[0] > 0 and torch.equal(each.sum(0), whole)
    # Responses are dealt to a row, and of spans whatever is marked in each part: 0.75 of an even share at the least.
    assert (each >= 0.7 * whole / ranks).all()


# ---------------------------------------------------------------------- LoRA


def all_learn(adapter: dict) -> None:
    """A and B of seven matrices in each of two layers; ``engine_cases.distance`` asks for a gradient of each."""
    assert len(adapter["grads"]) == 2 * 7 * 2 and all("lora_" in name for name in adapter["grads"])


@of_ranks
@pytest.mark.parametrize("name", LORA)
def test_ranks_that_share_make_an_adapter_s_update_of_one(run, ranks, name):
    expected = run(1)[0]["lora"][name]
    all_learn(expected)
    for rank in run(ranks):
        equal(rank["lora"][name], expected, engine_cases.distance)


@pytest.mark.parametrize("name", LORA)
def test_pairs_make_an_adapter_s_update_of_one(run, name):
    expected = run(1)[0]["lora"][name]
    for i, rank in enumerate(run(4)):
        equal(rank["lora of pairs"][name], expected, engine_cases.distance, pair=i // 2)


def test_whose_weights_teach_an_adapter_makes_a_difference(run):
    losses = [run(1)[0]["lora"][name]["loss"] for name in ("an adapter that moves", "the base", "the student itself")]
    assert min(abs(a - b) for a, b in zip(losses, losses[1:] + losses[:1], strict=True)) > 1e-3
