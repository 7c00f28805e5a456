# SPDX-License-Identifier: Apache-2.0
"""The rollouts of a step as token ids, beside their texts: ``generations/tokens_<step>.jsonl.gz`` of a run folder.

Texts do not tell which tokens were sampled, since a tokenizer encodes most texts in one way and a model in many. One
line per rollout, in the order of the texts:

    uid, sample          as in ``train_<step>.jsonl``
    prompts, responses   ids that the student was sent, and that it sampled
    loss_mask            of the response, 1 where a token is trained; left out where all are
    rollout_log_probs    of the sampled tokens in nats, where the sampler was asked (``rollout.calculate_log_probs``)
    raw_prompt           the chat that the prompt was rendered from
    extra_info           the data set's mapping: question, solution, ...

Ids and data are all that a teacher's input is made of, so any method can be put to these rollouts afterwards.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opd_ext.files import read_jsonl, write_jsonl


def path_of(run: Path, step: int) -> Path:
    return run / "generations" / f"tokens_{step}.jsonl.gz"


def write(run: Path, step: int, rows: Iterable[dict[str, Any]]) -> None:
    """Keep the rollouts of a step; whole or absent. A value that JSON does not know is kept as words."""
    write_jsonl(path_of(run, step), rows, default=_in_words)


def steps(run: Path) -> list[int]:
    """Steps whose rollouts are there as ids, in order."""
    names = (path.name for path in (run / "generations").glob("tokens_*.jsonl.gz"))
    return sorted(int(name.removeprefix("tokens_").removesuffix(".jsonl.gz")) for name in names)


def read(run: Path, step: int) -> list[dict[str, Any]]:
    """Texts and ids of a step, one mapping per rollout with the keys of both files.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: they are not of the same rollouts; one sentence.
    """
    texts, ids = run / "generations" / f"train_{step}.jsonl", path_of(run, step)
    both = read_jsonl(texts), read_jsonl(ids)
    names = [[(row["uid"], row["sample"]) for row in rows] for rows in both]
    if names[0] != names[1]:
        raise ValueError(f"{ids} and {texts.name} are not of the same rollouts: let the run do step {step} again")
    return [{"loss_mask": [1] * len(ids["responses"]), **text, **ids} for text, ids in zip(*both, strict=True)]


def _in_words(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
