# SPDX-License-Identifier: Apache-2.0
"""Sampled programs as LiveCodeBench's own evaluator reads them, for numbers to quote."""

import json
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from opd_ext.errors import ConfigError
from opd_ext.files import write_whole
from opd_ext.pipelines.problems import load_tokenizer
from opd_ext.rewards.code.blocks import program_of


def export_programs(run: Path, samples: str, problems: Path | None = None, out: Path | None = None) -> Path:
    """Write ``[{"question_id": ..., "code_list": [...]}]``, a program per sample, in the order of problems.

    Args:
        run: the folder of an SSD run.
        samples: name of a file in its ``evaluate/samples``, e.g. ``ssd-report-T1.1``.
        problems: what was sampled; by default ``evaluate.file`` of the run.
        out: the file, by default ``<samples>.json`` in the working directory.

    Raises:
        ConfigError: one sentence: no such run, samples or problems, or problems without ids.
    """
    try:
        config = OmegaConf.load(run / "config.yaml")
    except OSError:
        raise ConfigError(f"{run} is no folder of a run: it has no config.yaml.") from None
    file = run / "evaluate" / "samples" / f"{samples}.parquet"
    if not file.is_file():
        there = ", ".join(sorted(path.stem for path in file.parent.glob("*.parquet"))) or "none"
        raise ConfigError(f"{run} has no samples {samples}: it has {there}.")
    asked = Path(problems or OmegaConf.select(config, "evaluate.file") or "")
    if not asked.is_file():
        raise ConfigError(f"{asked} is not there: name the problems that were sampled with --problems.")
    extra = pd.read_parquet(asked, columns=["extra_info"])["extra_info"]
    ids = [(info or {}).get("question_id") for info in extra]
    if not all(ids):
        raise ConfigError(f"{asked} has rows without extra_info.question_id, by which the evaluator knows problems.")
    rows, tokenizer = pd.read_parquet(file), load_tokenizer(config.model)
    texts = tokenizer.batch_decode([list(row) for row in rows["response_ids"]], skip_special_tokens=True)
    rows = rows.assign(code=[program_of(text) or "" for text in texts])
    found = [{"question_id": ids[int(uid)], "code_list": list(of["code"])} for uid, of in rows.groupby("uid")]
    out = out or Path(f"{samples}.json")
    write_whole(out, json.dumps(found, indent=1) + "\n")
    return out
