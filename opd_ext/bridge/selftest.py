# SPDX-License-Identifier: Apache-2.0
"""What a reviewer asks first, measured once per run in front of its first update, on two rollouts of its own.

Does the head see the model's logits, is a sequence in a pack what it is alone, what does the teacher say of the
student's own input, and does the sampler score tokens as the trainer does? Nothing here draws a random number or keeps
a gradient, so that a run with the test is the run without it.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from opd_ext.bridge import staleness
from opd_ext.bridge.engine import OPDEngine
from opd_ext.bridge.teachers import LESSON, Tutor
from opd_ext.config.checks import external_models
from opd_ext.files import write_whole
from opd_ext.objective.head import divergence_head
from opd_ext.tokens.ends import named_ends

LENGTH = 64  # tokens of a sequence that head and packing are tried on, and of a response
# Nats that rounding explains, as means over the tokens of a sequence. At single tokens rounding and faults overlap in
# bf16: logits between 32 and 64, as SmolLM2-135M's, are 0.25 apart there. Measured with it in bf16 on a CPU: head 0, a
# sequence in a pack 0.017 from itself alone (0.34 at the worst token), vLLM 0.034 from the trainer, another engine.
# Neighbours that are read move tiny random models, logits of unit scale, by 0.13 (lfm2) to 1.0 (gpt_oss).
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
SAMPLER = 3  # so many times the tolerance: two engines with kernels of their own
ALIKE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}  # of the KL between equal weights


@dataclasses.dataclass(frozen=True)
class Probe:
    """A rollout as plain lists; the sampler's log-probs and the teacher's prompt where there are such.

    ``lesson`` is the place of its teacher among several.
    """

    prompt: list[int]
    response: list[int]
    mask: list[int]
    sampled: list[float] | None = None
    teacher_prompt: list[int] | None = None
    lesson: int = 0


def choose(batch: KVBatchMeta, fields: Sequence[str]) -> list[Probe]:
    """The two shortest rollouts of a batch, of each teacher's, that have a response and, if any has, a teacher."""
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(fields))
    columns = {name: [row.tolist() for row in data[name].unbind()] for name in fields}
    found: dict[int, list[Probe]] = {}
    for i, response in enumerate(columns["responses"]):
        teacher = columns["teacher_input_ids"][i] if columns.get("has_teacher", [False] * (i + 1))[i] else None
        sampled = columns["rollout_log_probs"][i][:LENGTH] if "rollout_log_probs" in columns else None
        shown = None if teacher is None else teacher[: len(teacher) - len(response)]
        prompt, mask = columns["prompts"][i], columns["loss_mask"][i][:LENGTH]
        lesson = columns[LESSON][i] if LESSON in columns else 0
        if response:
            found.setdefault(lesson, []).append(Probe(prompt, response[:LENGTH], mask, sampled, shown, lesson))
    return [probe for _, probes in sorted(found.items()) for probe in sorted(probes, key=_shortest)[:2]]


def _shortest(probe: Probe) -> tuple[bool, int]:
    return probe.teacher_prompt is None, len(probe.prompt) + len(probe.teacher_prompt or ())


@torch.no_grad()
def examine(student: OPDEngine, probes: Sequence[Probe]) -> dict[str, Any]:
    """Differences in nats, on one rank's engines; every rank must call it at once, with the same probes.

    A model that is found to read its neighbour in a pack is given passes of its own from here on.
    """
    with student.eval_mode():
        weight = student.head_weight()
        tolerance = TOLERANCE[weight.dtype]
        found: dict[str, Any] = {"tolerance": tolerance, "alike": ALIKE[weight.dtype]}
        found |= _head_and_packing(student, weight, [(probe.prompt + probe.response)[:LENGTH] for probe in probes])
        if found["packing"] > tolerance:
            for engine in (student, *(tutor.engine(student) for tutor in student.tutors)):
                engine.alone = True
        found |= {"alone": student.alone, "shared_by": student.ulysses_sequence_parallel_size}
        rows = _rows(student, [p.prompt + p.response for p in probes], [p.response for p in probes])
        found |= _sampler(student, weight, rows, probes)
        for i, tutor in enumerate(student.tutors):
            mine = [(row, probe) for row, probe in zip(rows, probes, strict=True) if probe.lesson == i]
            said = _teacher(student, tutor, weight, mine)
            found |= {"teachers": found.get("teachers", {}) | {tutor.name: said}} if tutor.name else said
        return found


def _head_and_packing(student: OPDEngine, weight: torch.Tensor, sequences: list[list[int]]) -> dict[str, float]:
    """Mean difference of log-probs: ours and the model's own; of the worse sequence, in a pack and alone."""
    labels = [ids[1:] for ids in sequences]
    single = [_rows(student, [ids], [after])[0] for ids, after in zip(sequences, labels, strict=True)]
    alone = [_log_prob(student, r, weight, after) for r, after in zip(single, labels, strict=True)]
    packed = _rows(student, sequences, labels)
    together = [_log_prob(student, r, weight, after) for r, after in zip(packed, labels, strict=True)]
    logits = student.model_logits(sequences[0])[:-1].float().log_softmax(-1)
    own = logits.gather(-1, torch.tensor(labels[0], device=logits.device)[:, None])[:, 0]
    return {
        "head": (alone[0] - own).abs().mean().item(),
        "packing": max((b - a).abs().mean().item() for a, b in zip(alone, together, strict=True)),
    }


def _sampler(
    student: OPDEngine, weight: torch.Tensor, rows: list[torch.Tensor], probes: Sequence[Probe]
) -> dict[str, float]:
    """Mean difference of the sampler's log-probs and ours, on trained tokens."""
    gaps = []
    for row, probe in zip(rows, probes, strict=True):
        if probe.sampled is not None:
            ours = _log_prob(student, row, weight, probe.response, student.objective.temperature).cpu()
            gaps.append((ours - torch.tensor(probe.sampled)).abs()[torch.tensor(probe.mask).bool()])
    values = torch.cat(gaps) if gaps else torch.empty(0)
    return {"sampler": values.mean().item()} if len(values) else {}


def _teacher(
    student: OPDEngine, tutor: Tutor, weight: torch.Tensor, probes: Sequence[tuple[torch.Tensor, Probe]]
) -> dict[str, float]:
    """Mean reverse KL of student and teacher: on the student's own input, and on the teacher's.

    ``probes`` come with the student's rows, and are this teacher's.
    """
    taught = (
        []
        if tutor.served or tutor.foreign
        else [(row, probe) for row, probe in probes if probe.teacher_prompt is not None]
    )
    found: dict[str, float] = {}
    for name in ("equal_input", "teacher_input") if taught else ():
        prompts = [p.prompt if name == "equal_input" else p.teacher_prompt or [] for _, p in taught]
        ids = [prompt + p.response for prompt, (_, p) in zip(prompts, taught, strict=True)]
        responses = [p.response for _, p in taught]
        theirs = tutor.kind.output(student, tutor.own, _batch(ids, responses))
        their_rows = student.whole_rows(theirs.rows, [len(response) for response in responses])
        apart = [
            _divergence(student, row, weight, their, theirs.head)
            for (row, _), their in zip(taught, their_rows, strict=True)
        ]
        rest = torch.cat([each[1:] for each in apart])
        found |= {
            name: torch.cat(apart).mean().item(),
            f"{name}_token0": torch.stack([each[0] for each in apart]).mean().item(),
            f"{name}_rest": rest.mean().item() if len(rest) else 0.0,
        }
    return found


def _batch(sequences: Sequence[list[int]], responses: Sequence[list[int]]) -> TensorDict:
    def jagged(rows: Sequence[list[int]]) -> torch.Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    taught = torch.ones(len(sequences), dtype=torch.bool)
    return tu.get_tensordict(
        {"teacher_input_ids": jagged(sequences), "responses": jagged(responses), "has_teacher": taught},
        {"one_pass": True},
    )


def _rows(engine: OPDEngine, sequences: Sequence[list[int]], responses: Sequence[list[int]]) -> list[torch.Tensor]:
    found = engine.response_hidden_states(_batch(sequences, responses))
    return engine.whole_rows(found, [len(response) for response in responses])


def _log_prob(
    engine: OPDEngine, rows: torch.Tensor, weight: torch.Tensor, labels: list[int], temperature: float = 1.0
) -> torch.Tensor:
    ids = torch.tensor(labels, device=rows.device)
    precision = torch.float32 if engine.objective.fp32 else None
    out = divergence_head(
        rows, weight, labels=ids, kind=None, temperature=temperature, mode="recompute", matmul_dtype=precision
    )
    return out.need("student_log_prob")[0]


def _divergence(
    engine: OPDEngine, mine: torch.Tensor, weight: torch.Tensor, theirs: torch.Tensor, head: torch.Tensor
) -> torch.Tensor:
    precision = torch.float32 if engine.objective.fp32 else None
    out = divergence_head(mine, weight, theirs, head, mode="recompute", matmul_dtype=precision)
    return out.need("divergence")[0]


# ---------------------------------------------------------------------- what is said of it


def run(trainer: Any, batch: KVBatchMeta, taught: bool) -> None:
    """Test the engines of a trainer in front of its first update, print what was found and write ``selftest.json``.

    Raises:
        RuntimeError: the loss would be computed from other logits than the model's.
    """
    opd, model = trainer.opd, trainer.config.actor_rollout_ref.model.path
    if not opd.selftest or trainer.tested:
        return
    trainer.tested, placed = True, taught and opd.asks and not opd.told_in_turns
    fields = ["prompts", "responses", "loss_mask", *(["has_teacher", "teacher_input_ids", LESSON] if placed else [])]
    sampler = trainer.config.actor_rollout_ref.rollout.calculate_log_probs
    older = not staleness.is_current(batch.tags, trainer.global_steps)  # whose log-probs are other numbers
    if sampler and not older:
        fields.append("rollout_log_probs")
    if not (probes := choose(batch, fields)):
        return
    found = trainer.actor_rollout_wg.selftest(probes)[0]
    found["older"] = older
    found["ends"] = named_ends(model, trainer.tokenizer)
    for path in external_models(opd, foreign=False).values():  # another tokenizer's end is translated
        found["ends"] |= {f"teacher's {who}": ids for who, ids in named_ends(path).items()}
    for view in opd.views:
        said = found["teachers"][view.name] if view.name else found
        said["equal_weights"] = trainer.global_steps == 1 and not view.opd.teacher.path
        served = opd.distils and view.opd.teacher.backend == "server"
        said["untaught"] = "its server scores tokens alone" if served else "there is none in this step"
        if opd.told_in_turns:
            said["untaught"] = "it is told something in later turns, which its prompt does not show"
        if view.opd.teacher.foreign:
            said["untaught"] = "it reads tokens of its own, and no distribution can be compared"
    lines, warnings, stop = report(found)
    result = found | {"lines": lines, "warnings": warnings, "stop": stop}
    write_whole(trainer.run_dir / "selftest.json", json.dumps(result, indent=2) + "\n")
    for line in [*lines, *(f"warning: {warning}" for warning in warnings)]:
        trainer.log.note(line)
    if stop is not None:
        raise RuntimeError(stop)


def report(found: dict[str, Any]) -> tuple[list[str], list[str], str | None]:
    """Four lines for the console, warnings, and the sentence that stops the run, or None.

    Args:
        found: of :func:`examine`; ``ends``, token ids that end a response by who names them; ``equal_weights``, so that
            nothing may lie between student and teacher on equal input; ``untaught``, why no teacher was asked. Of
            several teachers the last two, and what was found of each, stand in ``teachers``, by name.
    """
    lines, warnings = [_head_line(found), *_compared(found), _ends_line(found["ends"])], []
    if found["packing"] > found["tolerance"]:
        warnings.append(
            f"The model reads its neighbours in a pack (log-probs move by {found['packing']:.2g} nats): every sequence "
            "takes a pass of its own in this run, which is exact and slower."
        )
    for name, said in found.get("teachers", {"": found}).items():
        if "equal_input" not in said or not said["equal_weights"] or abs(said["equal_input"]) <= found["alike"]:
            continue
        whose = f"Teacher {name}".rstrip()
        warnings.append(
            f"{whose} and student should be equal and are {said['equal_input']:.2g} nats apart on equal input: look at "
            "the dtypes and attention of both."
        )
    if found.get("sampler", 0.0) > SAMPLER * found["tolerance"]:
        warnings.append(
            f"The sampler's log-probs differ from the trainer's by {found['sampler']:.2g} nats: look at the dtypes of "
            "both, and whether sampling changes its probabilities (top_p, penalties)."
        )
    theirs = {i for who, ids in found["ends"].items() if who.startswith("teacher") for i in ids}
    own = {i for who, ids in found["ends"].items() if not who.startswith("teacher") for i in ids}
    if theirs and not theirs & own:
        warnings.append("Student and teacher end a response with different tokens: responses may grow until cut.")
    stop = None
    if found["head"] > found["tolerance"] and found["shared_by"] > 1:
        stop = (
            f"Log-probs of a sequence that {found['shared_by']} ranks share are {found['head']:.2g} nats from those of "
            "the model alone: its attention cannot be shared, or it changes logits after the head; set "
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size=1."
        )
    elif found["head"] > found["tolerance"]:
        stop = (
            f"The model's own log-probs are {found['head']:.2g} nats from those of its lm_head: it changes logits "
            "after the head, which the loss would not see; choose another model, or opd.selftest=false."
        )
    return lines, warnings, stop


def _head_line(found: dict[str, Any]) -> str:
    own = ", each in a pass of its own" if found["alone"] else ""
    own += f", shared by {found['shared_by']} ranks" if found["shared_by"] > 1 else ""
    return (
        f"self-test, head: {found['head']:.1e} nats from the model's own log-probs; a sequence in a pack is "
        f"{found['packing']:.1e} from itself alone{own}"
    )


def _compared(found: dict[str, Any]) -> list[str]:
    teachers = [_teacher_line(name, said) for name, said in found.get("teachers", {"": found}).items()]
    sampler = "not compared: set actor_rollout_ref.rollout.calculate_log_probs"
    if found.get("older"):
        sampler = "not compared: these rollouts were sampled by an earlier version of the policy"
    elif "sampler" in found:
        sampler = f"{found['sampler']:.1e} nats from the trainer's log-probs"
    return [*teachers, f"self-test, sampler: {sampler}"]


def _teacher_line(name: str, found: dict[str, Any]) -> str:
    whose = f"self-test, teacher {name}".rstrip()
    if "equal_input" not in found:
        return f"{whose}: not asked, {found['untaught']}"
    expected = ", 0 expected" if found["equal_weights"] else ""
    return (
        f"{whose}: {found['equal_input']:.1e} nats from the student on equal input{expected}; with its own prompt "
        f"{found['teacher_input_token0']:.2g} on the first token, {found['teacher_input_rest']:.2g} on the rest"
    )


def _ends_line(ends: dict[str, list[int]]) -> str:
    named = "; ".join(f"{who} {', '.join(map(str, ids)) or 'none'}" for who, ids in ends.items())
    return f"self-test, ends of a response: {named}"
