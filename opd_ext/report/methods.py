# SPDX-License-Identifier: Apache-2.0
"""The methods as what they are: choices in five places. Printed by ``opd methods``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table

from opd_ext.config.schema import OPDConfig, load
from opd_ext.terminal import terminal

PRESETS = Path(__file__).parents[1] / "config"
NOTHING = "-"
LOG_WIDTH = 140


def describe(opd: OPDConfig) -> dict[str, str]:
    """Teacher weights, teacher context, divergence, credit and policy in a few words each."""
    places = {
        "teacher weights": opd.teacher,
        "teacher context": opd.context,
        "divergence": opd.divergence,
        "credit": opd.credit,
        "policy": opd.policy,
    }
    # Credit is what a distillation term gives; without one its defaults mean nothing.
    present = {name: place.present if name != "credit" else opd.distils for name, place in places.items()}
    found = {name: str(place) if present[name] else NOTHING for name, place in places.items()}
    if opd.teachers:  # each says its own
        for name, key in (("teacher weights", "teacher"), ("teacher context", "context"), ("divergence", "divergence")):
            said = {view.name: str(getattr(view.opd, key)) for view in opd.views}
            alike = len(set(said.values())) == 1 and key != "teacher"
            found[name] = next(iter(said.values())) if alike else "; ".join(f"{who}: {it}" for who, it in said.items())
    return found


def preset_files(config_dirs: Sequence[Path] = ()) -> dict[str, Path]:
    """name -> file of every preset of this package and of ``config_dirs``."""
    folders = (PRESETS, *config_dirs)
    return {file.stem: file for folder in folders for file in sorted(Path(folder, "method").glob("*.yaml"))}


def read_methods(config_dirs: Sequence[Path] = ()) -> dict[str, dict[str, str]]:
    """name -> its five places, for the presets of this package and of ``config_dirs``.

    Raises:
        ConfigError: a module that a preset needs cannot be imported.
    """
    return {name: describe(preset(OmegaConf.load(file))) for name, file in preset_files(config_dirs).items()}


def preset(config: Any) -> OPDConfig:
    """The `opd` section of a method file on its own; what it takes from elsewhere is left at its default."""
    content = OmegaConf.to_container(config.opd, resolve=False)
    opd = load(OmegaConf.create(_without_interpolations(content)))
    opd.import_external_libs()  # the words of a user's piece are its own
    return opd


def _without_interpolations(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _without_interpolations(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if not (isinstance(item, str) and item.startswith("${"))}
    return value


def print_methods(config_dirs: Sequence[Path] = ()) -> None:
    """Print the table, a row of which ``opd train method=NAME`` runs, and name the methods that have no step loss."""
    table = Table(title="Methods: opd train method=NAME", title_justify="left", show_lines=True)
    found = read_methods(config_dirs)
    for column in ("method", *next(iter(found.values()))):
        table.add_column(column, overflow="fold")
    for name, places in found.items():
        table.add_row(name, *places.values())
    console = terminal(LOG_WIDTH)
    console.print(table)
    console.print("Pipelines around fine-tuning instead of a step loss: opd ssd, opd t3s", highlight=False)
