# SPDX-License-Identifier: Apache-2.0
"""What verl's own PPO needs in order to run without an accelerator, and nothing of our trainer, worker or engine.

verl imports this module in each of its workers (``actor_rollout_ref.model.external_lib``). Run as a program, it is
``verl.trainer.main_ppo`` on a configuration composed like ours:

    python -m tests.stack.stock_cpu OVERRIDES...
"""

import os
import sys

from omegaconf import open_dict


def prepare_worker() -> None:
    """A gloo group, which verl would ask for by a name that torch refuses, and verl's engine under the name `cpu`."""
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from opd_ext.bridge.cpu_platform import init_process_group

    init_process_group()
    EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(FSDPEngineWithLMHead)


def main() -> None:
    from opd_ext import train

    config = train.compose_config(sys.argv[1:])
    train.prepare_environment(config, train.checked(config))
    train.fork_workers(config)
    with open_dict(config):
        del config.ray_kwargs.ray_init.runtime_env.env_vars["OPD_RUN"]  # verl's worker keeps verl's name of the socket
    del os.environ["OPD_RUN"]
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

    config.trainer.v1.trainer_mode = "sync"
    config.actor_rollout_ref.model.external_lib = "tests.stack.stock_cpu"
    run_ppo(config, TaskRunnerV1)


if __name__ == "__main__":
    main()
elif "MASTER_ADDR" in os.environ:  # a member of the trainer's process group, not a server that reads the same config
    prepare_worker()
