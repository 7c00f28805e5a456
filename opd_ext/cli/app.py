# SPDX-License-Identifier: Apache-2.0
"""The ``opd`` command, to which the modules beside this one add theirs."""

from typing import Annotated

import typer

from opd_ext import __version__

app = typer.Typer(
    name="opd",
    help="On-policy distillation on stock verl: vLLM generates, FSDP trains, Ray places.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def refused(command: str, error: Exception) -> typer.Exit:
    """Say why, and end with status 2."""
    typer.echo(f"opd {command}: {error}", err=True)
    return typer.Exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def opd(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    pass
