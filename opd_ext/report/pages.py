# SPDX-License-Identifier: Apache-2.0
"""A report of headed tables and figures: printed, and written as Markdown, as one HTML page and as PNG files."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from rich import box
from rich.console import Console
from rich.table import Table

from opd_ext.files import write_whole
from opd_ext.terminal import LOG_WIDTH, terminal


@dataclass
class Section:
    """A sentence or two, and below them a table, a figure, or both."""

    title: str
    text: str = ""
    head: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    picture: bytes | None = None  # PNG

    @property
    def file(self) -> str:
        """Name of the picture's file."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()) + ".png"

    @property
    def encoded(self) -> str:
        return base64.b64encode(self.picture or b"").decode()


def write_pages(
    folder: Path, title: str, sections: Sequence[Section], records: dict[str, Any], console: Console | None = None
) -> None:
    """Print the tables; write ``report.{md,html,json}`` and the figures into ``folder``, each file as a whole.

    Args:
        records: the numbers behind the report, for ``report.json``.
    """
    console = console or terminal(LOG_WIDTH)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}"]
    for section in sections:
        console.print(f"\n{section.title}", style="bold", highlight=False)
        lines += ["", f"## {section.title}"]
        if section.text:
            console.print(section.text, highlight=False)
            lines += ["", section.text]
        if section.head:
            _print_table(section, console)
            lines += [
                "",
                *(f"| {' | '.join(row)} |" for row in (section.head, ["---"] * len(section.head), *section.rows)),
            ]
        if section.picture:
            write_whole(folder / section.file, section.picture)
            lines += ["", f"![{section.title}]({section.file})"]
    page = Environment(loader=PackageLoader("opd_ext.report"), autoescape=select_autoescape(default=True))
    html = page.get_template("pages.html.j2").render(title=title, sections=sections)
    write_whole(folder / "report.md", "\n".join(lines) + "\n")
    write_whole(folder / "report.html", html)
    write_whole(folder / "report.json", (json.dumps(records, indent=2) + "\n").encode())
    console.print(f"\nWritten: {folder / 'report'}.{{md,html,json}}", soft_wrap=True, highlight=False)


def _print_table(section: Section, console: Console) -> None:
    shown = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0))
    for index, name in enumerate(section.head):
        shown.add_column(name, justify="right" if index else "left")
    for row in section.rows:
        shown.add_row(*row)
    console.print(shown)
