# SPDX-License-Identifier: Apache-2.0
"""What the situations are tried on: an engine of one rank in this process, a real queue, a run that starts nothing."""

import os

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

import shutil
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState

from opd_ext import plugin
from opd_ext.tinymath.shipped import FOLDER
from tests.stack.engine_harness import Rank
from tests.stack.engine_inputs import save_models
from tests.unit.bridge.contract.conftest import _composed, _queue, config, model, queue  # noqa: F401
from tests.unit.conftest import presets_composed_once  # noqa: F401
from tests.unit.preflight.conftest import _right, start, world  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def environment_left_alone():
    """verl's workers write their rank into this process's environment; a Trainer of a later test would believe it."""
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def rank(tmp_path_factory):
    """Engines of one rank, in this process; its folder has the models of the harness, and the package's as ``base``."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    shutil.copytree(FOLDER / "base", folder / "base")
    plugin.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for several
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with mock.patch.dict(os.environ, place):
        yield Rank(folder)
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)
