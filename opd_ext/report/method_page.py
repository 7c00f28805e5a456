# SPDX-License-Identifier: Apache-2.0
"""One method on one page: its choices with file and line, its formula, its paper, its recipes.

Printed by ``opd methods NAME``.
"""

import functools
import inspect
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table
from rich.text import Text

from opd_ext.bridge.sources import policy_loss_source
from opd_ext.config import one_step_off
from opd_ext.config.compose import compose_config
from opd_ext.config.schema import OPDConfig, load
from opd_ext.config.teachers import View
from opd_ext.context import get_context
from opd_ext.credit import get_credit
from opd_ext.credit.annotate import get_annotator
from opd_ext.divergence import get_divergence
from opd_ext.divergence.sampled import clipped_surrogate
from opd_ext.errors import ConfigError
from opd_ext.policy import get_policy
from opd_ext.report.methods import LOG_WIDTH, PRESETS, preset, preset_files
from opd_ext.teacher import get_teacher
from opd_ext.terminal import terminal

LOSS = "loss = policy(log q) + sum_t weight_t * lambda * credit_t * D_t"


@dataclass(frozen=True)
class Choice:
    """A registered piece of a method: the key that chose it, and where it is."""

    key: str
    name: str
    where: str
    what: str  # the first line of its docstring


def choices(opd: OPDConfig) -> list[Choice]:
    """Every registered piece that a method is made of, in the order of the places."""
    found: list[Choice] = []
    if opd.distils:
        for view in opd.views:
            found += _of_teacher(view)
        found.append(_choice("opd.credit.kind", opd.credit.kind, get_credit(opd.credit.kind)))
        if opd.credit.annotates:
            kind = opd.credit.annotator.kind
            found.append(_choice("opd.credit.annotator.kind", kind, get_annotator(kind)))
    if opd.policy.present:
        source = policy_loss_source(opd.policy.loss)
        where = f"verl/trainer/ppo/{source[0].name}:{source[1]}" if source else "registered by a module of yours"
        found.append(Choice("opd.policy.loss", opd.policy.loss, where, "A policy loss of verl's registry."))
        for shaping in opd.policy.shapings:
            key = "opd.policy.gate" if shaping.name == opd.policy.gate else "opd.policy.shaping"
            found.append(_choice(key, shaping.name, get_policy(shaping.name)))
    return found


def _of_teacher(view: View) -> list[Choice]:
    """The first three places, as one teacher has them."""
    opd, own = view.opd, f"{view.key}." if view.name else "opd."
    found = [_choice(f"{view.key}.weights", opd.teacher.weights, get_teacher(opd.teacher.weights))]
    found.append(_choice(f"{own}context.kind", opd.context.kind, get_context(opd.context.kind)))
    terms = opd.divergence.terms or {"": opd.divergence}
    for name, term in terms.items():
        key = f"{own}divergence{'.' if name else ''}{name}.kind"
        piece = clipped_surrogate if term.support == "sampled" else get_divergence(term.registered)
        found.append(_choice(key, f"{term.kind}, {term.support}", piece))
    return found


def _choice(key: str, name: str, piece: Any) -> Choice:
    plain = inspect.unwrap(piece.func if isinstance(piece, functools.partial) else piece)
    doc = (inspect.getdoc(plain) or "").split("\n\n")[0]
    return Choice(key, name, _where(plain), " ".join(doc.split()))


def _where(piece: Any) -> str:
    """File and line, relative to the working directory where it is below that."""
    file, line = inspect.getsourcefile(piece), inspect.getsourcelines(piece)[1]
    relative = os.path.relpath(str(file))
    return f"{relative if not relative.startswith('..') else file}:{line}"


def formula(opd: OPDConfig) -> list[str]:
    """The loss that the choices make, a line per symbol."""
    if not opd.distils:
        return ["loss = policy(log q)"]
    lines = [LOSS if opd.policy.present else LOSS.replace("policy(log q) + ", "")]
    for view in opd.views:
        whose = f" with {view.name}" if view.name else ""
        factor = f"{view.weight:g} * " if view.weight != 1.0 else ""
        for name, term in (view.opd.divergence.terms or {"": view.opd.divergence}).items():
            where = f" on {name} spans" if name else ""
            lines.append(f"D_t{where}{whose} = {factor}{term}")
    weight, gate = opd.credit.schedule(1)
    fade = "" if opd.credit.hold is None else f", to 0 within {opd.credit.decay} steps after step {opd.credit.hold}"
    lines += [f"credit_t = {opd.credit}", f"lambda = {weight:g}{fade}", f"weight_t: {opd.reduction}, {opd.denominator}"]
    if opd.horizon.limited:
        lines.append(f"t: {opd.horizon}")
    if opd.policy.present:
        lines.append(
            f"policy = {opd.policy}" + (f", gate {gate:g} at first" if opd.policy.gate == "complement" else "")
        )
    return lines


def recipes(name: str) -> list[str]:
    """Commands that run the method, the miniature world first, agents last."""
    commands = {"discover": "opd discover QUESTIONS"}  # a search is for one question
    stems = sorted(path.stem for path in (PRESETS / "recipe" / name).glob("*.yaml"))
    found = [f"{commands.get(stem, 'opd train')} recipe={name}/{stem}" for stem in stems]
    if (PRESETS / "tuning" / f"{name}_cpu_tiny_tools.yaml").is_file():
        found.append(f"opd train method={name} scale=cpu_tiny_tools")
    agents = sorted((PRESETS / "recipe" / "agents").glob("*.yaml"))
    found += [f"opd train recipe=agents/{path.stem}" for path in agents if f"- {name}/" in path.read_text()]
    return [f"opd train method={name} scale=cpu_tiny", *found]


def ahead(name: str, config_dirs: Sequence[Path] = ()) -> str:
    """How the method samples while it trains, or the sentence that refuses it."""
    command = [f"method={name}", "scale=cpu_tiny", "asynchronous=one_step_off"]
    try:
        config = compose_config(command, config_dirs)
        one_step_off.check(load(config.opd), config)
    except ConfigError as error:
        return str(error)
    return f"opd train {' '.join(command)}"


def print_method(name: str, config_dirs: Sequence[Path] = ()) -> None:
    """Print the page of a method.

    Raises:
        ConfigError: there is no such method, or a module that it needs cannot be imported.
    """
    files = preset_files(config_dirs)
    if name not in files:
        raise ConfigError(f"{name} is no method; choose one of: {', '.join(sorted(files))}.")
    opd = preset(OmegaConf.load(files[name]))
    says = [line.lstrip("# ").rstrip() for line in files[name].read_text().split("\n") if line.startswith("# ")]
    says = [line for line in says if not line.startswith("@package")]
    console = terminal(LOG_WIDTH, highlight=False)
    console.print(Text.assemble((name, "bold"), f": {' '.join(says)}"), soft_wrap=True)
    console.print(f"preset: {os.path.relpath(files[name])}", soft_wrap=True)
    table = Table("place", "choice", "where", "what it is", show_lines=True)
    for choice in choices(opd):
        table.add_row(choice.key, choice.name, choice.where, choice.what)
    console.print(table)
    console.print(Text("formula", "bold"), *(f"  {line}" for line in formula(opd)), sep="\n")
    papers = sorted(set(re.findall(r"arXiv[: ](\d{4}\.\d{5})", " ".join(says))))
    if papers:
        console.print(Text("paper", "bold"), *(f"  https://arxiv.org/abs/{paper}" for paper in papers), sep="\n")
    told = ahead(name, config_dirs)
    console.print(Text("sampling while it trains", "bold"), f"  {told}", sep="\n", soft_wrap=True)
    console.print(Text("recipes", "bold"), *(f"  {line}" for line in recipes(name)), sep="\n")
