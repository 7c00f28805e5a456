# SPDX-License-Identifier: Apache-2.0
"""Public reports of other projects, and what happens here in their situation: the table of docs/gauntlet.md.

``python -m tests.gauntlet.table`` writes that page, and the table of situations and verdicts into the README.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.gauntlet import architectures, engines, grades, losses, lost, rollouts, starts

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "gauntlet.md", ROOT / "README.md"
BEGIN, END = "<!-- gauntlet: made by python -m tests.gauntlet.table -->", "<!-- end of gauntlet -->"
VERDICTS = {"right": "the right value", "told": "a note before the run starts", "refused": "one sentence before Ray"}


@dataclass(frozen=True)
class Row:
    """One situation.

    Attributes:
        reports: ``owner/repository#number`` of where it was met; the first names the test.
        situation: what users do there.
        verdict: a key of :data:`VERDICTS`.
        here: what happens, and what ``check`` asserts.
        check: the situation, tried on the real thing; its parameters are fixtures.
    """

    reports: tuple[str, ...]
    situation: str
    verdict: str
    here: str
    check: Callable[..., None]

    def __str__(self) -> str:
        return f"{_short(self.reports[0]).replace('#', '-')} {self.situation}"


def _short(report: str) -> str:
    return report.rpartition("/")[2]


def row(reports: str, situation: str, verdict: str, here: str, check: Callable[..., None]) -> Row:
    return Row(tuple(reports.split()), situation, verdict, here, check)


ROWS = [
    row(
        "meta-pytorch/torchtune#2119 meta-pytorch/torchtune#2502",
        "one tokenizer, heads padded to different height",
        "right",
        "whoever's is taller, the rows beyond the other's are cut; loss and gradients are float64's",
        architectures.unequal_heads,
    ),
    row(
        "modelscope/ms-swift#9526",
        "student and teacher end a turn with different tokens",
        "told",
        "both tokens are named before anything is started",
        starts.other_end_of_a_turn,
    ),
    row(
        "siyan-zhao/OPSD#10",
        "the teacher's prompt ends otherwise, so that the first token is template and not knowledge",
        "right",
        "`divergence_token0` is the divergence of first tokens alone; `ending: student` has the prompts end alike",
        architectures.first_token,
    ),
    row(
        "siyan-zhao/OPSD#30",
        "right padding puts pads between prompt and answer",
        "right",
        "what verl's agent loop hands over is prompt and sampled ids; no pad reaches student or teacher",
        rollouts.padding_between_prompt_and_answer,
    ),
    row(
        "huggingface/trl#5862 huggingface/trl#5883",
        "the teacher's prompt is longer than the student's may be",
        "right",
        "it is read whole; a pair beyond its own limit is left out, counted and never cut",
        rollouts.long_teacher_prompts,
    ),
    row(
        "modelscope/ms-swift#9126",
        "the teacher inherits the student's position ids",
        "right",
        "every teacher sequence counts from 0",
        engines.longer_teacher_prompts,
    ),
    row(
        "modelscope/ms-swift#9145",
        "a short answer beside long ones brings pads into the teacher's history",
        "right",
        "the teacher reads its prompts and the sampled ids, one after another, and nothing else",
        engines.short_beside_long_answers,
    ),
    row(
        "allenai/open-instruct#1740",
        "empty responses divide by zero",
        "right",
        "they change no bit of loss and gradients; alone they give 0",
        engines.empty_responses,
    ),
    row(
        "Thinking-Space/Rethinking-OPD#15",
        "one token, renormalised, has a divergence of 0",
        "refused",
        "`k=1 with tail=renorm ... (gradient 0)`",
        losses.one_token_renormalised,
    ),
    row(
        "radixark/miles#2362",
        "a top-k divergence as a constant advantage only raises entropy",
        "right",
        "the gradient goes through it and ends at the teacher; as an advantage it is refused",
        losses.towards_the_teacher,
    ),
    row(
        "verl-project/verl#7856",
        "a truncated divergence is negative, a clamp kills its gradient",
        "right",
        "the other tokens are one bucket: 467 of 467 pairs are not negative and have a gradient",
        losses.truncated_to_the_likeliest,
    ),
    row(
        "huggingface/trl#4935",
        "the rate of the moving average is applied the wrong way round",
        "right",
        "a rate of 0.05 moves the teacher 5 % towards the student",
        engines.moving_average,
    ),
    row(
        "huggingface/trl#4935 verl-project/verl#7225",
        "the loss depends on the number of micro-batches",
        "right",
        "1, 2 and 8 give one loss and one gradient, with an RL term too",
        engines.accumulated_gradients,
    ),
    row(
        "huggingface/trl#6191",
        "log-probs of the rollout are paired with wrong columns where prompts differ in length",
        "right",
        "the gap to exact log-probs is 0; turned round it is not",
        engines.columns_of_rollout_log_probs,
    ),
    row(
        "huggingface/trl#5990",
        "dropout is at work while the student's own weights teach",
        "right",
        "the teacher's passes are equal to the bit and to a model without dropout; the student's are not",
        engines.dropout,
    ),
    row(
        "huggingface/trl#6530",
        "the head is read past FSDP, the forward pass past the adapter",
        "right",
        "two ranks and an adapter have float64's loss and gradients",
        engines.wrappers,
    ),
    row(
        "huggingface/trl#3252",
        "after a resume the server has the weights without the adapter",
        "right",
        "what is sent after a resume is, to the bit, what was sent before it: the base with its adapter merged",
        engines.resumed_adapter,
    ),
    row(
        "lasgroup/SDPO#25",
        "fine until step 400, then 0 %",
        "right",
        "verl's loop ends where validation collapses, and the checkpoint of the best one is kept",
        starts.collapse,
    ),
    row(
        "verl-project/verl#7540",
        "another version of verl, another loss",
        "right",
        "24 losses and gradients of a frozen batch and one whole step are those that float64 gave without verl",
        engines.frozen_batch,
    ),
    row(
        "PrimeIntellect-ai/prime-rl#1334 verl-project/verl#7807 THUDM/slime#2213",
        "a template drops earlier thoughts, so that the old prompt is no beginning of the new",
        "right",
        "a second request goes on from the sampled ids; of the tools' answers nothing trains",
        rollouts.thoughts_that_leave_the_history,
    ),
    row(
        "unslothai/unsloth#6926 huggingface/trl#6361",
        "line breaks merge, so that no text pattern finds where the answer starts",
        "right",
        "ids are never searched as text: what trains is what was sampled",
        rollouts.line_breaks_that_merge,
    ),
    row(
        "verl-project/verl#2069 verl-project/verl#3936",
        "the filter of long prompts counts other tokens than are sent",
        "right",
        "the filter keeps exactly what fits as it is sent",
        rollouts.overlong_prompts,
    ),
    row(
        "RUCBM/G-OPD#3 NousResearch/atropos#456",
        "distillation asks for a reward, or another trainer runs without a teacher",
        "right",
        "data without answers trains; a trainer that knows no teacher is refused",
        starts.distillation_and_rewards,
    ),
    row(
        "Tencent-Hunyuan/Hunyuan-7B#13",
        "a switch for thinking that the chat template does not have",
        "told",
        "a note says that it changes nothing",
        starts.thinking_switch_without_effect,
    ),
    row(
        "huggingface/Math-Verify#76 huggingface/Math-Verify#47 huggingface/Math-Verify#14 marin-community/marin#9163",
        "a grader reads bold answers wrong, takes one answer of two, and all tiny numbers for equal",
        "right",
        "each is judged as it should be; as a reward, contradictions and open boxes earn nothing",
        grades.answers_and_rewards,
    ),
    row(
        "NovaSky-AI/SkyRL#2256",
        "student, teacher and sampler disagree by more than the signal, and nobody asked them",
        "right",
        "before the first update head, packing, teacher and sampler are measured; a wrong head ends the run",
        architectures.self_test,
    ),
    row(
        "modelscope/ms-swift#9565 modelscope/ms-swift#9618 THUDM/slime#1686",
        "layers with a state read the neighbour in a pack",
        "right",
        "such models get passes without neighbours; the loss is float64's",
        architectures.layers_with_a_state,
    ),
    row(
        "linkedin/Liger-Kernel#1319 modelscope/ms-swift#4506",
        "a forward of text and images that does not choose the rows it is asked for",
        "right",
        "the rows are chosen in front of the head; the loss is float64's",
        architectures.rows_that_the_forward_does_not_choose,
    ),
    row(
        "huggingface/trl#7039",
        "a turn may end with several tokens, and one of them is asked for",
        "right",
        "a response that ends with any of them is finished",
        architectures.several_ends_of_a_turn,
    ),
    row(
        "vllm-project/vime#62 verl-project/verl#439",
        "a teacher's server never comes up, and nobody says why",
        "right",
        "the run ends with the last lines of the process that died (a whole run: `tests/stack/test_faults.py`)",
        lost.server_that_never_comes_up,
    ),
    row(
        "verl-project/verl#4417",
        "a reward function that raises takes its problems out of the accuracy",
        "right",
        "every rollout stays a row; the first exception is named, and ends the run or scores 0 by choice",
        lost.reward_that_raises,
    ),
    row(
        "verl-project/verl#3065",
        "copies of a row get equal seeds, so that many samples are one",
        "right",
        "8 copies sampled once have the 8 seeds of one row sampled 8 times",
        lost.copies_of_a_row,
    ),
    row(
        "verl-project/verl#6239",
        "a prompt is cut, or has tools, for the student alone",
        "right",
        "what would cut is refused; the teacher reads the student's tools; a prompt that is not the row's ends the run",
        lost.another_prompt_than_was_sent,
    ),
    row(
        "PrimeIntellect-ai/prime-rl#1563 PrimeIntellect-ai/prime-rl#2277",
        "a batch of which nothing is left kills the run",
        "right",
        "the step is skipped; the third in a row ends the run and names the limit to raise",
        lost.pairs_that_are_all_too_long,
    ),
    row(
        "huggingface/trl#5676 unslothai/unsloth#9331",
        "an adapter on the head or on tied embeddings",
        "refused",
        "`... cannot have an adapter here`",
        lost.adapter_on_the_head,
    ),
]

HEAD = """# The gauntlet

Situations that broke other projects, by their public reports, each tried here on the real thing: engines against a
dense computation in float64, verl's own agent loops, data set and queue, whole starts of a run. One test per row, in
[tests/gauntlet](../tests/gauntlet); `python -m pytest tests/gauntlet` tries them all.

{summary}

| # | report | situation | here | verdict |
|---|---|---|---|---|
"""


def summary() -> str:
    """How many rows have which verdict."""
    counts = Counter(row.verdict for row in ROWS)
    parts = [f"{counts[verdict]} {verdict} ({words})" for verdict, words in VERDICTS.items() if counts[verdict]]
    return f"{len(ROWS)} situations: {', '.join(parts)}."


def page() -> str:
    """The text of docs/gauntlet.md."""
    return HEAD.format(summary=summary()) + "".join(
        f"| {number} | {_links(each)} | {each.situation} | {each.here} | {each.verdict} |\n"
        for number, each in enumerate(ROWS, 1)
    )


def readme_table() -> str:
    """What stands in the README between :data:`BEGIN` and :data:`END`; docs/gauntlet.md says what happens besides."""
    return "| # | report | situation | verdict |\n|---|---|---|---|\n" + "".join(
        f"| {number} | {_links(each)} | {each.situation} | {each.verdict} |\n" for number, each in enumerate(ROWS, 1)
    )


def _links(row: Row) -> str:
    named = (report.partition("#") for report in row.reports)
    return ", ".join(
        f"[{_short(repository)}#{number}](https://github.com/{repository}/issues/{number})"
        for repository, _, number in named
    )


if __name__ == "__main__":
    PAGE.write_text(page())
    text = re.sub(r"\d+ situations: [^.]*\.", summary(), README.read_text())
    before, rest = text.split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n\n{readme_table()}\n{END}{rest.split(END)[1]}")
