# SPDX-License-Identifier: Apache-2.0
"""The table of metrics against what is emitted: no metric without an entry, no entry without a metric.

Emitters that can run here do, on small inputs; names that the trainer writes are read from its source; verl's are
looked up in verl's.
"""

import ast
import dataclasses
import importlib.util
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from opd_ext.alarms.config import ALARMS
from opd_ext.alarms.record import PREFIX
from opd_ext.bridge import failures, rollouts, schedule, teacher_server
from opd_ext.checkpoints.layout import TrainerState
from opd_ext.config.schema import OPDConfig
from opd_ext.config.teachers import NamedTeacher
from opd_ext.context import build_context, context_names, get_context
from opd_ext.context.config import ContextConfig
from opd_ext.credit.annotate import annotation_metrics
from opd_ext.credit.annotate.base import STATUSES
from opd_ext.divergence.config import Branch, DivergenceConfig
from opd_ext.divergence.sampled import Surrogate
from opd_ext.objective.batch import MicroBatch
from opd_ext.objective.metrics import means
from opd_ext.objective.objective import Objective
from opd_ext.reference.fields import PACKAGE
from opd_ext.report.arms import compare_models
from opd_ext.report.compare import compare, load_arms
from opd_ext.report.metrics import SECTIONS, undescribed
from opd_ext.report.metrics.entries import COMPARISON, LOG, MODELS, SUMMARY
from opd_ext.report.run_report import before_after
from opd_ext.spans import ERROR, KEY
from opd_ext.teacher.config import TeacherConfig

VERL = Path(importlib.util.find_spec("verl").submodule_search_locations[0])
CLASSES = {"eos": [1], "think": [2, 3]}


def objective_metrics() -> set[str]:
    """Of one divergence with a bound and a credit, of one per span class, of the surrogate, and without a teacher."""
    torch.manual_seed(0)
    lengths = torch.tensor([250, 250])
    total, hidden, vocabulary = int(lengths.sum()), 4, 6
    label = torch.zeros(total, dtype=torch.long)
    label[:20], label[300:320] = KEY, ERROR
    batch = MicroBatch(
        labels=torch.arange(total) % vocabulary,
        mask=torch.ones(total),
        lengths=lengths,
        num_tokens=total,
        num_sequences=2,
        num_micro_batches=1,
        dp_size=1,
        rollout_log_probs=-torch.rand(total),
        span_label=label,
    )
    clip = {"entry_clip": 0.05}
    by_class = tuple(Branch("forward_kl", clip, span) for span in (KEY, ERROR))
    objectives = [
        Objective((Branch("reverse_kl", clip),), credit="entropy", token_classes=CLASSES),
        Objective(by_class, credit="spans", token_classes=CLASSES),
        Objective((), Surrogate(), token_classes=CLASSES),
    ]
    found: set[str] = set()
    for objective, taught in itertools.product(objectives, (True, False)):
        teacher = (torch.randn(total, hidden), torch.randn(vocabulary, hidden)) if taught else ()
        student = torch.randn(total, hidden, requires_grad=True)
        weight = torch.randn(vocabulary, hidden, requires_grad=True)
        marks = {"a": torch.ones(total, dtype=torch.bool)}
        found |= set(means(objective.sums(batch, objective(batch, student, weight, *teacher), marks)))
    return {name if name.startswith("teacher/") else f"opd/{name}" for name in found}


def schedule_metrics() -> set[str]:
    """Of one teacher, and of several."""
    places = {"context": ContextConfig("instruction"), "divergence": DivergenceConfig()}
    one = OPDConfig(teacher=TeacherConfig("periodic"), **places)
    several = OPDConfig(teachers={"a": NamedTeacher("live", **places)}, teacher_key="data_source")
    found: dict[str, float] = {}
    for opd in (one, several):
        trainer = SimpleNamespace(opd=opd, global_steps=1, state=TrainerState(), actor_rollout_wg=None)
        schedule.refresh(trainer, found, updates=1)
    return set(found)


def rollout_metrics() -> set[str]:
    row = {"data_source": "d", "acc": 1.0, "response_tokens": 3, "truncated": False}
    row |= {"acc_strict": 1.0, "acc_answer_only": 1.0, "acc_boxed_only": 1.0, "format_ok": 1.0}
    rows = [{**row, "uid": i // 3, "sample": i % 3, "index": i // 3, "failed": None} for i in range(6)]
    phases = ("rollout", "val", "monitor")
    counted = {name for prefix in phases for name in failures.account(rows, 6, "stop", prefix, list)[0]}
    places = (*phases, "val/a/b c", "monitor/a/b c")
    cut = rollouts.summarise([one | {"stopped": True} for one in rows], "rollout")  # at the horizon, in training alone
    turns = dict.fromkeys(("turns", "environment_tokens", "tool_calls", "tool_failures", "ignored_calls"), 2)
    played = [one | turns | {"ended": "answer"} for one in rows]  # by an agent with tools
    summed = {name for of in (rows, played) for prefix in places for name in rollouts.summarise(of, prefix)}
    return counted | cut.keys() | summed


def annotation_names() -> set[str]:
    entry = {"status": "ok", "runs": [[0, 2, KEY]], "coverage_precap": 0.5, "capped": False, "called": True}
    entry |= {"latency_s": 0.1, "tokens_in": 1, "tokens_out": 1}
    return set(annotation_metrics([entry, None], [4, 4])) | set(annotation_metrics([None], [4]))


def context_metrics() -> set[str]:
    messages = [{"role": "user", "content": "q"}]
    sample = {"raw_prompt": messages, "extra_info": {"question": "q", "solution": "s"}, "uid": "u", "session": 0}
    sample |= {"score": 1.0, "feedback": "f", "response": "r", "types": [], "correct": True, "step": 1}
    sample["group"] = [{"session": session, "score": 1.0, "response": "r"} for session in (0, 1)]
    ours = [name for name in context_names() if get_context(name).__module__.startswith("opd_ext.")]
    sample["batch"] = [sample]
    built = [build_context(ContextConfig(kind)) for kind in ours]
    built.append(build_context(ContextConfig("solution", problem="another")))
    return {
        f"{of}context/{name}" for context in built for name in context.metrics([sample]) for of in ("", "teacher/a/")
    }


def written_names(file: str) -> set[str]:
    """Names that a module stores in its metrics by themselves: assigned, in a mapping, or of a timer.

    A name with a loop variable in it counts once per value; one with any other variable is an emitter's own, which
    runs above.
    """
    tree = ast.parse((PACKAGE / file).read_text())
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    constants = {node.targets[0].id: node.value for node in assigned}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "marked_timer":
            found.add(f"timing_s/{node.args[0].value}")
        elif isinstance(node, ast.For):
            over = constants.get(getattr(node.iter, "id", ""), node.iter)
            texts = [str(item.value) for item in getattr(over, "elts", ()) if isinstance(item, ast.Constant)]
            keys = [key for key in stored_keys(node) if isinstance(key, ast.JoinedStr)]
            found |= {key.values[0].value + text for key in keys for text in texts}
    names = {str(key.value) for key in stored_keys(tree) if isinstance(key, ast.Constant)}
    return found | {name for name in names if re.fullmatch(r"[a-z_]+/\w+", name)}


def stored_keys(tree: ast.AST) -> list[ast.expr]:
    """Keys of mappings that are written down, and of items that are assigned."""
    keys: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys += filter(None, node.keys)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys.append(node.slice)
    return keys


@pytest.fixture(scope="module")
def emitted(tmp_path_factory) -> dict[str, set[str]]:
    """File -> the names that are written to it."""
    log = objective_metrics() | rollout_metrics() | annotation_names() | context_metrics()
    log |= schedule_metrics() | set(teacher_server.traffic([(0.5, 512, 2)]))
    log |= {f"{PREFIX}{alarm}" for alarm in ALARMS}
    for module in ("trainer", "update", "one_step_off", "staleness", "evaluation", "teacher_inputs"):
        log |= written_names(f"bridge/{module}.py")
    return {LOG: log, **report_columns(tmp_path_factory.mktemp("runs"))}


def report_columns(folder: Path) -> dict[str, set[str]]:
    for method in ("a", "b"):
        run = folder / method
        (run / "generations").mkdir(parents=True)
        (run / "config.yaml").write_text(f"opd: {{method: {method}, seed: 1}}\n")
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "phase": "train", "time": 0.0}) + "\n")
        for step in (0, 1):
            rows = [{"data_source": "d", "index": i, "acc": float(i), "response_tokens": 5} for i in (0, 1)]
            dump = run / "generations" / f"val_{step}.jsonl"
            dump.write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods, differences = compare(load_arms(folder), [("a", "b")])
    grades = pd.DataFrame(
        [{"split": "report", "temperature": 1.0, "uid": uid, "sample": 0, "acc": 1.0, "tokens": 5, "truncated": False}
         for uid in ("p", "q")]
    )  # fmt: skip
    records, _ = compare_models({"base": grades, "arm": grades}, "base")
    return {
        SUMMARY: set(before_after(folder / "a").columns),
        COMPARISON: set(methods.columns) | set(differences.columns),
        MODELS: set(records[0]),
    }


@pytest.mark.parametrize("file", [LOG, SUMMARY, COMPARISON, MODELS])
def test_every_emitted_name_is_described(emitted, file):
    assert not undescribed(emitted[file], file), "describe it in opd_ext/report/metrics/table.py"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_every_description_has_its_metric(emitted, section):
    if section.source.startswith("verl/"):
        source = (VERL / section.source.removeprefix("verl/")).read_text()
        missing = [n for metric in section.metrics for n in metric.names.split() if not written_in(source, n)]
        assert not missing, f"verl's {section.source} does not write {missing}"
        return
    assert (PACKAGE / section.source).is_file()
    for metric in section.metrics:
        for name in metric.names.split():
            alone = dataclasses.replace(metric, names=name)
            assert any(map(alone.matches, emitted[section.file])), f"nothing emits {name}"


def written_in(source: str, name: str) -> bool:
    """Whether verl's source has the name as a text, whole or behind a prefix that is added elsewhere."""
    literal, cut, _ = name.partition("<")
    end = "" if cut else r"[\"']"
    if name.startswith("timing_s/"):
        return f'marked_timer("{name.removeprefix("timing_s/")}"' in source
    parts = [part for part in literal.split("/") if part]
    tails = ["/".join(parts[i:]) + ("/" if literal.endswith("/") else "") for i in range(len(parts))]
    return any(re.search(rf"[\"'/}}]{re.escape(tail)}{end}", source) for tail in tails)


def test_the_statuses_of_an_annotation_are_all_described():
    assert not undescribed(f"annotation/{status}" for status in STATUSES)


def test_an_unknown_name_is_found():
    names = ["opd/loss", "opd/los", "val/math/hard/pass_at_16", "val/math/pass_at_x", "step", "rollout/math/accuracy"]
    assert undescribed(names) == ["opd/los", "rollout/math/accuracy", "val/math/pass_at_x"]


def test_a_name_has_one_description():
    for file in (LOG, SUMMARY, COMPARISON, MODELS):
        names = [n for s in SECTIONS if s.file == file for metric in s.metrics for n in metric.names.split()]
        assert len(names) == len(set(names))
