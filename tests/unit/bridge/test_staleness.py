# SPDX-License-Identifier: Apache-2.0
"""Every rollout is of one version of the policy, and at most one version old, or the run ends."""

import pytest

from opd_ext.bridge import staleness
from opd_ext.errors import RunError


def rows(*versions):
    """A row per pair of versions: of its first token and of its last one."""
    return [{"min_global_steps": first, "max_global_steps": last} for first, last in versions]


def test_the_lag_is_counted_from_the_policy_that_the_step_updates():
    found = staleness.measure(rows((3, 3), (3, 3), (4, 4)), step=5)
    assert found == {
        "policy/version": pytest.approx(10 / 3),
        "policy/lag": pytest.approx(2 / 3),
        "policy/lag_max": 1.0,
        "policy/mixed": 0.0,
    }


def test_a_server_that_missed_a_sync_ends_the_run():
    with pytest.raises(RunError, match="by versions 2 to 4 of the policy, 0% of them by several"):
        staleness.measure(rows((4, 4), (2, 2)), step=5)


def test_a_rollout_of_two_policies_ends_the_run():
    with pytest.raises(RunError, match="50% of them by several"):
        staleness.measure(rows((4, 4), (3, 4)), step=5)


def test_a_rollout_that_no_server_sampled_has_no_version():
    nobody = {"min_global_steps": None, "max_global_steps": None}
    assert staleness.measure([nobody], step=5) == {}
    assert staleness.measure([nobody, *rows((4, 4))], step=5)["policy/lag"] == 0.0
    assert staleness.is_current([nobody, *rows((4, 4))], step=5)
    assert not staleness.is_current(rows((4, 4), (3, 3)), step=5)
