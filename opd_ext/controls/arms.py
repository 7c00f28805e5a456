# SPDX-License-Identifier: Apache-2.0
"""Which arms a study of a method has: the method, and every control that changes something about it.

A control is a preset in ``config/control``, composed after everything else. Whether it applies is what the checks of a
configuration say of the two together, so that a control of a user's needs no list here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from opd_ext.config import checks
from opd_ext.config.compose import CONFIG_DIR, compose_config
from opd_ext.errors import ConfigError, did_you_mean
from opd_ext.plan.run import read_run
from opd_ext.plan.timing import times
from opd_ext.report.methods import describe

METHOD = "method"
"""The arm without a control."""

ALL = "all"
_OURS = ("control", "opd.control", "opd.seed", "opd.run_dir", "opd.method")
"""Keys that differ between the runs of a study, so nobody else may set them; ``opd.seed`` says where seeds begin."""


@dataclass(frozen=True)
class Arm:
    """One arm: its name, what is added to the overrides, its five places and horizon, hours of one run if known."""

    name: str
    overrides: tuple[str, ...]
    places: dict[str, str]
    hours: float | None


@dataclass(frozen=True)
class Study:
    """What is to be run.

    Attributes:
        method: name of the preset.
        overrides: that all arms share.
        arms: the method first.
        skipped: control -> why it does not apply.
        seeds: of the runs of every arm.
        folder: where the runs are, one folder each.
    """

    method: str
    overrides: tuple[str, ...]
    config_dirs: tuple[Path, ...]
    arms: tuple[Arm, ...]
    skipped: dict[str, str]
    seeds: tuple[int, ...]
    folder: Path

    def run_dir(self, arm: Arm, seed: int) -> Path:
        return self.folder / f"{arm.name}-seed{seed}"


def controls(config_dirs: Sequence[Path] = ()) -> list[str]:
    """Names of the controls that there are, those of ``config_dirs`` included."""
    return sorted(
        {file.stem for folder in (CONFIG_DIR, *config_dirs) for file in Path(folder, "control").glob("*.yaml")}
    )


def plan_study(
    overrides: Sequence[str], config_dirs: Sequence[Path], wanted: str, seeds: int, folder: Path | None
) -> Study:
    """Compose and check the method with each control.

    Args:
        overrides: in Hydra's grammar.
        wanted: ``all``, or names of controls with commas between.
        seeds: how many, from ``opd.seed`` on.
        folder: None: beside the run folder that the method would have.

    Raises:
        ConfigError: the method itself is refused, a control does not exist, or nothing could be compared.
    """
    _check_keys(overrides)
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds} must be at least 1.")
    names = _chosen(wanted, controls(config_dirs))
    config = compose_config(list(overrides), config_dirs)
    _check_method(config)
    first, arms, skipped = int(config.opd.seed), [_arm(METHOD, (), config)], {}
    for name in names:
        added = f"control={name}"
        try:
            changed = compose_config([*overrides, added], config_dirs)
            arms.append(_arm(name, (added,), changed))
        except ConfigError as error:
            skipped[name] = str(error)
    if len(arms) == 1 and wanted != ALL:
        raise ConfigError(f"no control of --controls {wanted} applies to {config.opd.method}: {skipped[names[0]]}")
    run_dir = Path(config.opd.run_dir)
    return Study(
        method=config.opd.method,
        overrides=tuple(override for override in overrides if not override.startswith("opd.seed=")),
        config_dirs=tuple(Path(folder).absolute() for folder in config_dirs),
        arms=tuple(arms),
        skipped=skipped,
        seeds=tuple(range(first, first + seeds)),
        folder=Path(folder).absolute() if folder else run_dir.with_name(f"compare-{run_dir.name}"),
    )


def _chosen(wanted: str, there: Sequence[str]) -> list[str]:
    if wanted == ALL:
        return list(there)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if name not in there:
            raise ConfigError(
                f"--controls {name} does not exist; choose {ALL}, or some of: {', '.join(there)}."
                f"{did_you_mean(name, there)}"
            )
    return names


def _check_keys(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in _OURS and key != "opd.seed":
            instead = "choose controls with --controls" if "control" in key else "choose the folder with --out"
            raise ConfigError(f"{override} is for `opd compare` to set, run by run: {instead}.")


def _check_method(config: DictConfig) -> None:
    """The base is the method before its first step, and its gain what the last validation says."""
    if not config.trainer.val_before_train or config.trainer.test_freq <= 0 or config.trainer.val_only:
        raise ConfigError(
            "opd compare needs a validation before and after training: set trainer.val_before_train=true, "
            "trainer.test_freq above 0 and trainer.val_only=false."
        )


def _arm(name: str, overrides: tuple[str, ...], config: DictConfig) -> Arm:
    """Raises ConfigError as the checks do."""
    opd = checks.check(config)
    run = read_run(config, opd)
    places = describe(opd) | {"horizon": str(opd.horizon)}
    return Arm(name, overrides, places, None if run is None else times(run).total / 3600)
