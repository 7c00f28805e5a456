# SPDX-License-Identifier: Apache-2.0
"""``opd data NAME``: a published data set as rows that verl reads, with a card that says what became of every row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from opd_ext import __version__
from opd_ext.context import prompts
from opd_ext.data.problems import Tally, usable_problems
from opd_ext.data.published import Published, Split
from opd_ext.data.reading import digest_of
from opd_ext.data.rows import PROMPTS, row_of, schema_of
from opd_ext.data.sources import matching_splits
from opd_ext.errors import ConfigError, did_you_mean
from opd_ext.files import beside, put_file, write_whole
from opd_ext.home import home
from opd_ext.progress import Progress
from opd_ext.terminal import LOG_WIDTH, terminal

CARD = "card.json"
_GROUP = 1000  # rows that are written at once
_COMPARED = 1 << 28  # bytes of a file that is compared by its content where its digest is another one


@dataclass(frozen=True)
class Wording:
    """How questions of maths are asked.

    Attributes:
        prompt: a key of :data:`PROMPTS`; empty: the set's own.
        eval_suffix: evaluation prompts end with the reminder of DAPO's wording, as training prompts do.
        teacher_prompt: instruction id: evaluation prompts as the teacher reads them.
    """

    prompt: str = ""
    eval_suffix: bool = False
    teacher_prompt: str | None = None

    def check(self, published: Published) -> None:
        """Raises ValueError for a wording that the set cannot have."""
        own = published.wording
        if self.prompt and self.prompt not in PROMPTS:
            raise ValueError(f"--prompt {self.prompt} does not exist: choose one of {', '.join(PROMPTS)}.")
        given = {"--prompt": self.prompt, "--eval-suffix": self.eval_suffix, "--teacher-prompt": self.teacher_prompt}
        if not own and (option := next((name for name, value in given.items() if value), None)):
            raise ValueError(f"{published.name} is asked as it is published: leave {option} out.")
        if (self.prompt or own) != "dapo" and (self.eval_suffix or self.teacher_prompt is not None):
            option = "--eval-suffix" if self.eval_suffix else "--teacher-prompt"
            raise ValueError(f"{option} belongs to the wording of DAPO: leave it out, or set --prompt dapo.")
        if self.teacher_prompt is not None:
            prompts.instruction(self.teacher_prompt)
            if all(split.asks for split in published.splits):
                raise ValueError(f"--teacher-prompt renders evaluation sets, and {published.name} is none.")

    def asked(self, published: Published, split: Split) -> Callable[[str], str]:
        if not published.wording:
            return str
        if self.teacher_prompt is not None:
            return lambda question: prompts.teacher_prompt(question, self.teacher_prompt or "")
        render = PROMPTS[self.prompt or published.wording]
        if split.asks or self.eval_suffix:
            return render
        return lambda question: render(question).removesuffix(prompts.REMINDER)

    def label(self, published: Published) -> str:
        """What a folder of another wording than the set's own is called besides: ``-boxed``, ``_v2``."""
        words = f"-{self.prompt}" if self.prompt not in ("", published.wording) else ""
        return words + ("-reminder" if self.eval_suffix else "") + self.source_label

    @property
    def source_label(self) -> str:
        if self.teacher_prompt is None:
            return ""
        return "_own" if self.teacher_prompt.startswith(prompts.TEXT_PREFIX) else f"_{self.teacher_prompt}"


def default_folder(published: Published, wording: Wording = Wording()) -> Path:
    """``$OPD_HOME/data/NAME``, where the recipes look; another wording has a folder of its own beside it."""
    return home() / "data" / f"{published.name}{wording.label(published)}"


def prepare(
    published: Published,
    source: Path | None = None,
    out: Path | None = None,
    *,
    splits: Sequence[str] = (),
    count: int | None = None,
    wording: Wording = Wording(),
    drop_bad: bool = False,
    force: bool = False,
    console: Console | None = None,
) -> dict[str, Path]:
    """Write ``<out>/<split>.parquet`` for every split that is wanted, and :data:`CARD` beside them.

    A file that is there already with the same content is left alone. Nothing is written unless all of it can be.

    Args:
        source: a file (parquet, JSON, JSON lines or CSV, also gzipped) or a folder of such; None: the hub.
        out: the folder; by default :func:`default_folder`.
        splits: names of the set's splits; empty: the usual ones.
        count: so many rows of each split, the first.
        drop_bad: leave out rows whose reference the grader cannot read; otherwise the first of them is an error.
        force: replace files that exist with other content.

    Returns:
        Split -> file.

    Raises:
        ValueError, OSError: one sentence: no such split, no such file, a file of another set, an option that makes no
            sense, a reference that the grader cannot read, no usable row, or a file in the way.
    """
    console, chosen = console or terminal(LOG_WIDTH), choose_splits(published, splits)
    wording.check(published)
    if count is not None and count < 1:
        raise ValueError(f"--count {count} must be at least 1.")
    if source is not None:
        chosen = matching_splits(published, chosen, source)
    out = (out or default_folder(published, wording)).expanduser().absolute()
    tallies: dict[str, Tally] = {}
    read_once: dict[str, Any] = {}
    with beside(out) as scratch, Progress(f"preparing {published.name}", len(chosen), "splits", console) as progress:
        for split in chosen:
            progress.update(note=split.name)
            tally = tallies[split.name] = Tally()
            problems = usable_problems(published, split, source, tally, drop_bad, read_once)
            asked, data_source = wording.asked(published, split), published.data_source + wording.source_label
            rows = (row_of(problem, published, split.name, asked, data_source) for problem in problems)
            _write(scratch / f"{split.name}.parquet", islice(rows, count), schema_of(published), tally)
            if not tally.rows:
                raise ValueError(f"{_origin_words(tally)} gives no row to {split.name}: {_reasons(tally)}.")
            progress.update(advance=1)
        _put(scratch, out, tallies, force)
    write_whole(out / CARD, json.dumps(_card(published, wording, count, tallies, out), indent=2) + "\n")
    _tell(published, tallies, out, count, console)
    return {name: out / f"{name}.parquet" for name in tallies}


def choose_splits(published: Published, names: Sequence[str]) -> list[Split]:
    """Splits by name, the usual ones for no name.

    Raises:
        ConfigError: there is no such split.
    """
    known = {split.name: split for split in published.splits}
    for name in names:
        if name not in known:
            words = ", ".join(known)
            raise ConfigError(f"{published.name} has no split {name}: it has {words}.{did_you_mean(name, known)}")
    return [known[name] for name in dict.fromkeys(names)] or [split for split in published.splits if split.usual]


# ---------------------------------------------------------------------- writing


def _write(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema, tally: Tally) -> None:
    """Stream rows into a file, some at a time: a set may be larger than memory."""
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(rows, _GROUP)):
            for row in group:
                tally.add(row)
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    tally.sha256 = digest_of(path)


def _put(scratch: Path, out: Path, tallies: dict[str, Tally], force: bool) -> None:
    """Give the files their names; none if one is in the way."""
    for name, tally in tallies.items():
        tally.status = _status(out / f"{name}.parquet", scratch / f"{name}.parquet", tally.sha256)
    blocked = [str(out / f"{name}.parquet") for name, tally in tallies.items() if tally.status == "replaced"]
    if blocked and not force:
        raise FileExistsError(
            f"{', '.join(blocked)} exists with other content: use --force to replace it or choose another --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, tally in tallies.items():
        if tally.status == "unchanged":
            tally.sha256 = digest_of(out / f"{name}.parquet")
        else:
            put_file(scratch / f"{name}.parquet", out / f"{name}.parquet")


def _status(path: Path, made: Path, digest: str) -> str:
    if not path.exists():
        return "written"
    if digest_of(path) == digest:
        return "unchanged"
    try:  # another version of pyarrow writes the same rows as other bytes
        small = made.stat().st_size < _COMPARED
        return "unchanged" if small and pq.read_table(path).equals(pq.read_table(made)) else "replaced"
    except (pa.ArrowException, OSError):
        return "replaced"


def _card(
    published: Published, wording: Wording, count: int | None, tallies: dict[str, Tally], out: Path
) -> dict[str, Any]:
    """What the folder holds; splits that were made before stay in it."""
    splits = {split.name: split for split in published.splits}
    try:
        before = json.loads((out / CARD).read_text())["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    made = {
        name: {
            "file": f"{name}.parquet",
            "sha256": tally.sha256,
            "rows": tally.rows,
            "questions": len(tally.answers),
            "questions_with_different_answers": len(tally.contested),
            "rows_published": splits[name].rows or None,
            "rows_read": tally.read,
            "filter": [keep.words for keep in splits[name].keeps],
            "dropped": dict(tally.dropped.most_common()),
            "count": count,
            "sources": tally.sources,
        }
        for name, tally in tallies.items()
    }
    return {
        "name": published.name,
        "title": published.title,
        "licence": published.licence,
        "made_by": f"opd-ext {__version__}",
        "data_source": published.data_source + wording.source_label,
        "grader": published.grader or None,
        "wording": (wording.prompt or published.wording) + ("-reminder" if wording.eval_suffix else ""),
        "columns": {key: list(names) for key, names in published.columns.items()},
        "splits": {name: entry for name, entry in before.items() if (out / f"{name}.parquet").exists()} | made,
        "note": published.note,
    }


# ---------------------------------------------------------------------- telling


def _origin_words(tally: Tally) -> str:
    return ", ".join(source["file"] for source in tally.sources) or "the source"


def _reasons(tally: Tally) -> str:
    return "; ".join(f"{reason} ({count:,})" for reason, count in tally.dropped.most_common()) or "it is too small"


def _tell(published: Published, tallies: dict[str, Tally], out: Path, count: int | None, console: Console) -> None:
    table = Table(title=f"{published.title} ({published.licence}) in {out}", title_justify="left")
    table.add_column("file", no_wrap=True)
    table.add_column("")
    for heading in ("rows read", "rows", "questions", "longest prompt\ncharacters"):
        table.add_column(heading, justify="right")
    table.add_column("rows dropped")
    for name, tally in tallies.items():
        reasons = "; ".join(f"{number:,}: {reason}" for reason, number in tally.dropped.most_common())
        numbers = (tally.read, tally.rows, len(tally.answers), max(tally.lengths))
        table.add_row(f"{name}.parquet", tally.status, *(f"{number:,}" for number in numbers), reasons or "none")
    console.print(table)
    console.print("SHA-256, as `sha256sum -c` reads it:", highlight=False)
    for name, tally in tallies.items():
        console.print(f"{tally.sha256}  {name}.parquet", soft_wrap=True, highlight=False)
    for line in _warnings(published, tallies, count):
        console.print(f"WARNING: {line}", soft_wrap=True, highlight=False)


def _warnings(published: Published, tallies: dict[str, Tally], count: int | None) -> Iterator[str]:
    sources = (source for tally in tallies.values() for source in tally.sources)
    for file in sorted({source["file"] for source in sources if not source.get("published", True)}):
        yield f"{file} is not the published file: rows and split may differ from published runs."
    splits = {split.name: split for split in published.splits}
    for name, tally in tallies.items():
        if count is None and splits[name].rows not in (0, tally.rows):
            yield f"{name} has {tally.rows:,} rows, {splits[name].rows:,} are published."
        if tally.contested:
            yield f"{name} has {len(tally.contested):,} questions with different answers."
        elif tally.rows > len(tally.answers):
            yield f"{name} has {tally.rows:,} rows, {len(tally.answers):,} questions."
