# SPDX-License-Identifier: Apache-2.0
"""Whose weights teach: when they move, which student they stand for, what they say."""

import pytest
import torch

from opd_ext.errors import ConfigError
from opd_ext.teacher import TeacherConfig, TeacherOutput, teacher_names, teacher_version
from opd_ext.teacher.kinds import NoTeacher, Periodic, TrustRegion


def _versions(kind, steps, updates=1):
    """The student version that teaches in each step, refreshed as the trainer does it."""
    refreshed, seen = 0, []
    for step in range(1, steps + 1):
        seen.append(kind.version(step, refreshed))
        if kind.share(step, updates) > 0:
            refreshed = step
    return seen


@pytest.mark.parametrize("interval", [0, 1, 2, 50])
def test_a_periodic_teacher_runs_by_the_written_law(interval):
    """CRISP's released timing, :func:`teacher_version`, is what the shares of the kind amount to."""
    assert _versions(Periodic(interval), 120) == [teacher_version(step, interval) for step in range(1, 121)]


def test_the_other_kinds_stand_for_what_they_say():
    kinds = {
        name: TeacherConfig(weights=name, path="m" if name == "external" else None).kind for name in teacher_names()
    }
    assert _versions(kinds["frozen"], 3) == _versions(kinds["external"], 3) == _versions(kinds["base"], 3) == [0, 0, 0]
    assert _versions(kinds["live"], 3) == _versions(kinds["trust_region"], 3) == [0, 1, 2]
    assert _versions(kinds["ema"], 3) == [0, 1, 2]
    assert kinds["ema"].share(7, updates=0) == 0, "a batch whose gradients were all skipped moves nothing"
    assert kinds["ema"].share(7, updates=3) == 0.05, "per batch of rollouts, not per optimiser step"
    assert {name for name, kind in kinds.items() if not kind.own_weights} == {"live", "base"}
    moving = {name for name, kind in kinds.items() if kind.moves and type(kind).__module__.startswith("opd_ext.")}
    assert moving == {"periodic", "ema"}, "beside those that examples have registered in this process"


class _Model:
    """An engine with one fixed answer."""

    def __init__(self, rows, head):
        self.rows, self.head = rows, head

    def teacher_output(self, data, adapter=True):
        return TeacherOutput(self.rows, self.head)


def test_a_trust_region_interpolates_logits_through_one_head():
    """SDPO, appendix B.2: (1 - a) z_0 + a z, whatever the two heads are."""
    torch.manual_seed(0)
    first, last = (_Model([torch.randn(3, 4), torch.randn(2, 4)], torch.randn(7, 4)) for _ in range(2))
    rows, head = TrustRegion(0.3).output(last, first, None)
    for found, h0, h in zip(rows, first.rows, last.rows, strict=True):
        expected = 0.7 * h0 @ first.head.T + 0.3 * h @ last.head.T
        torch.testing.assert_close(found @ head.T, expected)


def test_no_teacher_asks_for_nothing():
    absent = TeacherConfig(weights="none")
    assert not absent.present and isinstance(absent.kind, NoTeacher)
    assert not absent.kind.own_weights and absent.kind.share(50, 1) == 0
    assert "none" not in teacher_names(), "nobody chooses it by name: a method leaves its teacher out"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (TeacherConfig("mine"), "opd.teacher.weights=mine does not exist; choose one of: base, ema, external"),
        (TeacherConfig("ema", rate=0.0), r"opd.teacher.rate=0.0 must be in \(0, 1\]: the share of the student"),
        (TeacherConfig("trust_region", rate=1.5), r"opd.teacher.rate=1.5 must be in \(0, 1\]"),
        (TeacherConfig("periodic", interval=-1), "opd.teacher.interval=-1 must be zero or positive"),
        (TeacherConfig("external"), "opd.teacher.path belongs to weights=external"),
        (TeacherConfig("frozen", path="m"), "opd.teacher.path belongs to weights=external"),
        (TeacherConfig("frozen", args={"start": 3}), "opd.teacher.start does not exist for weights=frozen"),
        (TeacherConfig("frozen", backend="cloud"), "opd.teacher.backend=cloud does not exist"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config.check()


def test_a_left_over_option_of_another_kind_does_no_harm():
    """Documented: `opd.teacher.weights=frozen` on a preset whose interval stays."""
    config = TeacherConfig("frozen", interval=50)
    config.check()
    assert str(config) == "frozen"
