# SPDX-License-Identifier: Apache-2.0
"""How long responses are where nobody says, and what a validation samples."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ext.data.catalogue import set_name

# Mean tokens of a response where nobody says: of a model that thinks, most of a short limit; of another a quarter.
_THINKING, _THINKING_SHARE, _PLAIN_SHARE, _SHORT = 10_000, 0.8, 0.25, 950
# Problems of validation sets of `opd data`, and mean tokens of a response: thinking or not. Published and
# measured means of Qwen3-8B; AIME's of 2025 are longer.
_SETS = {"math500": (500, 4900, 1100), "aime24": (30, 14_200, 5000), "aime25": (30, 16_300, 5700)}
UNKNOWN_ROWS = 500  # of a file that is not here


@dataclass(frozen=True)
class Validation:
    """A validation set: its samples and their lengths."""

    name: str
    problems: int
    samples: int
    mean: float
    known: bool  # whether somebody has counted its problems


def asked_to_think(template: Mapping[str, Any] | None, model: str) -> bool:
    """Whether responses hold a chain of thought: the template asks for it, and the model was trained to."""
    wanted = bool((template or {}).get("enable_thinking", False))
    return wanted and not re.search(r"-(base|instruct)\b", str(model).lower())


def mean_response(limit: int, thinks: bool) -> float:
    """Tokens of a response where nobody says: of a limit of ``limit`` tokens."""
    if thinks:
        return min(_THINKING_SHARE * limit, _THINKING)
    return max(_PLAIN_SHARE * limit, min(limit, _SHORT))


def validation_sets(
    files: Any, samples: Callable[[str], int], limit: int, thinks: bool, mean: float | None
) -> tuple[Validation, ...]:
    """The sets of a full validation; rows are counted where a file is on this machine.

    Args:
        samples: of a problem, by the set's name; a file's is taken for its ``data_source``.
    """
    paths: Sequence[str] = [files] if isinstance(files, str) else list(files or ())
    found = []
    for path in paths:
        name = set_name(Path(path))
        rows, long, short = _SETS.get(name, (None, None, None))
        counted = rows_of(Path(path).expanduser())
        problems = counted or rows or UNKNOWN_ROWS
        length = mean or (long if thinks else short) or mean_response(limit, thinks)
        found.append(Validation(name, problems, problems * samples(name), min(length, limit), bool(counted or rows)))
    return tuple(found)


def rows_of(path: Path) -> int | None:
    """Rows of a parquet file; None where there is no such file here."""
    if path.suffix != ".parquet" or not path.is_file():
        return None
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).metadata.num_rows
