# SPDX-License-Identifier: Apache-2.0
"""What happened in a batch of rollouts: one plain row per sample, and the metrics that follow from the rows."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import transfer_queue as tq
from transfer_queue import KVBatchMeta

from opd_ext.bridge.failures import FAILURE
from opd_ext.bridge.turns import ANSWERED, OUT_OF_TURNS, TURNS
from opd_ext.estimators import pass_at_k
from opd_ext.moved import old_functions
from opd_ext.seeds import Copies
from opd_ext.tokens.texts import decode

ANNOTATION = "opd_annotation"
"""Under which name the agent loop leaves an annotation beside a rollout."""

STOPPED = "opd_stopped"
"""Under which name the agent loop says whether a rollout was stopped at the horizon; absent where there is none."""

__getattr__ = old_functions(__name__)

_OF_TURNS = ("turns", "environment_tokens", "tool_calls", "tool_failures", "ignored_calls", "ended")
_FIELDS = ["prompts", "responses", "rm_scores", "data_source", "reward_model", "extra_info", "extra_fields"]


def read_rows(batch: KVBatchMeta, tokenizer: Any, max_tokens: int, stops: Collection[int]) -> list[dict[str, Any]]:
    """One row per trajectory of ``batch``, in its order.

    Returns:
        Rows with ``uid``, ``sample``, ``index``, ``data_source``, ``difficulty``, ``input``, ``output``,
        ``response_tokens`` (those that the model wrote), ``truncated`` (without an answer: out of tokens, or turns),
        of an agent with tools ``turns``, ``environment_tokens``, ``tool_calls``, ``tool_failures``, ``ignored_calls``
        and ``ended``, ``stopped`` (where there is a horizon), ``failed`` (an exception in words,
        or None), ``score``, every key of the
        grader (``acc``, ``feedback``, ...), ``ground_truth`` and, where an annotator has been at work, its
        ``annotation``.
    """
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=_FIELDS)
    scores = [row.sum().item() for row in data["rm_scores"].unbind()]
    prompts, responses = ([row.tolist() for row in data[name].unbind()] for name in ("prompts", "responses"))
    asked = list(dict.fromkeys(map(tuple, prompts)))  # the samples of a problem share theirs
    inputs = dict(zip(asked, decode(tokenizer, asked, skip_special_tokens=True), strict=True))
    outputs = decode(tokenizer, responses, skip_special_tokens=True)
    rows = []
    for i, key in enumerate(batch.keys):
        uid, sample, _ = key.rsplit("_", 2)
        extra_info = dict(_item(data, "extra_info", i) or {})
        extra_fields = _item(data, "extra_fields", i) or {}
        grade = dict(extra_fields.get("reward_extra_info") or {})
        tokens, turns = responses[i], extra_fields.get(TURNS)
        rows.append(
            {
                "uid": uid,
                "sample": int(sample),
                "index": extra_info.get("index"),
                "data_source": _item(data, "data_source", i),
                "difficulty": extra_info.get("difficulty"),
                "input": inputs[tuple(prompts[i])],
                "output": outputs[i],
                "response_tokens": turns["written"] if turns else len(tokens),
                "truncated": turns["ended"] != ANSWERED if turns else is_truncated(tokens, stops, max_tokens),
                **({name: turns[name] for name in _OF_TURNS} if turns else {}),
                **({"stopped": bool(extra_fields[STOPPED])} if STOPPED in extra_fields else {}),
                "failed": extra_fields.get(FAILURE),
                "score": scores[i],
                **grade,
                "acc": float(grade.get("acc", scores[i])),
                "ground_truth": (_item(data, "reward_model", i) or {}).get("ground_truth"),
                **({"annotation": extra_fields[ANNOTATION]} if ANNOTATION in extra_fields else {}),
            }
        )
    return rows


_INPUTS = ["prompts", "responses", "loss_mask", "raw_prompt", "extra_info"]


def read_tokens(batch: KVBatchMeta, log_probs: bool) -> list[dict[str, Any]]:
    """What :mod:`opd_ext.recorded` keeps of each trajectory of ``batch``, in its order: ids, not texts.

    Args:
        log_probs: whether the sampler has left those of the sampled tokens.
    """
    fields = [*_INPUTS, *(["rollout_log_probs"] if log_probs else [])]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    columns = {name: [row.tolist() for row in data[name].unbind()] for name in fields if name not in _INPUTS[3:]}
    rows = []
    for i, key in enumerate(batch.keys):
        uid, sample, _ = key.rsplit("_", 2)
        found = {name: values[i] for name, values in columns.items()}
        if all(found["loss_mask"]):
            found.pop("loss_mask")
        messages, extra_info = plain(_item(data, "raw_prompt", i)), _item(data, "extra_info", i)
        rows.append({"uid": uid, "sample": int(sample), **found, "raw_prompt": messages, "extra_info": extra_info})
    return rows


def token_classes(tokenizer: Any, stops: list[int]) -> dict[str, list[int]]:
    """Ids whose divergence is reported apart: ends of a response, and thinking tokens where there are such."""
    vocabulary = tokenizer.get_vocab()
    think = [vocabulary[token] for token in ("<think>", "</think>") if token in vocabulary]
    return {"eos": stops, **({"think": think} if think else {})}


def is_truncated(response: Sequence[int], stops: Collection[int], max_tokens: int) -> bool:
    """Whether a response used all of ``max_tokens`` without sampling one of ``stops``, which end it."""
    return len(response) >= max_tokens and not (response and response[-1] in stops)


def _item(data: Any, name: str, i: int) -> Any:
    values = data.get(name, None)
    if values is None:
        return None
    return values.tolist()[i] if hasattr(values, "tolist") else list(values)[i]


def first_draws(prompts: Iterable[Any], copies: Copies, n: int) -> np.ndarray:
    """(prompts,) objects: how many samples equal prompts of the set before have; a prompt's own samples follow them.

    So eight copies of a row sampled once are what one row sampled eight times is.
    """
    return np.array([earlier * n for earlier in copies.earlier(map(plain, prompts))], dtype=object)


def plain(prompt: Any) -> list[dict[str, Any]]:
    """The chat messages of a prompt, whatever a data set or a queue has wrapped them in."""
    return [dict(message) for message in getattr(prompt, "data", prompt)]


def summarise(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Accuracy, response lengths (tokens), truncation and empty responses; pass@k and other accuracies if there are.

    Every problem weighs the same, however often it was sampled.
    """
    if not rows:
        return {}
    weights = _problem_weights(rows)

    def mean(values: Any) -> float:
        return float(np.average(values, weights=weights))

    tokens = np.array([row["response_tokens"] for row in rows])
    accuracy = mean([row["acc"] for row in rows])
    metrics = {
        **({f"{prefix}/accuracy": accuracy} if math.isfinite(accuracy) else {}),  # nothing is graded: there is none
        f"{prefix}/tokens_mean": mean(tokens),
        f"{prefix}/tokens_min": float(tokens.min()),
        f"{prefix}/tokens_max": float(tokens.max()),
        f"{prefix}/truncated": mean([row["truncated"] for row in rows]),
        f"{prefix}/empty": mean(tokens == 0),
        f"{prefix}/samples": float(len(rows)),
    }
    for key in ("acc_strict", "acc_answer_only", "acc_boxed_only", "format_ok"):
        if any(key in row for row in rows):  # not in those that could not be graded, which are wrong
            metrics[f"{prefix}/{key}"] = mean([row.get(key, 0.0) for row in rows])
    if any("stopped" in row for row in rows):  # not in those that failed
        metrics[f"{prefix}/stopped"] = mean([row.get("stopped", False) for row in rows])
    metrics |= _of_turns([row for row in rows if "turns" in row], prefix)
    return metrics | (_pass_at_k(rows, prefix) if math.isfinite(accuracy) else {})


def _of_turns(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """What agents with tools did; nothing where none was at work."""
    if not rows:
        return {}
    calls = sum(row["tool_calls"] for row in rows)
    return {
        f"{prefix}/turns_mean": float(np.mean([row["turns"] for row in rows])),
        f"{prefix}/environment_tokens_mean": float(np.mean([row["environment_tokens"] for row in rows])),
        f"{prefix}/tool_calls_mean": calls / len(rows),
        f"{prefix}/tool_failures": sum(row["tool_failures"] for row in rows) / calls if calls else 0.0,
        f"{prefix}/ignored_calls": float(np.mean([row["ignored_calls"] > 0 for row in rows])),
        f"{prefix}/out_of_turns": float(np.mean([row["ended"] == OUT_OF_TURNS for row in rows])),
    }


def summarise_by_source(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """:func:`summarise` of all rows and, as ``<prefix>/<source>/...``, of each data source if there are several."""
    by_source = summarise_sources(rows, prefix) if len({row["data_source"] for row in rows}) > 1 else {}
    return summarise(rows, prefix) | by_source


def summarise_sources(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """:func:`summarise` of each data source, as ``<prefix>/<source>/...``, and of nothing else."""
    metrics: dict[str, float] = {}
    for source in sorted({row["data_source"] for row in rows}):
        metrics |= summarise([row for row in rows if row["data_source"] == source], f"{prefix}/{source}")
    return metrics


def _problem_weights(rows: list[dict[str, Any]]) -> list[float] | None:
    """What each row counts in a mean over problems; None where all of them were sampled alike."""
    samples = Counter(row.get("uid") for row in rows)
    return None if len({*samples.values()}) == 1 else [1 / samples[row.get("uid")] for row in rows]


def _pass_at_k(rows: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    """``<prefix>/pass_at_<k>`` for k = 2, 4, ... and n, where every problem was sampled the same n > 1 times."""
    right: dict[tuple, list[bool]] = {}
    for row in rows:
        if row.get("index") is None:  # nothing tells which samples belong to one problem
            return {}
        right.setdefault((row["data_source"], row["index"]), []).append(row["acc"] > 0.5)
    sizes = {len(samples) for samples in right.values()}
    if len(sizes) != 1 or sizes == {1}:
        return {}
    (n,) = sizes
    ks = sorted({*(2**i for i in range(1, n.bit_length())), n})
    return {f"{prefix}/pass_at_{k}": float(np.mean([pass_at_k(n, sum(s), k) for s in right.values()])) for k in ks}
