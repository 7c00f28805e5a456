# SPDX-License-Identifier: Apache-2.0
"""Contracts of how a run is started: verl's task runner and `run_ppo`, and Ray under a warm Python."""

import importlib.util
import multiprocessing.spawn
from unittest.mock import Mock

import ray
import ray.runtime_env
import transfer_queue
from omegaconf import OmegaConf, open_dict
from ray._private import ray_constants
from verl.trainer import main_ppo
from verl.trainer.ppo import v1

from opd_ext.bridge import cluster_head, warm_python

from .seams import says, seam

RUNNER = "verl.trainer.main_ppo:TaskRunnerV1.__ray_metadata__.modified_class"


@seam(
    "bridge/runner.py",
    covers="OPDTaskRunner.run __ray_metadata__",
    pins={f"{RUNNER}.run": "self config", "verl.trainer.main_ppo:TaskRunnerV1": None},
)
def task_runner(config, monkeypatch):
    """``run`` looks the trainer up by ``trainer.v1.trainer_mode``, builds it, and gives it the agent loop."""
    turns, trainer = [], Mock()
    trainer.init.side_effect = lambda: turns.append("init")
    trainer.fit.side_effect = lambda manager: turns.append(f"fit with {manager}")
    kind = Mock(return_value=trainer)
    monkeypatch.setattr(v1, "get_trainer_cls", {"opd": kind}.__getitem__)
    monkeypatch.setattr(transfer_queue, "init", lambda conf: turns.append("queue"))
    monkeypatch.setattr(transfer_queue, "close", lambda: turns.append("close"))
    inside = main_ppo.TaskRunnerV1.__ray_metadata__.modified_class

    class Probe(inside):
        def init_agent_loop_manager(self):
            turns.append("agent loop")
            self.agent_loop_manager = "the manager"

    Probe().run(config)
    assert turns == ["queue", "init", "agent loop", "fit with the manager", "close"]
    kind.assert_called_once_with(config=config)
    assert isinstance(main_ppo.TaskRunnerV1, ray.actor.ActorClass)


@seam("bridge/runner.py", pins={"ray.exceptions:RayError": None})
def errors_of_other_processes():
    """Ray raises a RayError whose ``cause`` is what the process raised, and says of a dead one its id."""
    from ray.exceptions import ActorDiedError, RayError, RayTaskError

    inner = RayTaskError("f", "Traceback ...", KeyError("unit_tests")).as_instanceof_cause()
    assert isinstance(inner, RayError) and isinstance(inner.cause, KeyError)
    assert issubclass(ActorDiedError, RayError) and "died unexpectedly" in str(ActorDiedError())


@seam("bridge/cluster_head.py", pins={"ray:is_initialized": "", "ray:get_runtime_context": ""})
def address_of_the_head():
    """A process that has joined no Ray says so; one that has is told where its head's control store listens.

    That a killed one is noticed while ``ray.get`` waits is a test of the stack (``test_faults.py``, ``head``).
    """
    from ray.runtime_context import RuntimeContext

    assert isinstance(RuntimeContext.gcs_address, property)
    if not ray.is_initialized():
        assert cluster_head._address() is None


@seam("bridge/runner.py", pins={"verl.trainer.main_ppo:run_ppo": "config task_runner_class"})
def run_ppo(config, monkeypatch):
    """``run_ppo`` starts Ray with ``ray_kwargs.ray_init``, our variables over its own, then the runner it is given."""
    with open_dict(config):
        runtime_env = config.ray_kwargs.ray_init.runtime_env
        runtime_env.env_vars["NCCL_DEBUG"], runtime_env.py_executable = "ours", "/warm/python"
        config.ray_kwargs.ray_init.log_to_driver, config.ray_kwargs.ray_init.num_gpus = False, 1
    started, runner = Mock(), Mock()
    monkeypatch.setattr(main_ppo, "ray", Mock(is_initialized=lambda: False, init=started))
    main_ppo.run_ppo(config, runner)
    settings = started.call_args.kwargs
    assert settings["num_gpus"] == 1 and settings["log_to_driver"] is False
    variables = settings["runtime_env"]["env_vars"]
    assert variables["NCCL_DEBUG"] == "ours" and variables["VERL_PLATFORM"] == "cpu"
    assert settings["runtime_env"]["py_executable"] == "/warm/python"
    runner.remote.return_value.run.remote.assert_called_once_with(config)
    assert OmegaConf.is_dict(config)


@seam(
    "bridge/warm_python.py",
    pins={"ray._raylet:Config.initialize": None},
)
def warm_imports():
    """What is preloaded exists, and Ray reads its settings anew by ``Config.initialize``."""
    for name in (*warm_python.PRELOADED, *warm_python.PRELOADED_FOR_A_JOB):
        assert importlib.util.find_spec(name), f"{name} is no module any more"
    assert callable(multiprocessing.spawn.set_executable)


@seam("bridge/warm_python.py", pins={"ray.runtime_env:RuntimeEnv": None})
def worker_python():
    """Ray starts a job's workers with ``runtime_env.py_executable`` and tells them their job by its variables."""
    assert ray.runtime_env.RuntimeEnv(py_executable="/warm/python")["py_executable"] == "/warm/python"
    # Which of them its core reads when it is loaded is compiled; Ray's Python lists what tells its jobs apart.
    assert set(warm_python.JOB) - {"RAY_AUTH_MODE"} <= set(ray_constants.RAY_INTERNAL_FLAGS)


@seam("bridge/finetune.py", pins={"verl.utils.distributed:destroy_global_process_group": ""})
def leaving():
    """The process group is destroyed if there is one."""
    says("verl.utils.distributed:destroy_global_process_group", "if torch.distributed.is_initialized():")
