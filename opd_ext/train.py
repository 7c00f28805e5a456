# SPDX-License-Identifier: Apache-2.0
"""``opd train`` and ``python -m opd_ext.train``: compose the configuration, check it, run verl with our trainer.

opd train method=crisp scale=cpu_tiny trainer.total_training_steps=10
opd train method=crisp scale=node_8xh200 --dry-run     what would run, without a GPU
opd train --cfg                                        the composed configuration
opd train --config-dir DIR method=mine                 a preset of yours: DIR/method/mine.yaml
"""

import argparse
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from uuid import uuid4

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from opd_ext.alarms.rollback import settle
from opd_ext.bridge.known_keys import check_added_keys, check_types
from opd_ext.bridge.warm_python import warm_python
from opd_ext.checkpoints.layout import CheckpointError, export_command
from opd_ext.config import checks, schema
from opd_ext.config.compose import compose_config
from opd_ext.config.devices import pools, wanted
from opd_ext.config.overrides import from_words
from opd_ext.errors import ConfigError, RunError
from opd_ext.files import write_whole
from opd_ext.launch import PATH_VARIABLE
from opd_ext.preflight import Findings, look, preflight
from opd_ext.progress import STARTED
from opd_ext.run_state import running


def prepare_environment(config: DictConfig, opd: schema.OPDConfig) -> None:
    """Set what every process of the run must find in its environment, before verl is imported here.

    On the CPU, Ray is told of pretend accelerators, as many as the run's parts ask for: their numbers must be visible,
    and each trainer rank gets its share of the cores.
    """
    runtime_env = config.ray_kwargs.ray_init.runtime_env
    variables = {name: str(value) for name, value in (runtime_env.get("env_vars") or {}).items()}
    variables[STARTED] = str(time.time())
    if config.opd.device == "cpu":
        ranks = config.trainer.n_gpus_per_node
        devices = config.ray_kwargs.ray_init.get("num_gpus") or wanted(pools(opd, config))
        with open_dict(config):
            config.ray_kwargs.ray_init.num_gpus = devices
        variables.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(devices))))
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // ranks))
        variables.setdefault("OMP_NUM_THREADS", threads)
        variables["OPD_RUN"] = uuid4().hex[:12]  # see opd_ext.bridge.cpu_platform.own_socket
    if path := os.environ.get("PYTHONPATH"):  # modules of the user's; a cluster's workers would not look there
        variables.setdefault("PYTHONPATH", path)
    ray_init = config.ray_kwargs.ray_init
    with open_dict(config):
        runtime_env.env_vars = variables
        if os.environ.get("RAY_ADDRESS"):  # a Ray job or a running cluster, whose resources are what they are
            ray_init.num_cpus = ray_init.num_gpus = ray_init.include_dashboard = None
    os.environ.update(variables)


def fork_workers(config: DictConfig) -> None:
    """Have Ray fork this run's workers from the warm Python that the environment names, if it names one."""
    if path := os.environ.get(PATH_VARIABLE):
        runtime_env = config.ray_kwargs.ray_init.runtime_env
        with open_dict(config):
            runtime_env.py_executable = path
            runtime_env.env_vars[PATH_VARIABLE] = path


@contextmanager
def _named() -> Iterator[None]:
    """A key that was taken out is a ConfigError, too."""
    try:
        yield
    except (ConfigAttributeError, ConfigKeyError) as error:
        raise ConfigError(f"{error.full_key} is needed and not there: leave it in, or set it.") from None


def checked(config: DictConfig) -> schema.OPDConfig:
    """Our part of a configuration, after all checks that need nothing but the configuration.

    Raises:
        ConfigError: one sentence.
    """
    with _named():
        check_types(config)
        return checks.check(config)


def validate(config: DictConfig) -> schema.OPDConfig:
    """Our schema, then verl's own validation and dataclasses.

    Raises:
        ConfigError: one sentence, whoever found the fault.
    """
    opd = checked(config)
    check_added_keys(config)
    _validate_verl(config)
    return opd


def _validate_verl(config: DictConfig) -> None:
    # verl would only log at DEBUG that its plugin failed to load, and then not know the platform.
    from opd_ext import plugin

    plugin.register()
    from opd_ext.bridge.validation import validate_verl

    validate_verl(config)


def _examine(config: DictConfig, opd: schema.OPDConfig, starting: bool) -> Findings:
    """Every other check; verl takes seconds to import, so that what can be refused without it is refused before.

    Raises:
        ConfigError: one sentence.
    """
    findings = Findings()
    with _named():
        data = look(config, opd, starting, findings)
        with nullcontext() if starting else redirect_stdout(StringIO()):  # verl says of each that it is fine
            _validate_verl(config)
        preflight(config, opd, data, starting, findings)
    return findings


class _Follow:
    """Copies what is appended to a file to standard output while the block runs."""

    def __init__(self, path: Path):
        self._path, self._done, self._out = path, threading.Event(), sys.stdout
        self._thread = threading.Thread(target=self._copy, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _copy(self) -> None:
        with self._path.open() as file:
            file.seek(0, os.SEEK_END)
            while True:
                finished = self._done.is_set()
                if text := file.read():
                    print(text, end="", flush=True, file=self._out)
                if finished:
                    return
                time.sleep(0.1)


@contextmanager
def _ray_of_this_run() -> Iterator[None]:
    """Leave the Ray that is started in the block, and only that, so that its processes end before what they use."""
    import ray

    was_there = ray.is_initialized()
    try:
        yield
    finally:
        if not was_there:
            ray.shutdown()


def run(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Path:
    """Train as ``opd train OVERRIDES`` does, from Python, and return the run folder.

    The environment variables of the run stay set in this process, since verl settles its platform at import: one
    process trains on the CPU or on accelerators, not on both. What Ray and vLLM start imports the calling script anew,
    so keep the call below ``if __name__ == "__main__":``.

    Args:
        overrides: in Hydra's grammar, e.g. ``["method=crisp", "scale=cpu_tiny", "opd.seed=2"]``.
        config_dirs: further folders with presets (``method/NAME.yaml``).

    Raises:
        ConfigError: one sentence, before anything is started.
        RunError: the run ended early, and why; ``driver.log`` in the run folder has the whole traceback.
    """
    config = compose_config(list(overrides), config_dirs)
    opd = checked(config)
    prepare_environment(config, opd)
    with warm_python(config.opd.warm_python, {}):
        findings = _examine(config, opd, starting=True)
        for sentence in findings.notes:
            print(f"note: {sentence}", flush=True)
        _train(config, opd)
    return Path(opd.run_dir)


def plan(overrides: Sequence[str], config_dirs: Sequence[Path] = (), as_json: bool = False) -> None:
    """Check the configuration as :func:`run` does, and print what would run, and what it needs.

    Raises:
        ConfigError: one sentence.
    """
    from opd_ext import plan as page

    config = compose_config(list(overrides), config_dirs)
    opd = checked(config)
    prepare_environment(config, opd)
    findings = _examine(config, opd, starting=False)
    if as_json:
        print(json.dumps(page.as_json(config, opd), indent=2))
    else:
        page.print_plan(config, opd, findings.facts, findings.notes)


def _train(config: DictConfig, opd: schema.OPDConfig) -> None:
    """Train, then print and write the report of the run folder."""
    from opd_ext.report.after import after_run

    def write_report() -> None:
        from opd_ext.report.run_report import write_report

        write_report(run_dir)

    run_dir = Path(opd.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with running(run_dir):
        _go_back(config, opd)  # of a run that was killed on its way
        _train_alone(config, opd, run_dir)
        while _go_back(config, opd):
            _train_alone(config, opd, run_dir)
    if len(list((run_dir / "generations").glob("val_*.jsonl"))) > 1:  # before and after
        after_run(write_report, f"opd report {shlex.quote(str(run_dir))}")
    elif command := export_command(run_dir):
        print(f"Model as a Hugging Face folder: {command}")


def _go_back(config: DictConfig, opd: schema.OPDConfig) -> bool:
    """Do what an alarm has asked for; whether the run is to go on from an earlier checkpoint.

    Raises:
        RunError: that checkpoint is gone.
    """
    try:
        step = settle(Path(opd.run_dir), Path(config.trainer.default_local_dir))
    except CheckpointError as error:
        raise RunError(str(error)) from None
    if step is None:
        return False
    print(f"going back to step {step}", flush=True)
    with open_dict(config):
        config.trainer.resume_mode = "auto"
    prepare_environment(config, opd)  # the name of its sockets, and its clock, are those of another start
    return True


def _train_alone(config: DictConfig, opd: schema.OPDConfig, run_dir: Path) -> None:
    """Train in a run folder that is this process's alone."""
    from opd_ext.bridge.runner import train

    write_whole(run_dir / "config.yaml", OmegaConf.to_yaml(config))
    console = run_dir / "console.log"
    console.touch()
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    print(f"run folder: {run_dir}", flush=True)
    print(f"starting Ray, {ranks} trainer rank(s) and vLLM on {opd.device}", flush=True)
    fork_workers(config)
    with open_dict(config):
        config.ray_kwargs.ray_init.log_to_driver = opd.console == "full"
    # verl prints its Ray settings as one long line; `full` shows it.
    verl_output = nullcontext() if opd.console == "full" else redirect_stdout((run_dir / "driver.log").open("w"))
    with _Follow(console), verl_output, _ray_of_this_run():
        train(config)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status (2: refused configuration)."""
    parser = argparse.ArgumentParser(
        prog="opd train",
        usage="opd train [METHOD] [KEY=VALUE ...] [--dry-run] [--config-dir DIR] [--cfg]",
        description=__doc__.split("\n")[0],
        epilog="e.g. opd train method=crisp scale=cpu_tiny opd.seed=2",
        allow_abbrev=False,
    )
    parser.add_argument("--dry-run", action="store_true", help="check the configuration and print the plan")
    parser.add_argument(
        "--config-dir", action="append", default=[], metavar="DIR", help="a folder with presets (method/NAME.yaml)"
    )
    parser.add_argument("--cfg", action="store_true", help="print the composed configuration and stop")
    args, words = parser.parse_known_args(argv)
    try:
        overrides = from_words(words, args.config_dir)
        if args.cfg:
            print(OmegaConf.to_yaml(compose_config(overrides, args.config_dir)))
        elif args.dry_run:
            plan(overrides, args.config_dir)
        else:
            run(overrides, args.config_dir)
    except ConfigError as error:
        print(f"opd train: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"opd train: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
