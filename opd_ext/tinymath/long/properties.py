# SPDX-License-Identifier: Apache-2.0
"""What makes the second level a world in which methods can differ, measured on its models.

    python -m opd_ext.tinymath.long.properties [WORLD]

1. Responses are long. 2. The student has much to learn, and each of its teachers knows it. 3. Prefixes drift: on what
the student has written the teacher is ever less able to help, and the two differ most right behind a mistake. 4. One
line decides: a response with a single mistake that stays is nearly always wrong. 5. Feedback makes a retry succeed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opd_ext.context import prompts
from opd_ext.tinymath.long.grader import compute_score
from opd_ext.tinymath.long.problems import ANSWER_OPENING, MODULUS, parse, right_step, solve
from opd_ext.tinymath.measure import continue_from, interval
from opd_ext.tinymath.pretrain import render_requests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

CUTS = (0.25, 0.5, 0.75)
"""Shares of the student's response behind which the teacher takes over."""
LONG, SHORT = 200, 400


@dataclass(frozen=True)
class Mistake:
    """A line that is wrong given the one before it, and whether a second look replaced it by the right one."""

    line: int
    repaired: bool


def mistakes(question: str, lines: list[str]) -> list[Mistake]:
    """The lines, among all those of a response, that go wrong by themselves; what follows from them does not count."""
    total, operations = parse(question)
    found: list[Mistake] = []
    before, position = total, -1
    for index, text in enumerate(lines):
        if text.startswith(ANSWER_OPENING):
            break
        if text[1:3] != ": " or not text[0].islower():
            continue
        again = position >= 0 and text[0] == operations[position].label
        if not again:
            before, position = total, position + 1
        if position == len(operations):
            break
        right = right_step(operations[position], before)
        if again and found and found[-1].line >= 0 and lines[found[-1].line][0] == text[0]:
            found[-1] = Mistake(found[-1].line, text == right.line)
        if text != right.line:
            if not (again and found and lines[found[-1].line][0] == text[0]):
                found.append(Mistake(index, False))
        tail = text.rpartition("=")[2]
        total = int(tail) % MODULUS if tail.isdecimal() and tail.isascii() else right.after
    return found


def split_lines(ids: list[int], newline: int) -> list[tuple[int, int]]:
    """Half-open ranges of the lines of a response; the newline belongs to its line."""
    stops = [index + 1 for index, token in enumerate(ids) if token == newline]
    if not stops or stops[-1] < len(ids):
        stops.append(len(ids))
    return list(zip([0, *stops[:-1]], stops, strict=True))


@torch.inference_mode()
def divergences(
    student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, prompt: list[int], response: list[int]
) -> torch.Tensor:
    """KL(student || teacher) over the whole vocabulary at every token of ``response``, float32 [T]."""
    ids = torch.tensor([prompt + response])
    first = len(prompt) - 1
    ours, theirs = (model(input_ids=ids).logits[0, first:-1].log_softmax(-1) for model in (student, teacher))
    return (ours.exp() * (ours - theirs)).sum(-1)


def measure_properties(
    student: Qwen3ForCausalLM,
    teacher: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    val: list[tuple[int, str]],
    seed: int,
    max_new_tokens: int,
) -> dict:
    """The properties above, one response of the student per problem.

    Args:
        val: ``(difficulty, question)`` pairs.

    Returns:
        ``tokens`` and ``within`` (share of responses of 200 to 400 tokens); ``cuts``: share of the response -> accuracy
        of student and teacher who go on from there, and the share of prefixes that hold a mistake; ``divergence``: nats
        per token by quarter of the response, and before, right behind and after the first mistake; ``by_mistakes``:
        number of lasting mistakes -> responses and accuracy. Means come with 95 % half widths.
    """
    questions = [question for _, question in val]
    shown = tokenizer(render_requests(tokenizer, [prompts.student_prompt(q) for q in questions])).input_ids
    responses = continue_from(student, tokenizer, shown, seed, max_new_tokens)
    newline = tokenizer("\n").input_ids[0]
    lines = [split_lines(ids, newline) for ids in responses]
    texts = [
        [tokenizer.decode(ids[start:stop], skip_special_tokens=True).rstrip("\n") for start, stop in ranges]
        for ids, ranges in zip(responses, lines, strict=True)
    ]
    made = [mistakes(q, t) for q, t in zip(questions, texts, strict=True)]

    def accuracy(replies: list[list[int]]) -> list[float]:
        decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in replies]
        return [float(compute_score("", t, str(solve(q)[1]))["acc"]) for q, t in zip(questions, decoded, strict=True)]

    right = accuracy(responses)
    cuts = {"0": {"student": interval(right), "mistaken": 0.0}}
    cuts["0"]["teacher"] = interval(accuracy(continue_from(teacher, tokenizer, shown, seed, max_new_tokens)))
    for share in CUTS:
        ends = [ranges[int(share * len(ranges))][0] for ranges in lines]
        prefixes = [ids[:end] for ids, end in zip(responses, ends, strict=True)]
        asked = [p + prefix for p, prefix in zip(shown, prefixes, strict=True)]
        row: dict = {
            "mistaken": _mean([_spoilt(m, ranges, end) for m, ranges, end in zip(made, lines, ends, strict=True)])
        }
        for name, model in (("student", student), ("teacher", teacher)):
            rest = continue_from(model, tokenizer, asked, seed + 1, max_new_tokens)
            row[name] = interval(accuracy([p + r for p, r in zip(prefixes, rest, strict=True)]))
        cuts[str(share)] = row

    where: dict[str, list[float]] = {}
    for prompt, ids, ranges, slips in zip(shown, responses, lines, made, strict=True):
        values = divergences(student, teacher, prompt, ids)
        for quarter, part in enumerate(values.tensor_split(4), 1):
            where.setdefault(f"quarter {quarter}", []).append(part.mean().item())
        if slips and slips[0].line + 1 < len(ranges):
            start, stop = ranges[slips[0].line]
            for name, part in (
                ("before the first mistake", values[:start]),
                ("its line", values[start:stop]),
                ("the token behind it", values[stop : stop + 1]),
                ("after it", values[stop + 1 :]),
            ):
                if len(part):
                    where.setdefault(name, []).append(part.mean().item())
    lasting = [sum(not slip.repaired for slip in slips) for slips in made]
    groups = {"0": [0], "1": [1], "2 or more": range(2, 100)}
    lengths = [float(len(ids)) for ids in responses]
    return {
        "problems": len(val),
        "tokens": interval(lengths),
        "within": _mean([float(LONG <= n <= SHORT) for n in lengths]),
        "cuts": cuts,
        "divergence": {name: interval(values) for name, values in where.items()},
        "by_mistakes": {
            name: {"responses": len(of), "accuracy": interval(of) if of else None}
            for name, counts in groups.items()
            for of in [[acc for acc, n in zip(right, lasting, strict=True) if n in counts]]
        },
    }


def _spoilt(made: list[Mistake], ranges: list[tuple[int, int]], end: int) -> float:
    return float(any(not slip.repaired and ranges[slip.line][1] <= end for slip in made))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _percent(value: list[float] | tuple[float, float]) -> str:
    return f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"


def render_properties(properties: dict, models: dict) -> list[str]:
    """The tables of the card, in Markdown.

    Args:
        properties: from :func:`measure_properties`.
        models: records of ``base`` and ``large``.
    """
    base, large = (models[name]["measured"] for name in ("base", "large"))
    tokens, half = properties["tokens"]
    lines = [
        "",
        "## What lets methods differ",
        "",
        "`python -m opd_ext.tinymath.long.properties` measures it: one response of base to each of",
        f"{properties['problems']} validation problems at temperature 1; percent, ± 95 %.",
        "",
        f"**Long.** {tokens:.0f} ± {half:.0f} tokens; {100 * properties['within']:.0f} % of responses have 200 to 400.",
        "",
        "**Something to learn, and who knows it.**",
        "",
        "| who | sees | accuracy |",
        "|---|---|---|",
    ]
    seen = {"student": "the problem", "solution": "a solution", "demonstration": "a correct attempt", "label": "a note"}
    lines += [f"| base | {words} | {_percent(base[key]['all']['accuracy'])} |" for key, words in seen.items()]
    lines += [f"| large | the problem | {_percent(large['student']['all']['accuracy'])} |"]
    lines += [
        "",
        "**Prefixes drift.** Base has written this share of its response; then somebody goes on.",
        "",
        "| written by base | with a mistake that stays | base goes on | large goes on |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {100 * float(share):.0f} % | {100 * row['mistaken']:.0f} % | {_percent(row['student'])} | "
        f"{_percent(row['teacher'])} |"
        for share, row in properties["cuts"].items()
    ]
    lines += ["", "| where in base's response | KL(base, large), nats per token |", "|---|---|"]
    lines += [f"| {name} | {mean:.4f} ± {half:.4f} |" for name, (mean, half) in properties["divergence"].items()]
    lines += [
        "",
        "**One line decides.**",
        "",
        "| lines that went wrong by themselves and stayed | responses | right |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['responses']} | {_percent(row['accuracy']) if row['accuracy'] else '-'} |"
        for name, row in properties["by_mistakes"].items()
    ]
    lines += [
        "",
        "**Feedback is worth reading.** Where base failed, it tries again.",
        "",
        "| sees | problems | right |",
    ]
    lines += ["|---|---|---|"]
    for key, words in (("retry", "the problem again"), ("feedback", "feedback on its failure")):
        if key in base:
            lines.append(f"| {words} | {base[key]['all']['n']} | {_percent(base[key]['all']['accuracy'])} |")
    return lines


def of_world(world: Path, val: list[tuple[int, str]], seed: int, max_new_tokens: int) -> dict:
    """:func:`measure_properties` of the models in a folder."""
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    student, teacher = (Qwen3ForCausalLM.from_pretrained(world / name).eval() for name in ("base", "large"))
    return measure_properties(
        student, teacher, AutoTokenizer.from_pretrained(world / "base"), val, seed, max_new_tokens
    )


def main() -> None:
    from opd_ext.home import home
    from opd_ext.tinymath.levels import LONG as level
    from opd_ext.tinymath.splits import draw_splits

    torch.set_num_threads(1)
    world = Path(sys.argv[1]) if len(sys.argv) > 1 else home() / level.name
    record = json.loads((world / "world.json").read_text())
    seed = record["settings"]["seed"]
    val = draw_splits(seed, level)["val"][: level.measured]
    found = of_world(world, val, seed, level.max_new_tokens or 0)
    print("\n".join(render_properties(found, record["models"])))


if __name__ == "__main__":
    main()
