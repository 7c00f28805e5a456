# SPDX-License-Identifier: Apache-2.0
"""What a run needs of its data: files that open, rows that hold messages, prompts that fit, enough of them."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from opd_ext.config.schema import OPDConfig
from opd_ext.config.teachers import UnknownKey, assign, place_of
from opd_ext.context import build_context
from opd_ext.context.sequence import render, render_teacher
from opd_ext.errors import ConfigError
from opd_ext.preflight import agents
from opd_ext.preflight.findings import Findings, refuse
from opd_ext.preflight.tables import Samples, open_samples
from opd_ext.protocol import NO_SOURCE, Protocol

RENDERED = 128  # of a file: the first prompts, and as many of the longest by characters

# Contexts that show the teacher what a grader made of a response.
_GRADED_CONTEXTS = ("feedback", "label")
# Contexts that need nothing but a row of the data.
_PLAIN_CONTEXTS = ("same", "instruction", "solution")


def reads_grades(opd: OPDConfig) -> bool:
    """Whether a grade decides what is trained; otherwise reference answers serve the tables alone."""
    shown = any(view.opd.context.kind in _GRADED_CONTEXTS for view in opd.views)
    return opd.policy.present or shown or opd.credit.annotates or opd.stop_on_success is not None


def open_data(config: DictConfig, opd: OPDConfig) -> dict[str, list[Samples]]:
    """Open every file that is on this machine and look at its rows; by key (``train_files``, ``val_files``).

    Raises:
        ConfigError: one sentence.
    """
    found: dict[str, list[Samples]] = {"train_files": [], "val_files": []}
    if config.data.custom_cls.path:  # a data set of the user's reads them, whatever they are
        return found
    for key in found:
        for path in _files(config, key):
            local = Path(path.removeprefix("file://")).expanduser()
            if "://" not in path.removeprefix("file://") and local.exists():
                samples = open_samples(f"data.{key}", local, _columns(config))
                check_rows(samples, config, opd)
                if key == "train_files":
                    taught_by(samples, opd)
                found[key].append(samples)
        _same_columns(found[key], config)
    train, val = (found[key] if len(found[key]) == len(_files(config, key)) else [] for key in found)
    if train:
        check_batch(usable_rows(train, 0, config), config)
    if val:
        count_validation(val, config, opd)
    return found


def check_data(
    found: dict[str, list[Samples]], config: DictConfig, opd: OPDConfig, tokenizer: Any, findings: Findings
) -> None:
    """What the rows are to the models: prompts and teacher's prompts rendered, steps and validations counted.

    Args:
        found: of :func:`open_data`.
        tokenizer: the student's, or None where it is not at hand: then no prompt is rendered.

    Raises:
        ConfigError: one sentence.
    """
    if config.data.custom_cls.path:
        return
    for key in found:
        paths = _files(config, key)
        lost, rendered = 0, ""
        if tokenizer is not None and found[key]:
            lost, rendered = check_prompts(found[key], config, tokenizer, findings)
        subject = "train data" if key == "train_files" else "validation data"
        if found[key] and not found[key][0].answered:
            findings.note(f"data.{key} has no reward_model, so it is not graded and no accuracy is reported of it.")
        findings.fact(subject, ", ".join(paths) + _counted(found[key], len(paths), lost) + rendered)
        if key == "train_files":
            check_teachers(found[key], config, opd, tokenizer, findings)
        if len(found[key]) == len(paths) and key == "train_files":
            check_steps(usable_rows(found[key], lost, config), config, findings)
        if len(found[key]) == len(paths) and key == "val_files" and (told := count_validation(found[key], config, opd)):
            findings.fact("validation", told)


def _files(config: DictConfig, key: str) -> list[str]:
    files = config.data[key]
    paths = [files] if isinstance(files, str) else list(files or ())
    if not paths or not all(isinstance(path, str) and path for path in paths):
        need = "verl validates on it, or opens it at least: name a file" if key == "val_files" else "name a file"
        raise ConfigError(
            f"data.{key}={files if files is None else list(paths)} must be a file or a list of files: {need}."
        )
    return paths


def _columns(config: DictConfig) -> tuple[str, ...]:
    return (config.data.prompt_key, "data_source", "reward_model", "extra_info", agents.COLUMN)


def _counted(found: Sequence[Samples], files: int, lost: int) -> str:
    if len(found) < files:
        return " (not on this machine: not looked at)" if not found else f" ({len(found)} of {files} files looked at)"
    return f": {sum(samples.rows for samples in found):,} rows" + (f", {lost} of them dropped" if lost else "")


def _same_columns(found: Sequence[Samples], config: DictConfig) -> None:
    """verl joins the files; a column that one of them lacks would be null in its rows."""
    for samples in found[1:]:
        for column in _columns(config)[:3]:
            if (column in samples.columns) != (column in found[0].columns):
                has, lacks = (found[0], samples) if column in found[0].columns else (samples, found[0])
                raise ConfigError(f"{lacks.name} has no column {column}, but {has.name} has: write it into both.")


# ---------------------------------------------------------------------- rows


def _no_messages(row: Mapping[str, Any], key: str) -> bool:
    return not isinstance(row.get(key), list) or not row[key]


def _message(fault: Callable[[Mapping[str, Any]], bool]) -> Callable[[Mapping[str, Any], str], bool]:
    return lambda row, key: any(not isinstance(message, Mapping) or fault(message) for message in row[key])


def _said(message: Mapping[str, Any]) -> bool:
    """Whether there is a word, or a part that is no text, in a message."""
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content)


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


_ROW_FAULTS: tuple[tuple[str, str, Callable[[Mapping[str, Any], str], bool]], ...] = (
    (
        "have a prompt that is text",
        "write a list of messages, [{'role': 'user', 'content': TEXT}]",
        lambda row, key: isinstance(row.get(key), str),
    ),
    ("have no prompt", "drop them, or write a list of messages", _no_messages),
    (
        "have a message without role",
        "each message is {'role': ..., 'content': ...}",
        _message(lambda m: not m.get("role")),
    ),
    (
        "have a message without content",
        "each message is {'role': ..., 'content': ...}",
        _message(lambda m: not m.get("tool_calls") and not isinstance(m.get("content"), (str, list))),
    ),
    (
        "have no message of the user's",
        "a chat needs one whose role is user; a system message alone asks nothing",
        lambda row, key: all(message.get("role") != "user" for message in row[key]),
    ),
    (
        "ask nothing: what the user says is empty",
        "drop them",
        lambda row, key: not any(_said(message) for message in row[key] if message.get("role") == "user"),
    ),
    (
        "have an extra_info that holds no fields",
        "write an object, {'index': 0, ...}, or leave the column out",
        lambda row, key: not isinstance(row.get("extra_info") or {}, Mapping),
    ),
    (
        "have a data_source that is no text",
        "name the set that a row belongs to, or leave the whole column out",
        lambda row, key: not isinstance(row.get("data_source", NO_SOURCE), str),
    ),
)
"""What is wrong with some rows, what to do, and how a row shows it; each may rely on those above it."""


def check_rows(samples: Samples, config: DictConfig, opd: OPDConfig) -> None:
    """The columns are there, and the rows that were read hold what their columns promise."""
    key = config.data.prompt_key
    if key not in samples.columns:
        there = ", ".join(samples.columns)
        raise ConfigError(
            f"{samples.name} has no column {key}: it has {there}; see `opd data`, or set data.prompt_key."
        )
    for words, remedy, shows in _ROW_FAULTS:
        _none_of(samples, [i for i, row in enumerate(samples.sample) if shows(row, key)], words, remedy)
    if reads_grades(opd):
        for column in ("data_source", "reward_model"):
            if column not in samples.columns:
                raise ConfigError(
                    f"{samples.name} has no column {column}, and opd.method={opd.method} trains on grades: write "
                    "{'ground_truth': ANSWER} as reward_model and a name as data_source."
                )
    if "reward_model" in samples.columns:
        answers = [row.get("reward_model") for row in samples.sample]
        if not all(answer is None or isinstance(answer, Mapping) for answer in answers):
            raise ConfigError(f"{samples.name}: reward_model must be {{'ground_truth': ANSWER}} in every row.")
        missing = [i for i, answer in enumerate(answers) if _blank((answer or {}).get("ground_truth"))]
        _none_of(samples, missing, "have no reward_model.ground_truth", "drop them, or leave the whole column out")


def _none_of(samples: Samples, rows: Sequence[int], words: str, remedy: str) -> None:
    if rows:
        raise ConfigError(
            f"{samples.name}: {len(rows)} of {len(samples.sample)} rows {words}, the first is row {rows[0]}: {remedy}."
        )


# ---------------------------------------------------------------------- prompts


def check_prompts(files: Sequence[Samples], config: DictConfig, tokenizer: Any, findings: Findings) -> tuple[int, str]:
    """Render prompts as verl will, tools included.

    A prompt that the template refuses or that is too long is dropped by verl without a word: all of them end the run,
    some are told.

    Returns:
        How many rows will be dropped, as far as every prompt was rendered; what to say of the prompts in the plan.
    """
    from opd_ext.bridge.inputs import tool_schemas

    try:
        tools = tool_schemas(config)
    except Exception as error:
        raise refuse("data.tool_config_path or data.function_tool_path has no tools that load", error) from None
    kwargs = dict(config.data.apply_chat_template_kwargs or {}) | ({"tools": tools} if tools is not None else {})
    limit, longest, lost, looked_at = config.data.max_prompt_length, 0, 0, 0
    for samples in files:
        looked = _longest_and_first(samples, config.data.prompt_key)
        lengths, refusals = _lengths(looked, config.data.prompt_key, tokenizer, kwargs)
        long, of = sum(length > limit for length in lengths), f"of {len(looked)} prompts"
        shown = f"the longest has {max(lengths, default=0):,} of {limit:,} tokens"
        if refusals.total() == len(looked):
            reason = refusals.most_common(1)[0][0]
            raise ConfigError(f"{samples.name}: the chat template refuses all {of} ({reason}): change one of them.")
        if long + refusals.total() == len(looked):
            raise ConfigError(
                f"{samples.name}: {long} {of} are longer than data.max_prompt_length={limit}, {shown}: raise it, and "
                "actor_rollout_ref.rollout.max_model_len and opd.max_pair_length with it."
            )
        for count, why in [*((n, f"the chat template says: {said}") for said, n in refusals.items()), (long, shown)]:
            if count:
                findings.note(f"{samples.name}: {count} {of} that were rendered will be dropped, {why}.")
        longest, looked_at = max(longest, *lengths), looked_at + len(looked)
        lost += long + refusals.total() if len(looked) == samples.rows else 0
    return lost, f"; {looked_at:,} prompts rendered, the longest has {longest:,} of {limit:,} tokens"


def _lengths(
    rows: Sequence[Mapping[str, Any]], key: str, tokenizer: Any, kwargs: Mapping[str, Any]
) -> tuple[list[int], Counter[str]]:
    """Tokens of the prompts that the template renders, and what it says of the others."""
    lengths, refusals = [], Counter[str]()
    for row in rows:
        try:
            lengths.append(len(render(tokenizer, row[key], kwargs)))
        except Exception as error:  # a template may raise whatever it likes
            refusals[str(error).strip().split("\n")[0] or type(error).__name__] += 1
    return lengths, refusals


def _longest_and_first(samples: Samples, key: str) -> list[dict[str, Any]]:
    first, rest = samples.sample[:RENDERED], samples.sample[RENDERED:]
    return (
        first + sorted(rest, key=lambda row: sum(len(str(m.get("content"))) for m in row[key]), reverse=True)[:RENDERED]
    )


def taught_by(samples: Samples, opd: OPDConfig) -> list[int]:
    """The place of every row's teacher among ``opd.views``, of all rows of the file.

    Raises:
        ConfigError: a row names none of several.
    """
    if opd.teacher_key is None:
        return [0] * samples.rows
    column, name = place_of(opd.teacher_key)
    try:
        return assign(opd, samples.values(column, name))
    except UnknownKey as error:
        raise ConfigError(f"{samples.name}: {error}: give one of them these rows, or drop them.") from None


def check_teachers(
    files: Sequence[Samples], config: DictConfig, opd: OPDConfig, tokenizer: Any, findings: Findings
) -> None:
    """What each teacher is shown of its rows can be shown; of several, whose rows there are, and who has none."""
    of = [(samples, taught_by(samples, opd)) for samples in files]
    for lesson, view in enumerate(opd.views):
        rows = [[row for row, own in zip(s.sample, places, strict=False) if own == lesson] for s, places in of]
        mine = [dataclasses.replace(s, sample=part) for (s, _), part in zip(of, rows, strict=True) if part]
        if view.name and files:
            count = sum(places.count(lesson) for _, places in of)
            findings.fact(f"teacher {view.name}", f"{count:,} rows; {view.opd.teacher}, {view.opd.context}")
            if not count:
                findings.note(f"opd.teachers.{view.name} has none of the rows that are here, so it teaches nothing.")
        if view.opd.context.kind in _PLAIN_CONTEXTS and (mine or not view.name):
            with view.named():
                check_teacher(mine or files, config, view.opd, tokenizer, findings, view.name)


def check_teacher(
    files: Sequence[Samples], config: DictConfig, opd: OPDConfig, tokenizer: Any, findings: Findings, name: str = ""
) -> None:
    """The context has what it shows in every row of its own, and the teacher's prompt leaves room for a response."""
    own = dataclasses.replace(opd.context, problem="own")  # of another problem, drawn later, it is as long
    context, limit, wanted = build_context(own, tokenizer), opd.max_pair_length or 0, opd.rollout.train_tokens
    student = dict(config.data.apply_chat_template_kwargs or {})
    lengths = []
    for samples in files:
        for i, row in enumerate(samples.sample[:RENDERED]):
            sample = {"raw_prompt": row[config.data.prompt_key], "extra_info": row.get("extra_info") or {}}
            try:
                messages = context.messages(sample | {"uid": f"row {i}"})
            except Exception as error:
                raise refuse(
                    f"{samples.name}: opd.context.kind={opd.context.kind} cannot show row {i}", error
                ) from None
            if tokenizer is None or messages is None:
                continue
            try:
                shown = render_teacher(tokenizer, messages, student, context.template_kwargs(), context.ending)
            except Exception as error:  # a template may raise whatever it likes
                if context.ending is None:
                    continue  # such prompts are dropped, which is told of the student's
                raise refuse(f"opd.context.ending={context.ending} cannot end the prompt of row {i}", error) from None
            lengths.append(len(shown))
    if not lengths:
        return
    if min(lengths) >= limit:
        raise ConfigError(
            f"opd.max_pair_length={limit} leaves no room for a response: the teacher's prompts have {min(lengths):,} "
            f"tokens and more; set it to {max(lengths) + wanted} or more."
        )
    if short := sum(length + wanted > limit for length in lengths):
        findings.note(
            f"{short} of {len(lengths)} teacher prompts leave fewer than opd.rollout.train_tokens={wanted} tokens of "
            f"opd.max_pair_length={limit}, and longer responses are dropped: the longest prompt has {max(lengths):,}."
        )
    whose = f"teacher {name}'s prompts" if name else "teacher's prompts"
    findings.fact(whose, f"{len(lengths)} rendered, the longest has {max(lengths):,} of {limit:,} tokens")


# ---------------------------------------------------------------------- validation


def count_validation(files: Sequence[Samples], config: DictConfig, opd: OPDConfig) -> str | None:
    """How many samples a validation takes; the sets that ``opd.validation`` names are there.

    Nothing is said of files of which not every row was read, and of a part of them that verl will choose.
    """
    if any(samples.rows > len(samples.sample) for samples in files) or config.data.val_max_samples > 0:
        return None
    key = config.data.prompt_key
    rows = [(row.get("data_source", NO_SOURCE), row[key]) for samples in files for row in samples.sample]
    return Protocol(opd.validation, config.actor_rollout_ref.rollout.val_kwargs.n, rows).told()


# ---------------------------------------------------------------------- steps


def usable_rows(files: Sequence[Samples], lost: int, config: DictConfig) -> int:
    """Rows that are trained on; ``lost`` are dropped by the filter of prompts."""
    rows, samples = sum(samples.rows for samples in files), config.data.get("train_max_samples", -1)
    return (min(rows, samples) if samples > 0 else rows) - lost


def check_batch(usable: int, config: DictConfig) -> None:
    """The rows give at least one batch."""
    if usable < (batch := config.data.train_batch_size):
        raise ConfigError(
            f"data.train_files has {usable:,} usable rows, fewer than one batch of data.train_batch_size={batch}: "
            "lower it, or add rows."
        )


def check_steps(usable: int, config: DictConfig, findings: Findings) -> None:
    """The rows give at least one batch; epochs that end a run before its steps do are told."""
    check_batch(usable, config)
    trainer = config.trainer
    steps, per_epoch = trainer.total_training_steps, usable // config.data.train_batch_size
    given = per_epoch * trainer.total_epochs
    if steps is not None and given < steps:
        findings.note(
            f"trainer.total_epochs={trainer.total_epochs} ends the run after {given} of {steps} steps: {usable:,} rows "
            f"are {per_epoch} steps an epoch; leave it out to have all steps."
        )
    passes = (given if steps is None else min(steps, given)) / per_epoch
    findings.fact("epochs", f"{passes:.3g} of {per_epoch:,} steps each")
