# SPDX-License-Identifier: Apache-2.0
"""The methods as what they are: choices in five places. Printed by ``opd methods``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from opd_ext.config.schema import OPDConfig, load
from opd_ext.divergence.config import DivergenceTerm

PRESETS = Path(__file__).parents[1] / "config"
NOTHING = "-"
LOG_WIDTH = 140  # a log has no width of its own


def describe(opd: OPDConfig) -> dict[str, str]:
    """Teacher weights, teacher context, divergence, credit and policy in a few words each."""
    return {
        "teacher weights": _weights(opd) if opd.distils else NOTHING,
        "teacher context": str(opd.context) if opd.distils else NOTHING,
        "divergence": _divergence(opd) if opd.distils else NOTHING,
        "credit": _credit(opd) if opd.distils else NOTHING,
        "policy": _policy(opd),
    }


def _weights(opd: OPDConfig) -> str:
    teacher = opd.teacher
    detail = {
        "periodic": teacher.interval,
        "ema": teacher.rate,
        "trust_region": teacher.rate,
        "external": Path(str(teacher.path)).name,
    }.get(teacher.weights)
    return teacher.weights if detail is None else f"{teacher.weights}({detail})"


def _divergence(opd: OPDConfig) -> str:
    if not opd.divergence.by_class:
        return _term(opd.divergence)
    terms = {name: getattr(opd.divergence, name) for name in ("key", "error")}
    return "; ".join(f"{_term(term)} on {name} spans" for name, term in terms.items() if term)


def _term(term: DivergenceTerm) -> str:
    kind = term.kind + (f"({term.beta})" if term.beta else "")
    support = f"top-{term.k} of the {term.topk_by}" if term.support == "topk" else term.support
    parts = [f"{kind}, {support}"]
    if getattr(term, "extrapolation", 1.0) != 1.0:
        parts.append(f"extrapolated by {term.extrapolation:g}")
    if term.clip is not None:
        parts.append(f"clip {term.clip}")
    if isinstance(term.temperature, float) and term.temperature != 1.0:
        parts.append(f"T {term.temperature}")
    return ", ".join(parts)


def _credit(opd: OPDConfig) -> str:
    credit = opd.credit
    options = ", ".join(f"{name} {value}" for name, value in credit.args.items())
    parts = [credit.kind + (f"({options})" if options else "")]
    if credit.annotator is not None:
        parts.append(f"annotator {credit.annotator.kind}")
    caps = {"importance": credit.importance_cap, "rollout": credit.rollout_cap}
    parts += [f"{name} cap {cap:g}" for name, cap in caps.items() if cap is not None]
    if credit.hold is not None:
        parts.append(f"{credit.weight:g} for {credit.hold} steps, 0 after {credit.hold + credit.decay}")
    return ", ".join(parts)


def _policy(opd: OPDConfig) -> str:
    if opd.policy is None:
        return NOTHING
    parts = [opd.policy.loss]
    if opd.policy.weight != 1.0:
        parts.append(f"weight {opd.policy.weight:g}")
    if opd.policy.gate != "none":
        parts.append({"complement": "gated on spans", "untaught": "where no teacher is"}[opd.policy.gate])
    if opd.policy.shaping is not None:
        parts.append(f"advantages times teacher's ratio, 1 +- {opd.policy.shaping:g}")
    if opd.policy.prompt_mean:
        parts.append("mean per prompt")
    return ", ".join(parts)


def read_methods(config_dirs: Sequence[Path] = ()) -> dict[str, dict[str, str]]:
    """name -> its five places, for the presets of this package and of ``config_dirs``."""
    files = [file for folder in (PRESETS, *config_dirs) for file in sorted(Path(folder, "method").glob("*.yaml"))]
    return {file.stem: describe(_preset(OmegaConf.load(file))) for file in files}


def _preset(config: Any) -> OPDConfig:
    """The `opd` section of a method file on its own; what it takes from elsewhere is left at its default."""
    content = OmegaConf.to_container(config.opd, resolve=False)
    return load(OmegaConf.create(_without_interpolations(content)))


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
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    console.print(table)
    console.print("Pipelines around fine-tuning instead of a step loss: opd ssd, opd t3s", highlight=False)
