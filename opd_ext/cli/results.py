# SPDX-License-Identifier: Apache-2.0
"""After a run: report, ls, export, inspect, compare."""

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
def harness(
    run: Annotated[Path, typer.Argument(file_okay=False, help="the folder of an SSD run")],
    samples: Annotated[str, typer.Argument(help="of RUN/evaluate/samples, e.g. ssd-report-T1.1")],
    problems: Annotated[Path | None, typer.Option(help="what was sampled", show_default="the run's")] = None,
    out: Annotated[Path | None, typer.Option(help="file", dir_okay=False, show_default="SAMPLES.json")] = None,
) -> None:
    """Write sampled programs for LiveCodeBench's own evaluator, lcb_runner.runner.custom_evaluator."""
    from opd_ext.errors import ConfigError
    from opd_ext.pipelines.ssd.harness import export_programs

    try:
        written = export_programs(run, samples, problems, out)
    except (ConfigError, OSError) as error:
        raise refused("harness", error) from None
    typer.echo(f"written: {written}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(file_okay=False, help="the folder of a run")],
    name: Annotated[str | None, typer.Argument(help="with --teacher, which of several", show_default=False)] = None,
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

    if name is not None and not teacher:
        raise refused("export", ValueError(f"{name} is the name of a teacher only with --teacher {name}."))
    try:
        write(run, step, out, (name or "") if teacher else None, adapter, dtype, force)
    except (CheckpointError, OSError) as error:
        raise refused("export", error) from None


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="the folder of a run")],
    step: Annotated[
        str | None, typer.Option(help="whose weights: a step, best, or 0", show_default="newest checkpoint")
    ] = None,
    rollouts: Annotated[
        str | None, typer.Option(help="of which steps: 21, 1-40, all", show_default="what those weights sampled")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="names with commas", show_default="all that apply")] = None,
    limit: Annotated[int, typer.Option(help="rollouts at most")] = 1000,
    teacher: Annotated[str | None, typer.Option(help="a model for methods that learn from another one")] = None,
    out: Annotated[Path | None, typer.Option(help="folder", file_okay=False, show_default="RUN/inspect/step_N")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda", show_default="what there is")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier map")] = False,
) -> None:
    """Colour every token of a run's rollouts by the signal that each method gives it: a page for a browser."""
    import os

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a thread that spins for another slows both
    from opd_ext.checkpoints.layout import CheckpointError
    from opd_ext.errors import ConfigError
    from opd_ext.inspection.command import inspect as write

    names = [name for name in (methods or "").split(",") if name]
    try:
        write(run, step, rollouts, names, limit, teacher, out, device, force)
    except (CheckpointError, ConfigError, OSError, ValueError) as error:
        raise refused("inspect", error) from None


@app.command(context_settings={"ignore_unknown_options": True})
def compare(
    words: Annotated[list[str], typer.Argument(metavar="FOLDER | [METHOD] [KEY=VALUE ...]")],
    against: Annotated[list[str] | None, typer.Option(help="METHOD:BASELINE, any number of times; of a FOLDER")] = None,
    controls: Annotated[
        str, typer.Option(help="all that apply, or names with commas; --dry-run lists them, and why some do not")
    ] = "all",
    seeds: Annotated[int, typer.Option(help="runs of each arm, from opd.seed on")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="folder of the arms", file_okay=False, show_default="compare-NAME beside runs")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print arms and hours; run nothing")] = False,
    config_dir: Annotated[list[Path] | None, typer.Option(help="folder with presets of yours", file_okay=False)] = None,
) -> None:
    """Compare the runs of a FOLDER; or run a method and its controls, and say which of its gains survives.

    opd compare crisp scale=cpu_tiny --dry-run: the arms and their hours.

    opd compare crisp scale=cpu_tiny --seeds 3: run what is missing, then the table. Again, it goes on where it stopped.

    opd compare RUNS --against sdpo:grpo: runs that are there already.
    """
    from opd_ext.errors import ConfigError, RunError

    try:
        if len(words) == 1 and "=" not in words[0] and Path(words[0]).is_dir():
            _compare_runs(Path(words[0]), against or [])
        else:
            _study(words, against or [], config_dir or [], controls, seeds, out, dry_run)
    except (ConfigError, FileNotFoundError, ValueError) as error:
        raise refused("compare", error) from None
    except RunError as error:
        typer.echo(f"opd compare: {error}", err=True)
        raise typer.Exit(1) from None


def _compare_runs(folder: Path, against: list[str]) -> None:
    from opd_ext.report.compare import write_comparison
    from opd_ext.report.controls import STUDY, write_study

    pairs = [tuple(pair.split(":")) for pair in against]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise ValueError(f"--against {':'.join(wrong[0])} must be METHOD:BASELINE")
    if (folder / STUDY).is_file() and not pairs:
        write_study(folder)
    else:
        write_comparison(folder, pairs)


def _study(
    words: list[str],
    against: list[str],
    config_dirs: list[Path],
    controls: str,
    seeds: int,
    out: Path | None,
    dry_run: bool,
) -> None:
    from opd_ext.config.overrides import from_words
    from opd_ext.controls.arms import plan_study
    from opd_ext.controls.study import print_study, run_study
    from opd_ext.errors import ConfigError

    if against:
        raise ConfigError("--against compares the runs of a FOLDER; a method's controls are chosen with --controls.")
    overrides = from_words(words, config_dirs)
    if lost := [word for word in overrides if "=" not in word and not word.startswith("~")]:
        raise ConfigError(f"{lost[0]} is neither a folder of runs nor a method: see `opd methods`.")
    study = plan_study(overrides, config_dirs, controls, seeds, out)
    if dry_run:
        print_study(study)
    else:
        run_study(study)
