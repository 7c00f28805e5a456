# SPDX-License-Identifier: Apache-2.0
"""A learning rate that a rollback has lowered stays low: through the schedule, and through a checkpoint."""

import os
from types import SimpleNamespace

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

import pytest
import torch

from opd_ext import plugin


def optimiser():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))


def rates(optimizer, scheduler, count):
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_rate_is_scaled_along_its_schedule_and_in_what_is_saved():
    plugin.register()
    from opd_ext.bridge.worker import OPDWorker

    expected = rates(*optimiser(), 20)
    optimizer, scheduler = optimiser()
    rates(optimizer, scheduler, 4)
    engine = SimpleNamespace(optimizer=optimizer, lr_scheduler=scheduler)
    OPDWorker.scale_lr(SimpleNamespace(actor=SimpleNamespace(engine=engine)), 0.25)
    assert rates(optimizer, scheduler, 4) == pytest.approx([rate / 4 for rate in expected[4:8]])
    resumed, its_scheduler = optimiser()
    resumed.load_state_dict(optimizer.state_dict())
    its_scheduler.load_state_dict(scheduler.state_dict())
    assert rates(resumed, its_scheduler, 12) == pytest.approx([rate / 4 for rate in expected[8:]])
