# SPDX-License-Identifier: Apache-2.0
"""Traces to fine-tune on, given or a teacher's verified ones: the student's token ids, rendered once, never again."""

import dataclasses
import hashlib
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from opd_ext.pipelines import problems
from opd_ext.pipelines.settings import TracedConfig
from opd_ext.pipelines.stages import Stage
from opd_ext.pipelines.steps import Steps
from opd_ext.plan.work import Work
from opd_ext.tokens.ends import stop_ids
from opd_ext.tokens.tables import PROMPTS, SAMPLES, TableError, content_key, read_table, write_table

SAMPLED, TRACES = "samples/teacher.parquet", "traces.parquet"


class TracedSteps(Steps):
    """The stages that make traces."""

    config: TracedConfig

    def trace_stages(self) -> list[Stage]:
        """`sample-teacher`, unless traces are given, and `traces`: what is chosen of them, in the student's tokens."""
        config = self.config
        choice = {"seed": config.seed, "prefix": config.trace_prefix, "max_length": config.train.max_length}
        if config.traces_column:
            settings = {**choice, "column": config.traces_column}
            return [Stage("traces", self._given_traces, settings, [TRACES], ["prompts-train"])]
        asked = self.sampling_settings(config.teacher, config.traces, config.traces.n, config.traces.max_tokens)
        work: list[Work] = [self.planned(str(config.teacher), config.traces.n, config.traces.max_tokens)]
        chosen = {**choice, "reward": config.reward.described()}
        return [
            Stage("sample-teacher", self._sample_teacher, asked, [SAMPLED], ["prompts-train"], work=work),
            Stage("traces", self._chosen_traces, chosen, [TRACES], ["prompts-train", "sample-teacher"]),
        ]

    def _sample_teacher(self) -> dict[str, Any]:
        config, teacher = self.config, self._teacher
        rendered = problems.render_prompts(problems.read_problems(config.prompts), teacher, config.prompts)
        write_table(self.prompts("teacher"), rendered, PROMPTS)
        job = self.job(
            config.teacher, None, "teacher", SAMPLED, config.traces, config.traces.n, config.traces.max_tokens
        )
        self.sample([dataclasses.replace(job, stop_ids=tuple(stop_ids(config.teacher, teacher)))], "traces")
        return {"samples": len(read_table(self.folder / SAMPLED, SAMPLES))}

    @property
    def _teacher(self) -> PreTrainedTokenizerBase:
        return problems.load_tokenizer(self.config.teacher, self.config.trust_remote_code)

    def _chosen_traces(self) -> dict[str, Any]:
        config = self.config
        samples, rows = read_table(self.folder / SAMPLED, SAMPLES), problems.read_problems(config.prompts)
        grades = problems.grade(samples, rows, self._teacher, config.reward)
        chosen = choose(samples, grades, config.seed)
        return self._write_traces(chosen, self._teacher) | {"right": float(grades["acc"].mean())}

    def _given_traces(self) -> dict[str, Any]:
        rows = problems.read_problems(self.config.prompts)
        column, _, field = self.config.traces_column.partition(".")
        if column not in rows or (field and field not in rows[column].iloc[0]):
            raise TableError(f"{self.config.prompts.file} has no column {self.config.traces_column} with traces.")
        texts = rows[column].map(lambda cell: cell[field]) if field else rows[column]
        if empty := int(texts.map(lambda text: not text).sum()):
            raise TableError(
                f"{empty} rows of {self.config.prompts.file} have no {self.config.traces_column}; drop them."
            )
        return self._write_traces(rows[["uid"]].assign(text=texts), None)

    def _write_traces(self, chosen: pd.DataFrame, teacher: Any) -> dict[str, Any]:
        config, prompts = self.config, read_table(self.prompts("train"), PROMPTS)
        table = as_students_ids(
            chosen, prompts, self.tokenizer, teacher, config.trace_prefix, self.tokenizer.eos_token_id
        )
        lengths = table["prompt_ids"].map(len) + table["response_ids"].map(len)
        if lengths.max() > config.train.max_length:
            raise TableError(
                f"The longest trace has {lengths.max()} tokens with its prompt; raise train.max_length="
                f"{config.train.max_length} or lower traces.max_tokens."
            )
        write_table(self.folder / TRACES, table, SAMPLES)
        return {"traces": len(table), "prompts": len(prompts), "longest": int(lengths.max())}


def choose(samples: pd.DataFrame, grades: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One right and finished response per prompt, drawn at random; prompts without one are dropped.

    Right by the grader's strict verdict, where it has one: a trace is trained on. The draw depends on the seed, the uid
    and which samples are right, not on the order of rows.
    """
    verdict = grades["acc_strict" if "acc_strict" in grades else "acc"]
    right = samples[(verdict.to_numpy() >= 1) & (samples["finish_reason"] == "stop").to_numpy()]
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
