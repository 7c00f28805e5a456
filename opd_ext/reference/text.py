# SPDX-License-Identifier: Apache-2.0
"""Markdown that reads well in a terminal: entries of short lines instead of tables with long ones."""

import textwrap

WIDTH = 100


def wrap(text: str, indent: str = "") -> str:
    """Lines of at most :data:`WIDTH` characters, the first after ``indent``, the others below it."""
    further = " " * len(indent)
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )


def names(found: list[str]) -> str:
    """Comma-separated code."""
    return ", ".join(f"`{name}`" for name in found)
