# SPDX-License-Identifier: Apache-2.0
"""Whose batch is submitted when a run samples one step ahead: that of the next step, and none behind the last."""

import pytest

from opd_ext import plugin

plugin.register()  # which every process of a run has done before it imports verl

from opd_ext.bridge.one_step_off import OneStepOffTrainer, SeparateTrainer  # noqa: E402

STEPS = 4


@pytest.fixture(params=[OneStepOffTrainer, SeparateTrainer])
def trainer(request):
    """A trainer that writes down for which step verl would submit a batch."""
    found = object.__new__(request.param)
    found.total_training_steps, found.submitted = STEPS, []
    found._add_batch_to_generate = lambda: found.submitted.append(found.global_steps)
    found._add_async_warmup_batches = lambda batches: found.submitted.append(found.global_steps)
    warmup = {mode: type("Mode", (), {"num_warmup_batches": 1}) for mode in ("colocate_async", "separate_async")}
    found.config = type("Config", (), {"trainer": type("Trainer", (), {"v1": type("V1", (), warmup)})})
    if request.param is SeparateTrainer:
        found._wait_for_sampleable_and_switch = dict  # the trainer's devices have no servers
    return found


def test_every_step_finds_one_batch_of_its_own(trainer):
    trainer.global_steps = 1
    trainer.on_train_begin()
    for step in range(1, STEPS + 1):
        trainer.global_steps = step
        trainer.prepare_step()
        assert trainer.global_steps == step
    assert trainer.submitted == [1, 2, 3, 4]


def test_a_run_that_has_ended_samples_nothing_when_it_is_started_again(trainer):
    trainer.global_steps = STEPS + 1
    trainer.on_train_begin()
    assert trainer.submitted == []
