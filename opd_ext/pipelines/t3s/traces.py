# SPDX-License-Identifier: Apache-2.0
"""A teacher's verified traces as the student's token ids: rendered once, never again."""

import hashlib

import pandas as pd
from transformers import PreTrainedTokenizerBase

from opd_ext.tokens.tables import TableError, content_key


def choose(samples: pd.DataFrame, grades: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One right and finished response per prompt, drawn at random; prompts without one are dropped.

    The draw depends on the seed, the uid and which samples are right, not on the order of rows.
    """
    right = samples[(grades["acc"].to_numpy() >= 1) & (samples["finish_reason"] == "stop").to_numpy()]
    if not len(right):
        raise TableError("No response of the teacher is right and finished: raise traces.n or traces.max_tokens.")
    drawn = [
        hashlib.sha256(f"{seed}/{uid}/{sample}".encode()).hexdigest()
        for uid, sample in zip(right["uid"], right["sample"], strict=True)
    ]
    return right.assign(drawn=drawn).sort_values(["uid", "drawn"]).drop_duplicates("uid").drop(columns="drawn")


def as_students_ids(
    chosen: pd.DataFrame,
    prompts: pd.DataFrame,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
    prefix: str,
    end: int,
) -> pd.DataFrame:
    """Rows of :data:`~opd_ext.tokens.tables.SAMPLES` with the student's prompt and the trace in its tokens.

    Where both tokenizers number their tokens alike and nothing is put before the trace, the sampled ids are kept.
    Otherwise the text is encoded anew. Either way the student's end of turn ends it.

    Args:
        chosen: ``uid`` and either ``response_ids`` of the teacher or ``text``.
        prompts: ``uid`` and ``prompt_ids`` of the student.
        teacher: None where ``chosen`` has text.
        prefix: text before every trace.
        end: the student's token that ends a response.
    """
    prompt_of = dict(zip(prompts["uid"], prompts["prompt_ids"], strict=True))
    keep_ids = teacher is not None and not prefix and teacher.get_vocab() == student.get_vocab()
    rows = []
    for row in chosen.to_dict(orient="records"):
        if keep_ids:
            response = [*(int(token) for token in row["response_ids"][:-1]), end]  # which token ends may differ
        else:
            text = row["text"] if teacher is None else _text(row["response_ids"], teacher)
            response = [*student(prefix + text, add_special_tokens=False).input_ids, end]
        prompt = [int(token) for token in prompt_of[row["uid"]]]
        rows.append(
            {
                "uid": row["uid"],
                "sample": int(row.get("sample", 0)),
                "key": content_key(prompt, response),
                "prompt_ids": prompt,
                "response_ids": response,
                "finish_reason": "stop",
            }
        )
    return pd.DataFrame(rows)


def _text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The response without the token that ended it; other special tokens, tags of thinking say, are kept."""
    return tokenizer.decode(list(ids)[:-1], skip_special_tokens=False)
