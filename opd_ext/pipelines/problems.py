# SPDX-License-Identifier: Apache-2.0
"""From files in verl's format to prompts as token ids, and from sampled ids to grades."""

import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Template
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from opd_ext.context import render as render_chat
from opd_ext.errors import ConfigError
from opd_ext.pipelines.settings import PromptsConfig, RewardConfig
from opd_ext.rewards.load import load_function
from opd_ext.tokens import texts

_PER_PROCESS = 2_000  # responses from which another process pays for its start
_LOOK = 1 << 20  # bytes
_CONTENT = (".safetensors", ".bin", ".json")


@cache
def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, loaded once per process.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model} has no tokenizer that loads: {' '.join(str(error).split())}") from None


AGENT = "agent_name"
"""verl's column of rows that an agent loop of their own answers."""


def read_problems(settings: PromptsConfig) -> pd.DataFrame:
    """Rows of ``settings.file`` in verl's format, with a ``uid`` (their place in the file) each.

    Duplicates are told by the last message with its white space normalised; the first of them stays.

    Raises:
        ConfigError: a column that is needed is missing, or nothing is left.
    """
    rows = pd.read_parquet(settings.file)
    if "prompt" not in rows:
        raise ConfigError(f"{settings.file} has no column `prompt` with chat messages.")
    rows.insert(0, "uid", [f"{index:06d}" for index in range(len(rows))])
    if settings.deduplicate:
        statements = rows["prompt"].map(lambda messages: statement_key(messages[-1]["content"]))
        rows = rows[~statements.duplicated()]
    rows = rows.head(settings.count) if settings.count is not None else rows
    if not len(rows):
        raise ConfigError(f"{settings.file} leaves no prompt; look at prompts.count.")
    return rows.reset_index(drop=True)


def check_columns(file: str, graded: bool, worded: bool = False) -> None:
    """Raises ConfigError if a file in verl's format lacks what prompts, grades or a wording are made of."""
    needed = ["prompt", *(["data_source", "reward_model"] if graded else [])]
    schema = pq.read_schema(file)
    if missing := [name for name in needed if name not in schema.names]:
        raise ConfigError(f"{file} has no column {missing[0]}; verl's format has prompt, data_source and reward_model.")
    if AGENT in schema.names:
        loops = set(pq.read_table(file, columns=[AGENT])[AGENT].unique().to_pylist()) - {"single_turn_agent"}
        if loops:
            raise ConfigError(
                f"{file} is for an agent of several turns ({AGENT}={sorted(map(str, loops))[0]}), and here a model "
                "answers at once: validate on it in a run, with trainer.val_only=true."
            )
    extra = schema.field("extra_info").type if "extra_info" in schema.names else None
    if worded and not (pa.types.is_struct(extra) and extra.get_field_index("starter_code") >= 0):
        raise ConfigError(
            f"{file} has no extra_info.starter_code, which chooses the prompts.wording: add it, null for programs that "
            "read standard input, or ask as the file does with ~prompts.wording."
        )


def fingerprint(model: str, suffixes: tuple[str, ...] = _CONTENT) -> str:
    """What a model is, without reading all of it: names, sizes, beginnings and ends of its files; a hub id as it is."""
    if not Path(model).is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(model).iterdir() if path.suffix in suffixes):
        size = file.stat().st_size
        digest.update(f"{file.name}/{size}/".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_LOOK))
            handle.seek(max(0, size - _LOOK))
            digest.update(handle.read())
    return digest.hexdigest()[:16]


def render_prompts(rows: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, settings: PromptsConfig) -> pd.DataFrame:
    """``uid`` and ``prompt_ids`` up to where the assistant begins, through the chat template, once."""
    system = [{"role": "system", "content": settings.system}] if settings.system else []
    ids = []
    for uid, messages in zip(rows["uid"], worded(rows, settings), strict=True):
        try:
            ids.append(render_chat(tokenizer, system + messages, settings.template))
        except Exception as error:  # a template may raise whatever it likes
            raise ConfigError(f"{settings.file}: the chat template refuses row {uid}: {str(error).strip()}.") from error
    return pd.DataFrame({"uid": rows["uid"], "prompt_ids": ids})


def worded(rows: pd.DataFrame, settings: PromptsConfig) -> list[list[dict[str, str]]]:
    """The messages of every row, the last asked in the words of ``settings``, if they have any.

    Those words stand around the row's bare question, so that they replace the words of the row.
    """
    chats = [list(messages) for messages in rows["prompt"]]
    if not settings.wording:
        return chats
    texts = {kind: Template(text, keep_trailing_newline=True) for kind, text in settings.wording.items()}
    for messages, info in zip(chats, rows["extra_info"], strict=True):
        code = (info or {}).get("starter_code") or ""
        text = texts["function" if code.strip() else "stdin"]
        question = (info or {}).get("question") or messages[-1]["content"]
        messages[-1] = {**messages[-1], "content": text.render(question=question, starter_code=code)}
    return chats


def check_lengths(prompts: pd.DataFrame, max_tokens: int, max_model_len: int, key: str) -> None:
    """Raises ConfigError if a prompt and the longest response do not fit into the engine together."""
    longest = int(prompts["prompt_ids"].map(len).max())
    if longest + max_tokens > max_model_len:
        raise ConfigError(
            f"The longest prompt has {longest} tokens and {key}={max_tokens}: together more than "
            f"vllm.max_model_len={max_model_len}; raise that or lower {key}."
        )


def load_grader(settings: RewardConfig) -> Callable[..., Any]:
    """A function with verl's signature; verl's own, which looks at ``data_source``, without a path.

    Raises:
        ConfigError: there is no such module or function, it takes other arguments, or this machine lacks what it needs.
    """
    if settings.path is None:
        from opd_ext.bridge.graders import default_compute_score

        return default_compute_score
    try:
        function = load_function(settings.path, settings.name)
        inspect.signature(function).bind("", "", "", None, **settings.kwargs)
        if check := getattr(inspect.getmodule(function), "check_machine", None):
            check(**settings.kwargs)
        return partial(function, **settings.kwargs)
    except TypeError as error:
        raise ConfigError(f"reward.kwargs={settings.kwargs} does not fit {settings.path}: {error}.") from None
    except RuntimeError as error:  # of check_machine
        raise ConfigError(str(error)) from None
    except (ImportError, AttributeError, OSError) as error:
        raise ConfigError(
            f"reward.path={settings.path} with reward.name={settings.name} does not load: {error}."
        ) from None


def decode(samples: pd.DataFrame, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every response, without special tokens."""
    return texts.decode(tokenizer, [np.asarray(ids).tolist() for ids in samples["response_ids"]], True)


def grade(
    samples: pd.DataFrame, problems: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, settings: RewardConfig
) -> pd.DataFrame:
    """``uid, sample, acc, tokens, truncated`` of every response, in the order of ``samples``.

    ``acc`` is the grader's ``acc``, or its score; ``truncated`` whether the response ran into its limit. Further
    verdicts of the grader whose names begin with ``acc_`` follow as columns.

    Raises:
        ConfigError: the grader refuses a row.
    """
    of_uid = problems.set_index("uid")
    answers = decode(samples, tokenizer)
    work = []
    for uid, text, reason in zip(samples["uid"], answers, samples["finish_reason"], strict=True):
        row = of_uid.loc[uid]
        extra = {**(row.get("extra_info") or {}), "truncated": reason == "length"}
        work.append((row["data_source"], text, row["reward_model"]["ground_truth"], extra))
    processes = min(os.cpu_count() or 1, 1 + len(work) // _PER_PROCESS)
    if processes == 1:
        scores = list(map(_Grading(settings), work))
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            scores = list(pool.map(_Grading(settings), work, chunksize=64))
    verdicts = pd.DataFrame(scores, index=samples.index)
    table = pd.DataFrame(
        {
            "uid": samples["uid"],
            "sample": samples["sample"],
            "acc": verdicts.pop("acc"),
            "tokens": samples["response_ids"].map(len),
            "truncated": samples["finish_reason"] == "length",
        }
    )
    return table.join(verdicts)


def refused(row: str, grader: str | None, error: Exception) -> ConfigError:
    """What to say of a row that its grader does not take."""
    said = " ".join(str(error).split()).rstrip(".")
    said = said if isinstance(error, ValueError) and said else f"{type(error).__name__}: {said}"
    return ConfigError(
        f"{row} cannot be graded by {grader or 'verl'}: {said}; give its data source another grader, or mend the row."
    )


class _Grading:
    """A grader that is loaded where it is used, so that it can be sent to other processes."""

    def __init__(self, settings: RewardConfig):
        self._settings = settings

    def __call__(self, work: tuple[str, str, str, Any]) -> dict[str, float]:
        source, text, truth, extra = work
        settings = self._settings
        try:
            grade = _loaded_grader(settings.path, settings.name, json.dumps(settings.kwargs))
            result = grade(source, text, truth, extra)
        except ValueError as error:
            raise refused(f"A row of {source}", settings.path, error) from None
        if not isinstance(result, dict):
            return {"acc": float(result)}
        others = {name: float(value) for name, value in result.items() if name.startswith("acc_")}
        return {"acc": float(result.get("acc", result["score"])), **others}


@cache
def _loaded_grader(path: str | None, name: str, kwargs: str) -> Callable[..., Any]:
    return load_grader(RewardConfig(path, name, json.loads(kwargs)))


def statement_key(text: str) -> str:
    """A problem statement with its whitespace normalised; two problems with the same key are one."""
    return re.sub(r"\s+", " ", text).strip()
