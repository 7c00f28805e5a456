# SPDX-License-Identifier: Apache-2.0
"""The table of costs in a method's guide: what `opd plan` says of its GPU recipes, in a line each."""

from pathlib import Path

from omegaconf import OmegaConf

from opd_ext.config.checks import check
from opd_ext.config.compose import CONFIG_DIR, compose_config
from opd_ext.plan.disk import checkpoint_bytes, on_disk
from opd_ext.plan.machines import GiB
from opd_ext.plan.memory import phases
from opd_ext.plan.page import GB
from opd_ext.plan.run import Run, read_run
from opd_ext.plan.timing import times

BEGIN, END = "<!-- costs: written by python -m opd_ext.reference -->\n", "<!-- end of costs -->\n"
_HEAD = (
    "| recipe | GPUs | GiB of a GPU, worst phase | s per step | validation, share of the run | one checkpoint, disk GB "
    "| hours, GPU hours |\n|---|---|---|---|---|---|---|\n"
)


def gpu_recipes(method: str) -> list[str]:
    """``method/name`` of the recipes for machines with GPUs, by file name."""
    files = sorted((CONFIG_DIR / "recipe" / method).glob("*.yaml"))
    return [f"{method}/{file.stem}" for file in files if not file.stem.endswith("_cpu")]


def planned(recipe: str, *overrides: str) -> Run:
    """The run of a recipe as a machine without its data plans it.

    Raises:
        ConfigError: the configuration cannot run.
        ValueError: the size of its model is not known.
    """
    config = compose_config([f"recipe={recipe}", "opd.world=/nowhere", *overrides])
    run = read_run(config, check(config))
    if run is None:
        raise ValueError(f"recipe={recipe}: the size of {OmegaConf.select(config, 'actor_rollout_ref.model.path')}?")
    return run


def table(method: str) -> str:
    """A line per GPU recipe."""
    return _HEAD + "".join(_line(recipe) for recipe in gpu_recipes(method))


def _line(recipe: str) -> str:
    run = planned(recipe)
    taken, worst = times(run), max(phases(run), key=lambda phase: phase.bytes)
    cells = (
        f"`{recipe}`",
        f"{run.gpus} {run.machine.name}",
        f"{worst.bytes / GiB:.0f} of {run.machine.memory / GiB:.0f}, {worst.name}",
        f"{taken.step:.0f}",
        f"{taken.validating / taken.total:.0%}",
        f"{sum(checkpoint_bytes(run).values()) / GB:.0f}, {on_disk(run)[0] / GB:.0f}",
        f"{taken.total / 3600:.1f}, {taken.total / 3600 * run.gpus:.1f}",
    )
    return f"| {' | '.join(cells)} |\n"


def with_costs(guide: Path) -> str | None:
    """The text of ``guide`` (``recipes/METHOD/README.md``) with its table anew; None: it has none."""
    text = guide.read_text()
    if BEGIN not in text:
        return None
    before, rest = text.split(BEGIN)
    return before + BEGIN + table(guide.parent.name) + END + rest.split(END)[1]
