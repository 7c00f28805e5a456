# SPDX-License-Identifier: Apache-2.0
"""The best checkpoint outlives `max_actor_ckpt_to_keep`, and a collapsed run ends (lasgroup/SDPO#25)."""

import json

import pytest

from opd_ext.bridge import checkpoint
from opd_ext.checkpoints import best


def _recorded(folder, accuracies):
    lines = [{"step": step, "phase": "val", "val/accuracy": share} for step, share in accuracies.items()]
    lines.insert(1, {"step": 1, "phase": "train", "rollout/accuracy": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_validations_are_read_from_what_the_run_recorded(tmp_path):
    assert best.validations(tmp_path) == {}
    _recorded(tmp_path, {0: 0.5, 20: 0.75, 40: 0.25})
    assert best.validations(tmp_path) == {0: 0.5, 20: 0.75, 40: 0.25}
    assert best.best_step(best.validations(tmp_path)) == 20
    assert best.best_step({20: 0.5, 40: 0.5}) == 40 and best.best_step({}) is None


def test_the_monitor_is_compared_with_itself_and_never_with_the_full_protocol(tmp_path):
    """Its problems are other ones in sum, so the better of a monitor and a full validation would be chance."""
    lines = [
        *({"step": step, "phase": "monitor", "monitor/accuracy": share} for step, share in ((0, 0.5), (20, 0.6))),
        *({"step": step, "phase": "val", "val/accuracy": share} for step, share in ((0, 0.9), (40, 0.8))),
        {"step": 20, "phase": "sets", "val/aime24/accuracy": 0.1},
        {"step": 40, "phase": "monitor", "monitor/accuracy": 0.4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert best.validations(tmp_path) == {0: 0.5, 20: 0.6, 40: 0.4}
    assert best.best_step(best.validations(tmp_path)) == 20


def test_the_best_checkpoint_is_kept_beside_the_last_ones(tmp_path):
    for step in (10, 20, 30, 40, 50):
        folder = checkpoint.begin(tmp_path, step)
        checkpoint.commit(folder, tmp_path, step, keep=2, best=20)
    assert checkpoint.steps(tmp_path) == [20, 40, 50]
    checkpoint.commit(checkpoint.begin(tmp_path, 60), tmp_path, 60, keep=2, best=50)  # a better one came
    assert checkpoint.steps(tmp_path) == [50, 60]


@pytest.mark.parametrize(
    ("accuracies", "problems", "ends"),
    [
        ({0: 0.8}, 256, False),  # nothing to compare with
        ({0: 0.8, 20: 0.5}, 256, False),  # more than half is left
        ({0: 0.8, 20: 0.3}, 256, True),
        ({0: 0.8, 20: 0.0}, 256, True),
        ({0: 0.0, 20: 0.0}, 256, False),
        ({0: 0.0, 20: 0.8, 40: 0.9, 60: 0.1}, 256, True),  # against the best, not the first
        ({20: 0.9, 40: 0.1, 60: 0.8}, 256, False),  # it came back
        ({0: 0.75, 20: 0.25}, 8, False),  # 8 problems: two standard errors apart
    ],
)
def test_a_run_ends_if_accuracy_fell_below_half_of_the_best_and_not_by_chance(accuracies, problems, ends):
    said = best.collapse(accuracies, problems, 0.5)
    assert (said is not None) == ends
    assert best.collapse(accuracies, problems, None) is None
    if said:
        assert f"at step {max(accuracies)}" in said and "opd.stop_on_collapse=null" in said
