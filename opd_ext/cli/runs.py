# SPDX-License-Identifier: Apache-2.0
"""Before and during a run: train, plan, methods, new, doctor."""

from pathlib import Path
from typing import Annotated

import typer

from opd_ext.cli.app import app, refused

_STAGED = ("discover", "eval", "sft", "ssd", "t3s")  # commands that plan themselves, by --dry-run


@app.command(
    add_help_option=False,  # --help, too, is for the training parser to answer
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def train(overrides: Annotated[list[str] | None, typer.Argument(metavar="OVERRIDES")] = None) -> None:
    """Train; the same as `python -m opd_ext.train`. See `opd train --help`."""
    from opd_ext.train import main

    raise typer.Exit(main(overrides or []))


@app.command(context_settings={"ignore_unknown_options": True})
def plan(
    words: Annotated[list[str] | None, typer.Argument(metavar="[METHOD] [KEY=VALUE ...]")] = None,
    gpu: Annotated[str | None, typer.Option(help="opd.plan.gpu: h200, h100, a100, a100_40gb, l40s, rtx4090")] = None,
    mean_response: Annotated[float | None, typer.Option(help="opd.plan.mean_response, tokens")] = None,
    json: Annotated[bool, typer.Option("--json", help="print plain values: bytes, seconds, tokens")] = False,
    config_dir: Annotated[list[Path] | None, typer.Option(help="folder with presets of yours", file_okay=False)] = None,
) -> None:
    """Say what a run needs: memory and seconds per GPU and phase, disk, hours. Takes the words of `opd train`.

    After ssd, t3s, sft, eval or discover it takes the words of that command: its --dry-run.
    """
    from opd_ext.config.overrides import from_words
    from opd_ext.errors import ConfigError
    from opd_ext.train import plan as planned

    given = {"gpu": gpu, "mean_response": mean_response}
    given = {name: value for name, value in given.items() if value is not None}
    first, *rest = words or [""]
    if first in _STAGED:
        key, length = "opd.plan" if first == "discover" else "plan", "mean_response"
        names = {length: "mean_val_response" if first == "eval" else length}
        rest += [f"{key}.{names.get(name, name)}={value}" for name, value in given.items()]
        rest += [f"--config-dir={folder}" for folder in config_dir or []]
        command = typer.main.get_group(app).commands[first]
        command.main([*rest, "--dry-run", *(["--json"] if json else [])], f"opd {first}")
    assumed = [f"opd.plan.{name}={value}" for name, value in given.items()]
    try:
        planned([*from_words(words or [], config_dir or []), *assumed], config_dir or [], json)
    except ConfigError as error:
        raise refused("plan", error) from None


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="one method: its choices, formula, paper and recipes")] = None,
    config_dir: Annotated[list[Path] | None, typer.Option(help="folder with presets of yours", file_okay=False)] = None,
) -> None:
    """List the methods with their choices in the five places, or print the page of one."""
    from opd_ext.errors import ConfigError
    from opd_ext.report.method_page import print_method
    from opd_ext.report.methods import print_methods

    try:
        print_method(name, config_dir or []) if name else print_methods(config_dir or [])
    except ConfigError as error:
        raise refused("methods", error) from None


def _print_recipes(wanted: bool) -> None:
    if wanted:
        from opd_ext.new import recipes

        typer.echo(recipes())
        raise typer.Exit()


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="of the new method, its folder and its runs")],
    source: Annotated[str, typer.Option("--from", help="the published method to begin with, e.g. crisp")],
    out: Annotated[Path, typer.Option(help="where the folder is made", file_okay=False)] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="write into a folder that exists")] = False,
    recipes: Annotated[
        bool,
        typer.Option(
            "--recipes", callback=_print_recipes, is_eager=True, help="print where the published recipes are, and stop"
        ),
    ] = False,
) -> None:
    """Copy a published recipe, settings included, under a name of your own, and plan it."""
    from opd_ext.errors import ConfigError
    from opd_ext.new import main

    try:
        main(name, source, out, force)
    except ConfigError as error:
        raise refused("new", error) from None


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of the table")] = False,
) -> None:
    """Look at versions, devices, plugin, memory, disk and network; exit 1 with one sentence per problem."""
    from opd_ext.doctor import main

    raise typer.Exit(main(as_json))
