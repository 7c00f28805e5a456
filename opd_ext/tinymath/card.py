# SPDX-License-Identifier: Apache-2.0
"""The model card: what every model of a world does, measured when it was built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from opd_ext.context import prompts
from opd_ext.progress import Progress
from opd_ext.tinymath.levels import FIRST, Level
from opd_ext.tinymath.long.properties import render_properties
from opd_ext.tinymath.measure import Outcome, Problem, interval, is_diffusion, measure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

CONTEXTS = {
    "student": "the student prompt",
    "v2": "instruction v2",
    "v1": "instruction v1",
    "solution": "a correct solution in the prompt (OPSD)",
    "demonstration": "a correct attempt, shown again (SDPO)",
    "label": "a private note on the kind of step (TRACE)",
    "retry": "the student prompt again, where it failed",
    "feedback": "feedback on that failure (SDPO)",
}


def measure_model(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    val: list[tuple[int, str]],
    seed: int,
    progress: bool = False,
    level: Level = FIRST,
    plain: bool = False,
) -> dict:
    """Accuracy and length in every context on the validation problems, one sample each.

    Args:
        val: ``(difficulty, question)`` pairs.
        progress: show which context is being measured.
        level: of the problems.
        plain: measure under the student prompt alone.

    Returns:
        For each key of ``CONTEXTS``, a table as :func:`summarise` makes it; a masked-diffusion model knows only the
        student prompt.
    """
    plain = plain or is_diffusion(model)
    contexts = 1 if plain else len(CONTEXTS)
    with Progress("measuring", contexts, "contexts", shown=progress) as bar:

        def outcomes(of: Sequence[Problem], shown: list[str], draw: int) -> list[Outcome]:
            found = measure(model, tokenizer, of, shown, seed + draw, level)
            bar.update(advance=1)
            return found

        tables = _outcomes(val, outcomes, plain, level)
    return {name: summarise(table, level.difficulties) for name, table in tables.items()}


def _outcomes(
    val: list[tuple[int, str]],
    ask: Callable[[Sequence[Problem], list[str], int], list[Outcome]],
    plain: bool,
    level: Level,
) -> dict[str, list[Outcome]]:
    """What ``ask(problems, prompts, draw)`` gives in every context, or in the first alone if ``plain``."""
    problems = [(difficulty, question, level.answer(question)) for difficulty, question in val]
    asked = [prompts.student_prompt(question) for _, question in val]

    def outcomes(shown: list[str], of: Sequence[Problem] = problems, draw: int = 0) -> list[Outcome]:
        return ask(of, shown, draw)

    first = outcomes(asked)
    tables = {"student": first}
    if plain:
        return tables
    for text_id in ("v2", "v1"):
        tables[text_id] = outcomes([prompts.teacher_prompt(question, text_id) for _, question in val])
    tables["solution"] = outcomes([prompts.opsd_teacher_prompt(q, level.problems.concise_solution(q)) for _, q in val])
    tables["demonstration"] = outcomes(
        [prompts.sdpo_prompt(a, level.problems.concise_solution(q)) for a, (_, q) in zip(asked, val, strict=True)]
    )
    tables["label"] = outcomes([_noted(level, a, q) for a, (_, q) in zip(asked, val, strict=True)])
    failed = [i for i, outcome in enumerate(first) if not outcome.accuracy]
    if failed:
        again = [problems[i] for i in failed]
        tables["retry"] = outcomes([asked[i] for i in failed], again, draw=1)
        told = [prompts.sdpo_prompt(asked[i], feedback=_feedback(level, first[i], problems[i])) for i in failed]
        tables["feedback"] = outcomes(told, again, draw=1)
    return tables


def _noted(level: Level, asked: str, question: str) -> str:
    decisive = level.decisive_types(question)
    return prompts.label_prompt(asked, decisive or ["arithmetic_slip"], correct=bool(decisive))


def _feedback(level: Level, outcome: Outcome, problem: Problem) -> str:
    _, question, answer = problem
    return str(level.compute_score(level.name, outcome.text, answer, {"question": question})["feedback"])


def summarise(outcomes: list[Outcome], difficulties: Sequence[int]) -> dict:
    """``{"all" | difficulty: {"n", "accuracy", "tokens"}}``, values as (mean, 95 % half width)."""
    groups = {"all": outcomes}
    groups |= {str(d): [o for o in outcomes if o.difficulty == d] for d in difficulties}
    return {
        name: {
            "n": len(group),
            "accuracy": interval([outcome.accuracy for outcome in group]),
            "tokens": interval([outcome.tokens for outcome in group]),
        }
        for name, group in groups.items()
        if group
    }


def _cells(table: dict) -> str:
    (accuracy, a), (tokens, t) = table["accuracy"], table["tokens"]
    return f"{table['n']} | {100 * accuracy:.1f} ± {100 * a:.1f} | {tokens:.1f} ± {t:.1f}"


def _origin(record: dict) -> str:
    where = f"with torch {record['torch']} on {record['threads']} thread(s)"
    if "digests" in record:
        return f"Comes with the package, trained {where}."
    seconds = {name: f"{value:.0f}" for name, value in record["seconds"].items()}
    return (
        f"Trained here {where} in {seconds['total']} s: corpus {seconds['corpus']}, training {seconds['training']}, "
        f"measuring {seconds['measuring']}."
    )


def _reads(spec: dict) -> list[str]:
    """What the card says of a masked-diffusion model besides."""
    if "block_size" not in spec:
        return []
    return [
        "",
        f"Masked diffusion in blocks of {spec['block_size']} tokens, from the weights of {spec['parent']}; trained on",
        "the student prompt only. Measured at temperature 0, where every token with a probability above 0.95 is",
        "written at once.",
    ]


def render_card(world: dict, level: Level = FIRST) -> str:
    """The card of a world (the content of ``world.json``) in Markdown."""
    lines = [
        "# Models of the miniature world",
        "",
        level.about[0],
        "These models exist to try out training methods; they are of no other use.",
        "",
        f"World: seed {world['settings']['seed']}, settings `{world['settings']['hash']}`. One sample per",
        "validation problem at temperature 1; accuracy in percent, length in tokens, ± 95 % intervals.",
        *level.about[1:],
    ]
    for name, record in world["models"].items():
        spec, measured = record["spec"], record["measured"]
        lines += [
            "",
            f"## {name}",
            "",
            f"Qwen3 architecture, {record['parameters']:,} parameters ({spec['layers']} layers, width "
            f"{spec['hidden_size']}, {spec['heads']} heads of {spec['head_dim']}, vocabulary "
            f"{record['vocabulary']}), fp32. Trained on {spec['textbook_chats']:,} textbook chats and "
            f"{spec['chats']:,} others, {record['tokens']:,} tokens, batch {spec['batch_size']}, peak rates "
            f"{spec['muon_rate']:g} (Muon) and {spec['adam_rate']:g} (AdamW), slip rates x "
            f"{spec['slip_scale']:g}.",
            "",
            _origin(record),
            *_reads(spec),
            "",
            "| shown | problems | accuracy | tokens |",
            "|---|---|---|---|",
        ]
        lines += [f"| {CONTEXTS[context]} | {_cells(table['all'])} |" for context, table in measured.items()]
        lines += ["", "| shown | difficulty | problems | accuracy | tokens |", "|---|---|---|---|---|"]
        lines += [
            f"| {CONTEXTS[context]} | {difficulty} | {_cells(table)} |"
            for context in ("student", "v2")
            if context in measured
            for difficulty, table in measured[context].items()
            if difficulty != "all"
        ]
    if "properties" in world:
        lines += render_properties(world["properties"], world["models"])
    return "\n".join(lines) + "\n"
