# SPDX-License-Identifier: Apache-2.0
"""Whatever `opd_ext/bridge` touches of verl, vLLM, Ray and TransferQueue is under a contract."""

import inspect
import re

import pytest

from . import scan, test_contract
from .seams import PACKAGE

COVERED = frozenset().union(*(seam.covers for seam in test_contract.SEAMS))
PINNED = {path for seam in test_contract.SEAMS for path in seam.pins}
# Assignments to objects of ours, which no other library sees.
OURS = {
    *("engine.tutors", "engine.updates"),  # of OPDEngine, from OPDWorker
    "trainer.tested",  # of OPDTrainer, from the self-test
    "trainer.state",  # of OPDTrainer, from a checkpoint
    "engine.alone",  # of OPDEngine, from the self-test
    *(
        "rollout.agent",
        "rollout.calls",
        "rollout.ended",
        "rollout.failures",
        "rollout.ignored",
        "rollout.last",
    ),  # Turns
    *("state.global_step", "state.attempts", "state.rollbacks"),  # of TrainerState
}

files = pytest.mark.parametrize("path", scan.FILES, ids=lambda path: path.stem)


def _told(path, found):
    name = path.relative_to(PACKAGE)
    return f"opd_ext/{name} relies on {sorted(found)}: add a contract to tests/unit/bridge/contract"


@files
def test_every_override_and_inherited_attribute_is_under_contract(path):
    found = scan.members(path).keys() - COVERED
    assert not found, _told(path, found)


@files
def test_every_imported_name_is_under_contract(path):
    found = scan.imports(path) - {re.sub(r"(:\w+)\..*", r"\1", pin) for pin in PINNED}
    assert not found, _told(path, found)


@files
def test_every_assignment_to_another_object_is_under_contract(path):
    found = scan.assignments(path) - COVERED - OURS
    assert not found, _told(path, found)


@files
def test_every_private_name_of_another_object_is_under_contract(path):
    found = scan.private_names(path) - COVERED
    assert not found, _told(path, found)


def test_no_contract_vouches_for_what_is_gone():
    there = set()
    for path in scan.FILES:
        there |= scan.members(path).keys() | scan.assignments(path) | scan.private_names(path)
    assert sorted((COVERED | OURS) - there) == []


def _overrides():
    """Methods of ours in the place of the library's. Constructors are called by us, and attributes take nothing."""
    for path in scan.FILES:
        for node, ours, bases in scan.classes(path):
            for name in [member for member, overrides in scan.members(path).items() if overrides]:
                kind, _, member = name.partition(".")
                if kind == node.name and member != "__init__":
                    theirs = next(vars(base)[member] for base in bases if member in vars(base))
                    if inspect.isfunction(theirs):
                        yield pytest.param(path, vars(ours)[member], theirs, id=name)


@pytest.mark.parametrize("path, ours, theirs", sorted(_overrides(), key=lambda case: case.id))
def test_an_override_takes_what_the_library_passes(path, ours, theirs):
    taken, passed = (inspect.signature(function).parameters for function in (ours, theirs))
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    named = {p.name for p in passed.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {"_ray_trace_ctx"}
    required = {p.name for p in taken.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    where = f"opd_ext/{path.relative_to(PACKAGE)}: {ours.__qualname__}"
    assert anything or named <= set(taken), f"{where} must take {sorted(named - set(taken))} since this version"
    assert required <= set(passed), f"{where} is not passed {sorted(required - set(passed))} any more"
