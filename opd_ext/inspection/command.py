# SPDX-License-Identifier: Apache-2.0
"""``opd inspect``: from a run folder to a folder that a browser opens."""

import json
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from opd_ext import recorded
from opd_ext.alarms.record import Record
from opd_ext.alarms.record import read as read_alarms
from opd_ext.errors import ConfigError, one_of
from opd_ext.files import beside, put_in_place, write_whole
from opd_ext.inspection.methods import CannotApply, Method, Weights, checkpoint, each_teacher, known_methods, method
from opd_ext.inspection.models import LocalModel
from opd_ext.inspection.pages import Numbers, Pages
from opd_ext.inspection.policy import AppliedPolicy
from opd_ext.inspection.survey import Applied, Row, plans, survey
from opd_ext.inspection.words import token_texts
from opd_ext.progress import Progress
from opd_ext.teacher.vocabulary import check_same_ids
from opd_ext.terminal import terminal
from opd_ext.tokens.ends import stop_ids
from opd_ext.tokens.texts import decode

Found = tuple[Row, Numbers, dict[str, Numbers | None]]
"""A rollout, what the student thinks of its tokens, and every method's signals."""

MARK = "inspect.json"
"""By this file a folder is known as one that this command wrote, and may replace."""


def inspect(
    run: Path,
    step: str | None = None,
    rollouts: str | None = None,
    methods: Sequence[str] = (),
    limit: int = 1000,
    teacher: str | None = None,
    out: Path | None = None,
    device: str | None = None,
    force: bool = False,
) -> Path:
    """Write the token credit map of a run.

    Args:
        run: its folder.
        step: whose weights; a number, ``best``, 0 for the initial model; None: the newest checkpoint.
        rollouts: of which steps: a number, a range ``10-20``, several with commas, or ``all``; None: those that the
            weights of ``step`` sampled, which are the next step's, or its own where there is no next one.
        methods: names of presets; none: the run's own and all others.
        limit: rollouts at most.
        teacher: a model for the methods that learn from another one.
        out: the folder to make; by default ``<run>/inspect/step_<N>``.
        device: ``cpu`` or ``cuda``; None: what there is.
        force: replace what ``out`` holds.

    Returns:
        ``index.html`` within that folder.

    Raises:
        CheckpointError, ConfigError, ValueError: one sentence.
    """
    config = run_config(run)
    source = checkpoint(run, step)
    weights = Weights(run, source, config)
    out = (out or run / "inspect" / f"step_{weights.step}").expanduser().absolute()
    if out.exists() and not (force and (out / MARK).is_file()):
        what = "replace it with --force" if (out / MARK).is_file() else "it was not written by opd inspect"
        raise ConfigError(f"{out} exists: choose another --out, or {what}." if not force else f"{out}: {what}.")
    if limit < 1:
        raise ConfigError(f"--limit {limit} must be at least 1.")
    device = one_of("--device", device or ("cuda" if torch.cuda.is_available() else "cpu"), ("cpu", "cuda"))
    if device == "cpu":
        os.environ.setdefault("VERL_PLATFORM", "cpu")  # before verl settles its platform in this process
    os.environ.setdefault("VERL_LOGGING_LEVEL", "WARNING")
    rows = _rows(run, _steps(run, weights.step, rollouts), limit)
    names = _names(methods, config)
    look = prepare(rows, weights, config, names, teacher, device)
    count = min(limit, len(rows))
    with _progress(out.name, count, out.with_suffix(".log")) as advance:

        def found() -> Iterator[Found]:
            for i, own, signals in look.survey(count):
                yield rows[i], own, signals
                advance()

        write(look, found(), out)
    console = terminal()
    for name, why in look.absent:
        console.print(f"not shown: {name}: {why}", highlight=False, soft_wrap=True)
    console.print(f"open {out / 'index.html'}", highlight=False, soft_wrap=True)
    return out / "index.html"


@dataclass
class Look:
    """Rollouts, and the methods that can be put to them.

    Attributes:
        absent: names of the others, and why not.
        temperature: of the rollouts.
    """

    rows: list[dict[str, Any]]
    weights: Weights
    tokenizer: Any
    student: LocalModel
    applied: list[Applied]
    absent: list[tuple[str, str]]
    temperature: float

    def survey(self, count: int) -> Iterator[tuple[int, Numbers, dict[str, Numbers | None]]]:
        """The signals of the first ``count`` rollouts; see :func:`opd_ext.inspection.survey.survey`."""
        return survey(self.applied, self.student, self.rows, count, self.temperature)


def prepare(
    rows: list[dict[str, Any]],
    weights: Weights,
    config: Mapping[str, Any],
    names: Sequence[str],
    teacher: str | None,
    device: str,
) -> Look:
    """Load the models and plan every method's teacher inputs.

    Raises:
        ConfigError: no method can be put to these rollouts; the sentence says why.
    """
    models = _Models(weights, config, device)
    applied, absent = _apply(names, rows, models, config, teacher)
    if not applied:
        reasons = " ".join(f"{name}: {why}" for name, why in absent)
        raise ConfigError(f"None of the methods can be put to these rollouts. {reasons}")
    _add_texts(rows, applied, models.tokenizer)
    return Look(rows, weights, models.tokenizer, models.student, applied, absent, _temperature(config))


def write(look: Look, found: Iterable[Found], out: Path) -> None:
    """Write the folder ``out``, as a whole or not at all.

    Args:
        found: rollouts in the order of the list: the row, the student's numbers, every method's.
    """
    with beside(out) as folder:
        rewarded = [one.method.name for one in look.applied if one.policy]
        pages = Pages(folder, [one.method.name for one in look.applied], rewarded)
        steps = set()
        for row, own, signals in found:
            pages.add(row, own, signals)
            steps.add(row["step"])
        about = {
            "run": look.weights.run.name,
            "step": look.weights.step,
            "of": _spelled(steps),
            "absent": look.absent,
            "alarms": [_alarm(record) for record in read_alarms(look.weights.run)],
            "methods": [
                {
                    "name": one.method.name,
                    "places": one.method.places,
                    "notes": one.method.notes,
                    "distils": one.method.opd.distils,
                    "rewarded": one.policy is not None,
                }
                for one in look.applied
            ],
        }
        title = f"{look.weights.run.name}, step {look.weights.step}: token credit map"
        pages.finish(about, token_texts(look.tokenizer, pages.tokens), title)
        said = {
            "run": str(look.weights.run.absolute()),
            "step": look.weights.step,
            "rollouts": pages.count,
            "methods": pages.methods,
        }
        write_whole(folder / MARK, json.dumps(said, indent=2) + "\n")
        put_in_place(folder, out)


def _alarm(record: Record) -> dict[str, Any]:
    """As the report shows it; ``undone``: the run went back before that step, whose rollouts are of another try."""
    done = record.done if record.to is None else f"{record.done} to step {record.to}"
    undone = record.done == "rollback" and not record.pending
    return {"step": record.step, "alarm": record.alarm, "why": record.why, "done": done, "undone": undone}


def run_config(run: Path) -> dict[str, Any]:
    """The configuration of a run, plain.

    Raises:
        ConfigError: the folder is not that of a run of ``opd train``.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} has no config.yaml: name the folder of a run.")
    config = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(config, dict) or "opd" not in config:
        raise ConfigError(f"{path} has no section opd: name the folder of a run of opd train.")
    return config


def _steps(run: Path, step: int, asked: str | None) -> list[int]:
    """Steps whose rollouts are shown."""
    there = recorded.steps(run)
    if not there:
        raise ConfigError(
            f"{run} has no generations/tokens_<step>.jsonl.gz: it was trained before rollouts were kept as token ids, "
            "and texts do not tell them; let it train on."
        )
    if asked is None:
        if not {step, step + 1} & {*there}:
            raise ConfigError(
                f"{run} kept no rollouts of step {step} or {step + 1}: choose --rollouts of {_spelled(there)}."
            )
        return [step + 1] if step + 1 in there else [step]
    if asked == "all":
        return there
    chosen: list[int] = []
    for part in asked.split(","):
        if not (found := re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())):
            raise ConfigError(f"--rollouts {asked} must be a step, a range 10-20, several with commas, or all.")
        first, last = int(found[1]), int(found[2] or found[1])
        chosen += [each for each in there if first <= each <= last]
        if not any(first <= each <= last for each in there):
            raise ConfigError(f"--rollouts {part.strip()} does not exist in {run}: there are {_spelled(there)}.")
    return list(dict.fromkeys(chosen))


def _spelled(steps: Collection[int]) -> str:
    found = sorted({*steps})
    if len(found) == 1:
        return f"step {found[0]}"
    whole = found == list(range(found[0], found[-1] + 1))
    return f"steps {found[0]} to {found[-1]}" if whole else f"steps {', '.join(map(str, found))}"


def _rows(run: Path, steps: Sequence[int], limit: int) -> list[dict[str, Any]]:
    """All rollouts of as many steps as ``limit`` touches: groups and reductions are of whole steps."""
    rows: list[dict[str, Any]] = []
    for step in steps:
        if len(rows) >= limit:
            break
        rows += [{**row, "step": step} for row in recorded.read(run, step)]
    return rows


def _names(asked: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    own, known = config["opd"]["method"], known_methods()
    for name in asked:
        one_of("--methods", name, {*known, own})
    return list(dict.fromkeys(asked or [own, *known]))


def _temperature(config: Mapping[str, Any]) -> float:
    return float(config["actor_rollout_ref"]["rollout"]["temperature"])


class _Models:
    """The student, and teachers that several methods may share."""

    def __init__(self, weights: Weights, config: Mapping[str, Any], device: str) -> None:
        from transformers import AutoTokenizer

        self.weights, self.device = weights, device
        model = config["actor_rollout_ref"]["model"]
        self.trusted = bool(model.get("trust_remote_code"))
        path = weights.student(weights.step)
        self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=self.trusted)
        if model.get("custom_chat_template"):
            self.tokenizer.chat_template = model["custom_chat_template"]
        self.stops = stop_ids(path, self.tokenizer)
        self.kept: dict[tuple, LocalModel] = {}
        self.student = self.of({path: 1.0})

    def of(self, mixture: Mapping[str, float]) -> LocalModel:
        key = tuple(sorted(mixture.items()))
        if key not in self.kept:
            self.kept[key] = LocalModel(mixture, self.device, trust_remote_code=self.trusted)
        return self.kept[key]

    def with_initial(self) -> None:
        """The student is to answer as the initial model, too."""
        if self.student.initial is None:
            self.student.initial = self.of({self.weights.initial: 1.0})


def _apply(
    names: Sequence[str], rows: Sequence[Row], models: _Models, config: Mapping[str, Any], teacher: str | None
) -> tuple[list[Applied], list[tuple[str, str]]]:
    """The methods that can be put to these rollouts, and why the others cannot."""
    applied, absent = [], []
    template = config["data"].get("apply_chat_template_kwargs") or {}
    found: list[tuple[Method, bool]] = []
    for name in names:
        try:
            found += [(each, config["opd"]["method"] == name) for each in each_teacher(method(name, config, teacher))]
        except (CannotApply, ConfigError) as error:
            absent.append((name, str(error)))
    for chosen, own in found:
        try:
            if chosen.opd.teacher.path and not chosen.opd.teacher.foreign:
                _same_ids(models.tokenizer, str(chosen.opd.teacher.path))
            inputs = plans(chosen, rows, models.tokenizer, template, None, models.stops)
            mixture = models.weights.teacher(chosen, own)
            if chosen.opd.teacher.kind.needs_adapter or chosen.opd.divergence.extrapolates or _asks_initial(chosen):
                models.with_initial()
            step, device = models.weights.step, models.device
            policy = AppliedPolicy(chosen, step, rows, device, own) if chosen.opd.policy.present else None
            one = Applied(chosen, inputs, models.of(mixture) if mixture else None, _temperature(config), policy)
            one.prepare(rows)
            applied.append(one)
        except (CannotApply, ConfigError) as error:
            absent.append((chosen.name, str(error)))
    return applied, absent


def _asks_initial(chosen: Method) -> bool:
    """A teacher without weights of its own that is not the student as it stands reads the initial model."""
    kind = chosen.opd.teacher.kind
    return not kind.own_weights and not kind.is_student


def _same_ids(tokenizer: Any, path: str) -> None:
    try:
        check_same_ids(tokenizer, path)
    except (ValueError, OSError) as error:
        raise CannotApply(str(error).split("\n")[0]) from None


def _add_texts(rows: list[dict[str, Any]], applied: Sequence[Applied], tokenizer: Any) -> None:
    """What student and teachers read, decoded from the very ids."""
    texts = decode(tokenizer, [row["prompts"] for row in rows], skip_special_tokens=False)
    for row, text in zip(rows, texts, strict=True):
        row["prompt_text"], row["teacher_prompts"] = text, {}
    for one in applied:
        shown = [(row, plan.prompt) for row, plan in zip(rows, one.inputs, strict=True) if plan.ids is not None]
        for (row, _), text in zip(
            shown, decode(tokenizer, [ids for _, ids in shown], skip_special_tokens=False), strict=True
        ):
            row["teacher_prompts"][one.method.name] = text


@contextmanager
def _progress(title: str, total: int, log: Path) -> Iterator[Any]:
    """A bar on the terminal, plain lines in a file beside the folder that is being made."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file, Progress(title, total, "rollouts") as seen:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n")
        with Progress(title, total, "rollouts", console=terminal(file=file, width=120)) as written:

            def advance() -> None:
                seen.update(advance=1)
                written.update(advance=1)

            yield advance
