# SPDX-License-Identifier: Apache-2.0
"""The process in which the trainer lives: verl's task runner, with our trainer registered and our files in place."""

import importlib
import os
import platform
import sys
import traceback
from pathlib import Path

import ray
from omegaconf import DictConfig
from ray.exceptions import RayError
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

from opd_ext.bridge.cluster_head import head_watched
from opd_ext.bridge.first_cause import first_cause, session_roots
from opd_ext.config import schema
from opd_ext.errors import RunError

# verl decorates its runner with `ray.remote`; the class itself is what can be subclassed.
_Runner = TaskRunnerV1.__ray_metadata__.modified_class


@ray.remote
class OPDTaskRunner(_Runner):
    """Runs the trainers of ours, by their names in ``config.trainer.v1.trainer_mode``."""

    def run(self, config: DictConfig) -> None:
        importlib.import_module("opd_ext.bridge.one_step_off")  # registers our trainers in this process
        schema.load(config.opd).import_external_libs()
        check_folder(Path(config.opd.run_dir))
        os.environ["TENSORBOARD_DIR"] = str(Path(config.opd.run_dir) / "tensorboard")
        super().run(config)


def check_folder(run_dir: Path) -> None:
    """What the driver has written is here, too: on a cluster the trainer may be on another node.

    Raises:
        RunError: one sentence.
    """
    if not (run_dir / "config.yaml").is_file():
        raise RunError(
            f"{run_dir} is not on node {platform.node()}, where Ray has put the trainer: set opd.run_dir or OPD_RUNS "
            "to a file system that all nodes share."
        )


def train(config: DictConfig) -> None:
    """Train to the end, on the Ray that is running or on one that verl starts.

    Raises:
        RunError: it ended before; the whole traceback goes to standard output, which `opd train` keeps.
    """
    try:
        with head_watched():
            run_ppo(config, OPDTaskRunner)
    except RayError as error:
        traceback.print_exc(file=sys.stdout)
        raise RunError(first_cause(error, session_roots(config.ray_kwargs.ray_init.get("_temp_dir")))) from error
