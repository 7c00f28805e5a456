# SPDX-License-Identifier: Apache-2.0
"""Grader of tool calls written as text, ``Action:`` and ``Action Input:``, as SDPO (arXiv 2601.20802) trains on
ToolAlpaca.

The feedback says what is wrong with the form of a call and nothing else. The release names the right action in it, so
that a teacher that reads it has read the answer.
"""

import json
import re
from collections import Counter
from functools import lru_cache
from typing import Any, NamedTuple

_CALL = re.compile(
    r"^[ \t>*_#-]*Action(?:[ \t]*\d+)?[*_ \t]*:(?P<name>[^\n]*)\n\s*"
    r"[>*_-]*[ \t]*Action[ _]?Input(?:[ \t]*\d+)?[*_ \t]*:[*_ \t]*(?:\s*```\w*)?",
    re.MULTILINE | re.IGNORECASE,
)
_OPTIONAL = re.compile(r"[\[(]\s*optional\s*[\])]\s*", re.IGNORECASE)
LONGEST = 100_000
"""Characters of a response that are read, from its end; no call is as long."""

NO_CALL = (
    "Incorrect Format: there is no tool call. Write a line 'Action: ' with the name of a tool, and after it a line "
    "'Action Input: ' with a JSON object."
)
NO_JSON = "Incorrect Format: the action input is no JSON object."


class Call(NamedTuple):
    """One call: the tool, its arguments as canonical JSON, and whether the reference lets it be left out."""

    name: str
    arguments: str
    optional: bool = False


def compute_score(
    data_source,
    solution_str,
    ground_truth,
    extra_info=None,
    *,
    merged: bool = False,
    reward_router_address=None,
    reward_model_tokenizer=None,
) -> dict[str, float | str]:
    """Grade one response; the signature is that of verl's custom reward functions.

    Args:
        data_source: named in errors only; ``extra_info`` is ignored, as is what verl adds beside a reward model.
        solution_str: the decoded response; its calls, after the thinking, must be the reference's, in any order.
        ground_truth: JSON, a list of ``{"Action": name, "Action_Input": JSON text}``. A name that begins with
            ``[Optional]`` may be left out.
        merged: the release's rule: the names must be the same, and the arguments of all calls, merged into one object
            in which later ones win. It takes a wrong call for right where the last one repeats its arguments. Set it
            with ``reward.custom_reward_function.reward_kwargs``.

    Returns:
        ``score`` = ``acc`` (1.0 right, 0.0 wrong), ``feedback`` (empty, unless a call is not written as asked) and
        ``format_ok`` (1.0 if there is a call, and the input of each is a JSON object).

    Raises:
        ValueError: the reference is none.

    >>> reference = '[{"Action": "f", "Action_Input": "{\\\\"x\\\\": {\\\\"y\\\\": 1}}"}]'
    >>> compute_score("tooluse", 'Thought: so\\nAction: f\\nAction Input: {"x": {"y": 1}}', reference)["score"]
    1.0
    >>> compute_score("tooluse", 'Action: g\\nAction Input: {"x": {"y": 1}}', reference)["feedback"]
    ''
    """
    wanted = check_reference(ground_truth, f"data source {data_source!r}: ")
    calls = stated_calls(solution_str or "")
    fault = NO_CALL if not calls else NO_JSON if None in calls else ""
    given = [call for call in calls if call is not None]
    right = not fault and (_merged(given, wanted) if merged else _matched(given, wanted))
    return {"score": float(right), "acc": float(right), "feedback": fault, "format_ok": float(not fault)}


def final_answer(response: str) -> str | None:
    """The calls of a response as one text, whatever their order, which is its vote; None if one cannot be read."""
    calls = stated_calls(response)
    if not calls or None in calls:
        return None
    return json.dumps(sorted([call.name, call.arguments] for call in calls if call is not None))


def stated_calls(response: str) -> list[Call | None]:
    """The calls of a response, in order; None for one whose input is no JSON object."""
    text = response.rpartition("</think>")[2].replace("\r\n", "\n")[-LONGEST:]
    calls: list[Call | None] = []
    for found in _CALL.finditer(text):
        rest = text[found.end() :].lstrip()
        name = found["name"].strip("*_`\"' \t.")
        try:
            arguments = json.JSONDecoder().raw_decode(rest)[0]
        except (ValueError, RecursionError):
            arguments = None
        calls.append(_call(name, arguments) if isinstance(arguments, dict) else None)
    return calls


@lru_cache(maxsize=1024)
def check_reference(ground_truth: str, name: str = "") -> tuple[Call, ...]:
    """The calls of a reference.

    Args:
        name: put before what is wrong.

    Raises:
        ValueError: it is no list of calls, or the input of one is no JSON object.
    """
    try:
        found = json.loads(ground_truth)
        if not isinstance(found, list) or not found:
            raise ValueError
        calls = []
        for entry in found:
            given = entry["Action_Input"]
            arguments = json.loads(given) if isinstance(given, str) else given
            if not isinstance(entry["Action"], str) or not isinstance(arguments, dict):
                raise ValueError
            calls.append(_call(entry["Action"], arguments))
    except (TypeError, ValueError, KeyError):
        raise ValueError(
            f"{name}the ground_truth {ground_truth!r:.60} must be a JSON list of objects with Action, a name, and "
            "Action_Input, a JSON object"
        ) from None
    if all(call.optional for call in calls):
        raise ValueError(f"{name}every call of the ground_truth {ground_truth!r:.60} is optional: nothing is asked for")
    return tuple(calls)


def _call(name: str, arguments: dict[str, Any]) -> Call:
    bare = _OPTIONAL.sub("", name).strip()
    return Call(bare, json.dumps(_plain(arguments), sort_keys=True), bare != name.strip())


def _plain(value: Any) -> Any:
    """1.0 is 1 in JSON; true is not."""
    if isinstance(value, dict):
        return {key: _plain(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_plain(below) for below in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _matched(given: list[Call], wanted: tuple[Call, ...]) -> bool:
    ours = Counter(call[:2] for call in given)
    everything = Counter(call[:2] for call in wanted)
    needed = Counter(call[:2] for call in wanted if not call.optional)
    return needed <= ours <= everything


def _merged(given: list[Call], wanted: tuple[Call, ...]) -> bool:
    names = Counter(call.name for call in given)
    needed = [call for call in wanted if not call.optional]
    return any(
        names == Counter(call.name for call in chosen) and _union(given) == _union(chosen)
        for chosen in (wanted, needed)
    )


def _union(calls: Any) -> dict[str, Any]:
    union: dict[str, Any] = {}
    for call in calls:
        union |= json.loads(call.arguments)
    return union
