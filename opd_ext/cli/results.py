# SPDX-License-Identifier: Apache-2.0
"""After a run: report, ls, export, compare."""

from pathlib import Path
from typing import Annotated

import typer

from opd_ext.cli.app import app, refused


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="the folder of a run")],
) -> None:
    """Write the before/after table and the curves of a run into its folder."""
    from opd_ext.report.run_report import write_report

    try:
        write_report(run_dir)
    except (FileNotFoundError, ValueError) as error:
        raise refused("report", error) from None


@app.command()
def ls(
    folder: Annotated[
        Path | None, typer.Argument(file_okay=False, help="of run folders", show_default="$OPD_RUNS, or runs")
    ] = None,
) -> None:
    """List runs: step, accuracy, tokens, disk, state."""
    import os

    from opd_ext.report.runs import print_runs

    try:
        print_runs(folder or Path(os.environ.get("OPD_RUNS") or "runs"))
    except OSError as error:
        raise refused("ls", error) from None


@app.command()
def export(
    run: Annotated[Path, typer.Argument(file_okay=False, help="the folder of a run")],
    step: Annotated[str | None, typer.Option(help="a step that was saved, or best", show_default="newest")] = None,
    out: Annotated[Path | None, typer.Option(help="folder", file_okay=False, show_default="RUN/export/step_N")] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="the teacher's weights, not the student's")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="a LoRA adapter by itself; else it is merged")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32", show_default="vLLM's in training")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace what is there already")] = False,
) -> None:
    """Write the model of a run as a Hugging Face folder, and read it back."""
    from opd_ext.checkpoints.export import export as write
    from opd_ext.checkpoints.layout import CheckpointError

    try:
        write(run, step, out, teacher, adapter, dtype, force)
    except (CheckpointError, OSError) as error:
        raise refused("export", error) from None


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="a folder of run folders")],
    against: Annotated[list[str] | None, typer.Option(help="METHOD:BASELINE, any number of times")] = None,
) -> None:
    """Compare methods over seeds: one table with intervals, one figure, written into the folder."""
    from opd_ext.report.compare import write_comparison

    try:
        pairs = [tuple(pair.split(":")) for pair in against or []]
        if wrong := [pair for pair in pairs if len(pair) != 2]:
            raise ValueError(f"--against {':'.join(wrong[0])} must be METHOD:BASELINE")
        write_comparison(folder, pairs)
    except (FileNotFoundError, ValueError) as error:
        raise refused("compare", error) from None
