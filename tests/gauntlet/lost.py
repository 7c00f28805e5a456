# SPDX-License-Identifier: Apache-2.0
"""Situations in which a rollout, a draw or a prompt gets lost between a row of the data and the batch that trains."""

import asyncio
import dataclasses

import pytest
from transformers import AutoTokenizer

from opd_ext.bridge import failures
from opd_ext.bridge.agent_loop import OPDAgentLoopWorker
from opd_ext.bridge.first_cause import first_cause
from opd_ext.bridge.rollouts import first_draws, read_rows, summarise
from opd_ext.bridge.schedule import desks
from opd_ext.bridge.teacher_inputs import Desk, plan_teacher_inputs
from opd_ext.config import schema
from opd_ext.context.base import get_context
from opd_ext.context.sequence import render
from opd_ext.seeds import Copies
from tests.gauntlet.rollouts import CHATS, THOUGHTLESS, put_rollouts
from tests.unit.bridge.contract.seams import bare

CUT = "data.filter_overlong_prompts=false", "actor_rollout_ref.rollout.prompt_length=64"
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]


def reward_that_raises(config, queue, monkeypatch, model) -> None:
    """One of four rollouts cannot be graded: four rows, of which one failed, and the run ends with the exception."""

    async def score(self, outputs, kwargs):
        if kwargs["index"] == 1:
            raise KeyError("unit_tests")
        outputs[-1].reward_score = 1.0
        outputs[-1].extra_fields["reward_extra_info"] = {"acc": 1.0}

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = read_rows(
        put_rollouts(config, queue, monkeypatch, tokenizer, score=score),
        tokenizer,
        max_tokens=64,
        stops=[tokenizer.eos_token_id],
    )
    assert rows[1]["score"] == 0.0 and len(rows) == len(CHATS) and summarise(rows, "val")["val/accuracy"] == 0.75
    metrics, line = failures.account(rows, len(CHATS), "zero", "val", lambda: None)
    assert metrics == {"val/failed": 0.25} and "KeyError: 'unit_tests' (data_source sums, index 1" in line
    with pytest.raises(RuntimeError, match="KeyError: 'unit_tests'"):
        failures.account(rows, len(CHATS), schema.load(config.opd).rollout.failed, "val", lambda: None)
    with pytest.raises(RuntimeError, match="1 of 4 rollouts are missing"):
        failures.account(rows[1:], len(CHATS), "zero", "val", lambda: None)


def copies_of_a_row(config, monkeypatch) -> None:
    """Eight copies sampled once are the eight draws of one row sampled eight times, whatever lies between them."""
    copies = seeds(config, monkeypatch, [CHATS[0], CHATS[1]] * 8, n=1)
    once = seeds(config, monkeypatch, [CHATS[0], CHATS[1]], n=8)
    assert copies.keys() == once.keys() and len(copies) == 2
    for prompt, drawn in copies.items():
        assert len(set(drawn)) == 8 and sorted(drawn) == sorted(once[prompt])


def seeds(config, monkeypatch, prompts: list, n: int) -> dict[str, list[int]]:
    """The seeds of the requests for each prompt, as our agent loop hands them to verl's."""
    found: dict[str, list[int]] = {}

    async def run(self, sampling_params, **kwargs):
        found.setdefault(str(kwargs["raw_prompt"]), []).append(sampling_params["seed"])

    monkeypatch.setattr(OPDAgentLoopWorker.__mro__[1], "_run_agent_loop", run)
    worker = bare(OPDAgentLoopWorker, opd=schema.load(config.opd))
    for prompt, draw in zip(prompts, first_draws(prompts, Copies(), n), strict=True):
        for session in range(n):
            where = {"validate": True, "step": 0}
            sample = {"raw_prompt": prompt, "session_id": session, "first_draw": draw}
            asyncio.run(worker._run_agent_loop({}, where, **sample))
    return found


def another_prompt_than_was_sent(start, config, queue, monkeypatch, model) -> None:
    """What would cut prompts for the student alone is refused; the teacher reads the tools that the student was sent,
    and of a prompt that was changed on the way it is asked nothing.
    """
    for words in CUT:
        status, said, started, _ = start(words)
        assert status == 2 and words.partition("=")[0] in said and "for the student alone" in said and not started
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = THOUGHTLESS
    batch = put_rollouts(config, queue, monkeypatch, tokenizer, tools=TOOLS)
    rows = read_rows(batch, tokenizer, max_tokens=64, stops=[tokenizer.eos_token_id])
    for name in ("same", "instruction"):
        context = get_context(name)()
        inputs, _ = plan_teacher_inputs(
            rows, batch, [Desk(context)], tokenizer, {}, TOOLS, max_pair_length=4096, step=1
        )
        for row, found, chat in zip(rows, inputs, CHATS, strict=True):
            prompt = render(tokenizer, context.messages({"raw_prompt": chat}), {"tools": TOOLS})
            assert found.ids[: len(prompt)] == prompt and len(found.ids) == len(prompt) + row["response_tokens"]
    with pytest.raises(RuntimeError, match="the teacher would answer another question"):
        plan_teacher_inputs(rows, batch, [Desk(context)], tokenizer, {}, None, 4096, 1)


def pairs_that_are_all_too_long(config, queue, monkeypatch, model) -> None:
    """Twice nothing trains, and the rows stay for verl to clear; the third time the run ends with the key to change."""
    from opd_ext.bridge.trainer import SyncTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    opd = dataclasses.replace(schema.load(config.opd), max_pair_length=8)
    batch = put_rollouts(config, queue, monkeypatch, tokenizer)
    parts = {"config": config, "opd": opd, "tokenizer": tokenizer, "desks": desks(opd, tokenizer, []), "tools": None}
    trainer = bare(SyncTrainer, **parts, global_steps=1, full_steps=0)
    rows = read_rows(batch, tokenizer, max_tokens=64, stops=[tokenizer.eos_token_id])
    for _ in range(2):
        kept, taught = trainer._add_teacher_inputs(batch, rows, metrics := {})
        assert not taught and kept.keys == batch.keys and metrics["rollout/too_long"] == 1.0
    with pytest.raises(RuntimeError, match="opd.max_pair_length=8: the longest teacher prompt has"):
        trainer._add_teacher_inputs(batch, rows, {})
    queue.kv_clear(keys=kept.keys, partition_id="train")


def adapter_on_the_head(start) -> None:
    lora = "actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora.merge=true"
    for target in ("lm_head", "embed_tokens"):
        words = (*lora, f"actor_rollout_ref.model.target_modules=[q_proj,{target}]", "opd.teacher.weights=base")
        status, said, started, _ = start(*words)
        assert status == 2 and f"{target} cannot have an adapter" in said and not started, said


def server_that_never_comes_up(tmp_path, capsys) -> None:
    """vLLM refuses a flag that it does not have; what it wrote last is what the run says."""
    from ray.core.generated.common_pb2 import ActorDiedErrorContext
    from ray.exceptions import ActorDiedError
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with pytest.raises(SystemExit) as ended:
        AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--no-such-flag", "1"])
    logs = tmp_path / "session_1" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker-0a-4242.err").write_text(capsys.readouterr().err)
    words = f"Worker exits with an exit code {ended.value.code}."
    died = ActorDiedErrorContext(class_name="vLLMHttpServer", actor_id=bytes(16), pid=4242, error_message=words)
    said = first_cause(ActorDiedError(died), [tmp_path])
    assert "no-such-flag" in said and "4242" in said
