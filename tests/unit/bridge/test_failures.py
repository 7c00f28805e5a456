# SPDX-License-Identifier: Apache-2.0
"""No rollout vanishes: what fails is counted and named, and what is missing ends the run."""

import asyncio
import os
from types import SimpleNamespace
from unittest.mock import AsyncMock, patch

import pytest
import torch
import transfer_queue as tq
from ray.exceptions import ActorDiedError

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

from opd_ext.bridge import failures
from opd_ext.bridge.agent_loop import OPDAgentLoopWorker
from opd_ext.bridge.first_cause import first_cause
from opd_ext.bridge.rollouts import first_draws, summarise
from opd_ext.bridge.teacher_inputs import Desk, plan_teacher_inputs
from opd_ext.credit.annotate import Annotation, Found
from opd_ext.credit.horizon import HorizonConfig
from opd_ext.lessons import rendered_with
from opd_ext.seeds import Copies


def rows(failed: int, n: int = 8) -> list[dict]:
    first = {"data_source": "sums", "acc": 0.0, "response_tokens": 3, "truncated": False}
    return [
        {**first, "uid": f"u{i}", "sample": 0, "index": i, "failed": "KeyError: 'unit_tests'" if i < failed else None}
        for i in range(n)
    ]


def account(found: list[dict], wanted: int = 8, choice: str = "zero", exception: str | None = None):
    return failures.account(found, wanted, choice, "val", lambda: exception)


def test_a_rollout_that_fails_scores_zero_and_the_first_is_named_with_its_row():
    metrics, line = account(rows(2))
    assert metrics == {"val/failed": 0.25}
    assert line.startswith("2 of 8 rollouts could not be finished or graded; the first: KeyError: 'unit_tests'")
    assert "(data_source sums, index 0, sample 0)" in line
    assert account(rows(0)) == ({"val/failed": 0.0}, "")


def test_by_default_a_rollout_that_fails_ends_the_run():
    with pytest.raises(RuntimeError, match=r"1 of 8 .*KeyError: 'unit_tests'.*set opd.rollout.failed=zero"):
        account(rows(1), choice="stop")


def test_where_all_fail_the_run_ends_whatever_was_chosen():
    with pytest.raises(RuntimeError, match="8 of 8 .* none is left"):
        account(rows(8))


def test_rows_that_are_missing_end_the_run_and_say_why():
    """9 of 32 validation problems once disappeared, and the accuracy was over the others."""
    with pytest.raises(RuntimeError, match="9 of 32 rollouts are missing; the first exception: ValueError: no teacher"):
        account(rows(0, 23), 32, exception="ValueError: no teacher")


def test_several_outputs_of_one_session_are_one_rollout():
    assert account(rows(0) + rows(0)[:2])[0] == {"val/failed": 0.0}


def test_a_failed_rollout_counts_as_wrong_in_metrics_that_only_graders_give():
    found = rows(1, 2)
    found[1] |= {"acc": 1.0, "format_ok": 1.0}
    assert summarise(found, "val")["val/format_ok"] == 0.5


@pytest.mark.parametrize("error, delivered", [(TimeoutError("tool"), True), (ActorDiedError(), False)])
def test_what_an_agent_loop_raises_leaves_a_row_unless_a_server_is_dead(error, delivered):
    worker = object.__new__(OPDAgentLoopWorker)
    rollout = SimpleNamespace(train_tokens=4, val_tokens=4)
    worker.opd = SimpleNamespace(seed=1, rollout=rollout, horizon=HorizonConfig())
    worker._first_exception = None
    worker.tokenizer = SimpleNamespace(eos_token_id=7, apply_chat_template=lambda *_, **__: list(range(9)))
    data = SimpleNamespace(apply_chat_template_kwargs={}, max_prompt_length=5)
    worker.config = SimpleNamespace(data=data)
    sample = {"raw_prompt": [{"role": "user", "content": "1 + 1"}], "session_id": 0, "first_draw": 0}
    sample |= {"agent_name": "single_turn_agent", "uid": "u"}
    theirs = OPDAgentLoopWorker.__mro__[1]
    with (
        patch.object(theirs, "_run_agent_loop", AsyncMock(side_effect=error)),
        patch.object(OPDAgentLoopWorker, "_agent_loop_postprocess", AsyncMock()) as put,
    ):
        run = worker._run_agent_loop({}, {"validate": False, "step": 1}, **sample)
        if not delivered:
            with pytest.raises(ActorDiedError):
                asyncio.run(run)
            assert worker.first_exception().startswith("ActorDiedError")
            return
        asyncio.run(run)
    (output, validate), named = put.call_args
    assert (output.prompt_ids, output.response_ids, output.response_mask) == ([4, 5, 6, 7, 8], [7], [0])
    assert output.extra_fields[failures.FAILURE] == "TimeoutError: tool" and not validate
    assert named["uid"] == "u" and "agent_name" not in named


def test_three_steps_without_a_pair_that_fits_end_the_run_with_the_key_to_change():
    metrics = {"rollout/too_long": 1.0, "teacher/prompt_tokens_max": 611.0}
    assert failures.check_pairs(metrics, 0, 320) == 1
    assert failures.check_pairs(metrics | {"rollout/too_long": 0.9}, 2, 320) == 0
    with pytest.raises(RuntimeError, match="opd.max_pair_length=320: the longest teacher prompt has 611 tokens"):
        failures.check_pairs(metrics, 2, 320)


def annotated(failed: int, n: int = 8, status: str = "api_error") -> list[dict]:
    """``n`` rollouts of which so many failed, one that was cut off, and one that no loss term would have read."""
    answers = [Found(status, cause="nobody listens") if i < failed else Found("empty") for i in range(n)]
    asked = [{"annotation": Annotation(one.status, called=True, cause=one.cause).as_dict()} for one in answers]
    return [{"annotation": Annotation("skipped").as_dict()}, *asked, {}]


def test_a_step_without_any_annotation_ends_the_run_and_says_why():
    """The endpoint of an annotator was down, and the run trained plain GRPO to its end."""
    account = failures.account_annotations
    with pytest.raises(RuntimeError, match=r"8 of 8 annotations failed; the first: api_error, nobody listens: mend .*"):
        account(annotated(8), "stop")
    with pytest.raises(RuntimeError, match="8 of 8 annotations failed; the first: parse_error"):
        account(annotated(8, status="parse_error"), "stop")
    assert account(annotated(8), "plain") == "8 of 8 annotations failed; the first: api_error, nobody listens"
    assert account(annotated(7), "stop").startswith("7 of 8 annotations failed")


def test_few_annotations_that_fail_and_none_that_was_asked_for_are_not_told():
    assert failures.account_annotations(annotated(1, n=16), "stop") == ""
    assert failures.account_annotations(annotated(0, n=0), "stop") == ""
    assert failures.account_annotations([{}], "stop") == ""


def test_copies_of_a_prompt_are_further_draws_and_single_prompts_are_as_ever():
    one, other = ([{"role": "user", "content": text}] for text in ("1 + 1", "2 + 2"))
    copies = Copies()
    assert first_draws([one, other, one], copies, 4).tolist() == [0, 0, 4]
    assert first_draws([other, one], copies, 4).tolist() == [4, 8], "a set may come in several batches"
    assert first_draws([one], Copies(), 4).tolist() == [0]


def test_a_response_that_nobody_graded_is_not_annotated():
    """Its annotator would be told that it is wrong."""
    worker = object.__new__(OPDAgentLoopWorker)
    worker.annotator = worker._annotate = AsyncMock(return_value=None)
    theirs = OPDAgentLoopWorker.__mro__[1]
    graded, ungraded = SimpleNamespace(extra_fields={}), SimpleNamespace(extra_fields={failures.FAILURE: "KeyError"})
    with patch.object(theirs, "_compute_teacher_logprobs", AsyncMock()):
        for output in (graded, ungraded):
            asyncio.run(worker._compute_teacher_logprobs(output, [1], [2], False, sample_kwargs={}))
    assert [call.args[0] for call in worker._annotate.call_args_list] == [graded]


class Template:
    """Ids are the length of each message, and 9 in front where there are tools."""

    def apply_chat_template(self, chat, tokenize, add_generation_prompt, tools=None):
        return ([9] if tools else []) + [len(message["content"]) for message in chat]


def test_a_teacher_answers_the_question_that_the_student_was_sent_or_the_run_ends():
    """Tools in the student's prompt are in the teacher's; one that was cut on the left is refused."""
    sample = {"raw_prompt": [{"content": "a"}, {"content": "bb"}], "extra_info": {"index": 3}}
    assert rendered_with(Template(), [1, 2], sample, {}, ["tool"]) == {}
    assert rendered_with(Template(), [9, 1, 2], sample, {}, ["tool"]) == {"tools": ["tool"]}
    with pytest.raises(RuntimeError, match=r"sent 1 prompt tokens .*index 3.*opd.context.kind=same"):
        rendered_with(Template(), [2], sample, {}, ["tool"])


def planned(kind: str, prompt: list[int], mask: list[int]):
    """The teacher input of one rollout, whose prompt in the queue is ``prompt``."""
    chat = [{"role": "user", "content": "1 + 1"}]
    content = {"prompts": [prompt], "responses": [[5] * len(mask)], "loss_mask": [mask]}
    data = {
        name: torch.nested.nested_tensor([torch.tensor(row) for row in value], layout=torch.jagged)
        for name, value in content.items()
    }
    data |= {"raw_prompt": [chat], "extra_info": [{"index": 3}]}
    row = rows(0, 1)[0] | {"score": 0.0, "output": "text"}
    template = SimpleNamespace(
        apply_chat_template=lambda chat, **_: [len(message["content"]) for message in chat],
        decode=lambda ids, **_: str(ids),
    )
    context = SimpleNamespace(
        messages=lambda sample: chat if kind == "same" else [{"role": "user", "content": "1 + 1, briefly"}],
        template_kwargs=dict,
        metrics=lambda samples: {},
        ending=None,
        in_turns=False,
    )
    with patch.object(tq, "kv_batch_get", lambda **_: data):
        batch = SimpleNamespace(keys=["u0_0_0"], partition_id="train")
        (shown,), _ = plan_teacher_inputs([row], batch, [Desk(context)], template, {}, None, 64, 1)
    return shown.ids


def test_a_context_that_leaves_the_chat_alone_shows_the_teacher_the_ids_that_the_student_was_sent():
    """A prompt that was cut to its last 40 tokens once met a teacher who saw all 81."""
    assert planned("same", [8, 8], [1]) == [8, 8, 5]
    assert planned("instruction", [5], [1, 1]) == [14, 5, 5]
    with pytest.raises(RuntimeError, match="another question"):
        planned("instruction", [8, 8], [1])


def test_a_rollout_that_was_never_finished_has_no_teacher():
    assert planned("instruction", [8, 8], [0]) is None


def test_a_process_that_died_says_itself_why(tmp_path):
    """A flag that vLLM does not know ended a run with "exit code 2"; the flag stood in the log of the server alone."""
    logs = tmp_path / "session_1" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker-ab-01-77.err").write_text(":actor_name:Server\n\nerror: unrecognized arguments: --no-such-flag\n")
    (logs / "worker-ab-01-7.err").write_text("another process\n")
    error = RuntimeError("The actor died unexpectedly before finishing this task.\n\tclass_name: Server\n\tpid: 77\n")
    said = first_cause(error, [tmp_path, tmp_path / "absent"])
    assert said.splitlines()[-1] == "  error: unrecognized arguments: --no-such-flag" and "process 77" in said
    assert first_cause(KeyError("unit_tests"), [tmp_path]) == "KeyError: 'unit_tests'"
