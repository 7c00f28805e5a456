# SPDX-License-Identifier: Apache-2.0
"""What samples, trains and grades in stages: eval, discover, sft, ssd, t3s."""

from pathlib import Path
from typing import Annotated

import typer

from opd_ext.cli.app import app, refused

_DRY_RUN = "print the stages, what is done, and what they need, and stop"
_JSON = "of a dry run: print the plan as plain values: bytes, seconds, tokens"


@app.command(name="eval", context_settings={"ignore_unknown_options": True})
def evaluate(
    model: Annotated[str, typer.Argument(help="a run folder, a folder with a model, or a hub id")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]")] = None,
    on: Annotated[
        str | None,
        typer.Option(
            help="sets, separated by commas: names of `opd data`, NAME/SPLIT, or paths", show_default="a run's own"
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="another model, compared problem by problem")] = None,
    step: Annotated[str | None, typer.Option(help="of a run: saved step, or best", show_default="newest")] = None,
    against_step: Annotated[str | None, typer.Option(help="as --step, of --against")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="how a paper samples: cispo, crisp, iw_opd, opsd, sdpo, ssd, t3s, trace")
    ] = None,
    scale: Annotated[str | None, typer.Option(help="the machine", show_default="a run's own, or cpu")] = None,
    n: Annotated[int | None, typer.Option(min=1, help="samples per problem")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="the first so many problems of every set")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder", file_okay=False, show_default="$OPD_RUNS/eval-MODEL")
    ] = None,
    force: Annotated[str | None, typer.Option(help="throw away what this stage made, make it again")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=_DRY_RUN)] = False,
    json: Annotated[bool, typer.Option("--json", help=_JSON)] = False,
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
        run(model, options, [*([f"run_dir={out}"] if out else []), *(overrides or [])], force, dry_run, cfg, json)
    except (CheckpointError, ConfigError, LaunchError, StageError, TableError) as error:
        raise refused("eval", error) from None


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
    json: Annotated[bool, typer.Option("--json", help=_JSON)] = False,
) -> None:
    """Search for a right answer to one question, learning from failures (test-time self-distillation)."""
    from opd_ext.errors import ConfigError
    from opd_ext.pipelines.discover import SearchError, plan_search
    from opd_ext.pipelines.discover import discover as search

    try:
        if dry_run:
            plan_search(data_file, row, budget, attempts, overrides or [], seeds, json)
        else:
            search(data_file, row, out, seeds, budget, attempts, overrides=overrides or [])
    except (ConfigError, SearchError) as error:
        raise refused("discover", error) from None


def _add_pipeline(name: str, text: str) -> None:
    """The pipelines take the same options."""

    def command(
        overrides: Annotated[list[str] | None, typer.Argument(metavar="OVERRIDES")] = None,
        until: Annotated[str | None, typer.Option(help="stop after this stage")] = None,
        only: Annotated[str | None, typer.Option(help="run this stage alone")] = None,
        force: Annotated[str | None, typer.Option(help="throw away what this stage made, make it again")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help=_DRY_RUN)] = False,
        json: Annotated[bool, typer.Option("--json", help=_JSON)] = False,
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
            run(name, overrides or [], until, only, force, dry_run, cfg, config_dir or [], json)
        except (ConfigError, LaunchError, MergeError, StageError, TableError) as error:
            raise refused(name, error) from None

    again = "The same command again goes on where it stopped."
    app.command(name, help=f"{text} {again}", context_settings={"ignore_unknown_options": True})(command)


_add_pipeline("sft", "Fine-tuning on given, verified or own right traces, for teachers and warm starts.")
_add_pipeline("ssd", "Simple self-distillation: sample, fine-tune, evaluate.")
_add_pipeline("t3s", "Trajectory-aware token selection: pilot, bottleneck, mask, second run.")
