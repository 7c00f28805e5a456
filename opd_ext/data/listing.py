# SPDX-License-Identifier: Apache-2.0
"""The published sets as tables: ``opd data list`` and ``docs/data.md``."""

from rich.console import Console
from rich.table import Table

from opd_ext.data.catalogue import SETS
from opd_ext.data.published import Published, Split
from opd_ext.home import home
from opd_ext.terminal import LOG_WIDTH, terminal


def show(console: Console | None = None) -> None:
    """Print one row per set; a split that is there already is marked."""
    console, folder = console or terminal(LOG_WIDTH), home() / "data"
    table = Table(title=f"opd data NAME -> {folder}/NAME/SPLIT.parquet", title_justify="left")
    for heading in ("name", "splits (rows)", "from", "licence", "recipes"):
        table.add_column(heading, overflow="fold")
    for published in SETS.values():
        there = folder / published.name
        splits = [
            f"{_rows(split)}{' *' if (there / f'{split.name}.parquet').exists() else ''}" for split in published.splits
        ]
        table.add_row(
            published.name,
            "\n".join(splits),
            "\n".join(repositories(published)),
            published.licence,
            ", ".join(published.recipes) or "opd eval",
        )
    console.print(table)
    console.print("* is there already; --from FILE instead of the hub; filters, wording and notes: docs/data.md")


def repositories(published: Published) -> list[str]:
    """Where a set is, each place once."""
    return list(dict.fromkeys(origin.repository for split in published.splits for origin in split.origins))


def _rows(split: Split) -> str:
    return f"{split.name} ({split.rows:,})" if split.rows else split.name


def markdown() -> dict[str, str]:
    """The tables of ``docs/data.md``, by the name of their place in it."""
    return {"sets": _sets(), "columns": _columns()}


def _sets() -> str:
    lines = ["| name | what | splits: rows published, filter | from | licence | recipes |", "|---|---|---|---|---|---|"]
    for published in SETS.values():
        splits = "<br>".join(_split(split) for split in published.splits)
        origins = {origin.address: origin for split in published.splits for origin in split.origins}
        places = "<br>".join(
            f"[{_short(origin.repository)}]({origin.address})"
            + (f" at `{origin.revision[:7]}`" if origin.revision else "")
            for origin in origins.values()
        )
        recipes = ", ".join(f"[{name}](../recipes/{name}/README.md)" for name in published.recipes) or "`opd eval`"
        cells = (f"`{published.name}`", published.title, splits, places, published.licence, recipes)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _split(split: Split) -> str:
    words = f"`{split.name}`" + (f": {split.rows:,}" if split.rows else "")
    conditions = ", ".join(keep.words for keep in split.keeps)
    usual = "" if split.usual else "; on request"
    return f"{words}{f'; {conditions}' if conditions else ''}{usual}"


def _short(repository: str) -> str:
    return repository if "://" not in repository else repository.split("://")[1].replace("/tree/main", "")


def _columns() -> str:
    lines = ["| name | files | columns read | wording | grader | besides |", "|---|---|---|---|---|---|"]
    for published in SETS.values():
        files = dict.fromkeys(name for split in published.splits for origin in split.origins for name in origin.files)
        named = {key: ", ".join(f"`{name}`" for name in names) for key, names in published.columns.items()}
        columns = "<br>".join(f"{key}: {names}" for key, names in named.items())
        grader = f"`{published.grader.rpartition('.')[2]}`" if published.grader else "-"
        wording = f"`{published.wording}`" if published.wording else "as published"
        cells = (f"`{published.name}`", "<br>".join(f"`{name}`" for name in files), columns, wording, grader)
        lines.append(f"| {' | '.join((*cells, published.note or '-'))} |")
    return "\n".join(lines)
