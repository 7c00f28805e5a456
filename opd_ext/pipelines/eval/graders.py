# SPDX-License-Identifier: Apache-2.0
"""Where a run's own grader counts: on data that the run knows. It would grade any other set wrongly, or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opd_ext.pipelines.settings import RewardConfig


def with_own(graders: Mapping[str, RewardConfig], run: Mapping[str, Any]) -> dict[str, RewardConfig]:
    """The graders by data source, with those of a run in their places.

    The run's grader stands for the data sources of its files. Of a family of sources that the same module grades, other
    tasks of reasoning-gym say, it stands for all: the run's function and arguments are what it was trained with. What
    somebody has set for a source by its name stays.

    Args:
        run: configuration of a run of `opd train`; empty for a model that is none.
    """
    own = RewardConfig.of_run(run) if run else RewardConfig()
    if not own.path:
        return dict(graders)
    known = {source: own for key in ("val_files", "train_files") for source in _sources(files_of(run, key))}
    families = {key: own if "*" in key and each.path == own.path else each for key, each in graders.items()}
    return known | families


def files_of(run: Mapping[str, Any], key: str) -> list[str]:
    """The files of a run's `data.<key>`, one or several."""
    files = run["data"][key]
    return [str(file) for file in (files if isinstance(files, list) else [files]) if file]


def _sources(files: list[str]) -> set[str]:
    """The data sources in those of the files that are still there."""
    found: set[str] = set()
    for file in map(Path, files):
        try:
            column = pq.read_table(file, columns=["data_source"])["data_source"]
        except (OSError, pa.ArrowException):
            continue
        found |= set(map(str, column.unique().drop_null().to_pylist()))
    return found
