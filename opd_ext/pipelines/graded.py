# SPDX-License-Identifier: Apache-2.0
"""Whether a grader takes the rows that it will be given, before anything is sampled for it."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd

from opd_ext.pipelines.problems import load_grader, refused
from opd_ext.pipelines.settings import RewardConfig
from opd_ext.rewards.load import load_function


def check_rows(file: str, rows: pd.DataFrame, grader_of: Callable[[str], RewardConfig]) -> None:
    """Load the grader of every data source, show it the references, and let it grade an empty response to the first.

    Args:
        file: where the rows are from, for the sentence of a refusal.
        rows: of :func:`opd_ext.pipelines.problems.read_problems`, with ``data_source`` and ``reward_model``.
        grader_of: data source -> its grader.

    Raises:
        ConfigError: a grader does not load, or refuses a row.
    """
    for source, part in rows.groupby(rows["data_source"].map(str), sort=True):
        settings = grader_of(str(source))
        grade = load_grader(settings)
        if check := _reference_check(settings):
            for place, model in zip(part["uid"], part["reward_model"], strict=True):
                with _refusing(file, place, source, settings):
                    check(model["ground_truth"])
        row = part.iloc[0]
        extra = {**(row.get("extra_info") or {}), "truncated": False}
        with _refusing(file, row["uid"], source, settings):
            grade(row["data_source"], "", row["reward_model"]["ground_truth"], extra)


def _reference_check(settings: RewardConfig) -> Callable[[str], Any] | None:
    module = inspect.getmodule(load_function(settings.path, settings.name)) if settings.path else None
    return getattr(module, "check_reference", None)


@contextmanager
def _refusing(file: str, place: str, source: object, settings: RewardConfig) -> Iterator[None]:
    try:
        yield
    except ConnectionError:  # a judge that is not up yet is nothing that is wrong with a row
        return
    except Exception as error:
        raise refused(f"{file}: row {int(place)} of {source}", settings.path, error) from None
