# SPDX-License-Identifier: Apache-2.0
"""verl's agent loop with additions per request: its own sampling seed, the token limit of its phase, annotation.

Every request leaves a row, one that fails too (:mod:`opd_ext.bridge.failures`); of several turns see
:mod:`opd_ext.bridge.turns`.
"""

import asyncio
import math
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayActorError
from verl.experimental.agent_loop.agent_loop import register
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from vllm.sampling_params import RequestOutputKind

from opd_ext.bridge import likeliest
from opd_ext.bridge.failures import FAILURE, in_words, mark_ungraded, unfinished
from opd_ext.bridge.rollouts import ANNOTATION, STOPPED, is_truncated
from opd_ext.bridge.turns import ANSWERED, OUT_OF_TOKENS, ROLLOUT, TURNS, OPDToolAgentLoop, TurnClient, Turns, finish
from opd_ext.config import schema
from opd_ext.context.sequence import render
from opd_ext.credit.annotate import Request, build_annotator
from opd_ext.lessons import is_correct
from opd_ext.seeds import canonical, request_seed
from opd_ext.spans import ERROR, KEY
from opd_ext.tokens.ends import stop_ids


def rollout_seed(run_seed: int, step: int, prompt: Any, draw: int) -> int:
    """Sampling seed of one rollout request, in [0, 2**63).

    Requests of a vLLM server otherwise draw from one stream, so that a rollout depends on which requests arrived
    before it. The prompt enters by its content, so the seed does not depend on its place in a batch.

    Args:
        run_seed: ``opd.seed``.
        step: global step; 0 in validation, so that every evaluation of a run faces the same random numbers.
        prompt: chat messages, anything that JSON can hold.
        draw: index of the sample among the rollouts of its prompt, those of equal prompts before it included.
    """
    return request_seed(canonical([run_seed, step, prompt, draw]))


TOOL_AGENT = "tool_agent"
"""verl's name of its agent with tools, under which ours is found."""

# verl decorates its worker with `ray.remote`; the class itself is what can be subclassed.
_Worker = AgentLoopWorkerTQ.__ray_metadata__.modified_class


class OPDAgentLoopWorker(_Worker):
    """Sets ``seed``, ``max_tokens`` and what vLLM need not produce, and annotates rollouts as they are finished."""

    served_topk: int | None = None  # of how many tokens verl's teacher servers are asked; None: of the sampled one

    def __init__(self, *args: Any, **kwargs: Any):
        register(TOOL_AGENT)(OPDToolAgentLoop)  # before a file of the user's, which may name another
        super().__init__(*args, **kwargs)
        self.servers, self.llm_client = self.llm_client, TurnClient(self.llm_client)
        self.opd = schema.load(self.config.opd)
        self.opd.import_external_libs()
        self.served_topk = self.opd.served_topk
        self.stop_ids = stop_ids(self.config.actor_rollout_ref.model.path, self.tokenizer)
        self._first_exception: str | None = None
        self.annotator = None
        if self.opd.credit.annotates:
            self.annotator = build_annotator(self.opd.credit.annotator, self.tokenizer, self._generate_annotation)

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        validate = trajectory["validate"]
        step = 0 if validate else int(trajectory["step"])
        params = dict(sampling_params)
        params["seed"] = rollout_seed(self.opd.seed, step, _messages(kwargs), _draw(kwargs))
        params["max_tokens"] = self._limit(validate, step)
        # Only the finished token ids are read: no text and no intermediate output per token and request.
        params.update(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        ROLLOUT.set(Turns(params["seed"], params["max_tokens"]))  # of this task, and of those that it starts
        try:
            try:
                return await super()._run_agent_loop(params, trajectory=trajectory, **kwargs)
            except RayActorError:  # a dead server is no rollout that failed
                raise
            except Exception as error:
                return await self._put_unfinished(error, validate, kwargs)
        except Exception as error:
            self._first_exception = self._first_exception or in_words(error)
            raise

    async def _put_unfinished(self, error: Exception, validate: bool, sample: dict[str, Any]) -> None:
        """A row for a rollout that has no response."""
        eos = self.tokenizer.eos_token_id
        try:
            prompt = render(self.tokenizer, _messages(sample), self.config.data.apply_chat_template_kwargs)
        except Exception:  # the template may be what failed
            prompt = [eos]
        sample = {name: value for name, value in sample.items() if name not in ("agent_name", "trace")}
        limit = self.config.data.max_prompt_length
        await self._agent_loop_postprocess(unfinished(prompt[-limit:], eos, error), validate, **sample)

    def first_exception(self) -> str | None:
        """Of those that left no row, in words."""
        return self._first_exception

    def _limit(self, validate: bool, step: int) -> int:
        """New tokens of a rollout at most."""
        rollout, horizon = self.opd.rollout, self.opd.horizon
        if validate:
            return rollout.val_tokens
        return horizon.tokens(step, rollout.train_tokens) if horizon.stop else rollout.train_tokens

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> Any:
        """Tells the grader, in ``extra_info``, whether the response was cut, which its text does not show, and of
        several turns the text of the last.

        What lies beyond the horizon does not train, as what the environment has said does not.
        """
        step, whole = int(kwargs["global_steps"]), self.opd.rollout.train_tokens
        limit = self._limit(validate, step)
        rollout = ROLLOUT.get()
        for one in output if isinstance(output, list) else [output]:
            cut = is_truncated(one.response_ids, self.stop_ids, limit)
            if rollout is not None and rollout.several and FAILURE not in one.extra_fields:
                finish(one, rollout, self.stop_ids)
                one.extra_fields["last_turn"] = self.tokenizer.decode(rollout.last, skip_special_tokens=True)
                cut = rollout.ended == OUT_OF_TOKENS
            one.extra_fields["truncated"] = cut or (TURNS in one.extra_fields and rollout.ended != ANSWERED)
            if not validate and self.opd.horizon.limited:
                one.extra_fields[STOPPED] = cut and limit < whole
                seen = self.opd.horizon.tokens(step, whole)
                one.response_mask = [m if i < seen else 0 for i, m in enumerate(one.response_mask)]
        return await super()._agent_loop_postprocess(output, validate, **kwargs)

    async def _compute_score(self, outputs: list[Any], kwargs: dict[str, Any]) -> None:
        """A row is not graded, scores 0, and whether it is right is open, where its data set has no reference answers
        and where it was stopped at the horizon.
        """
        stopped = outputs[-1].extra_fields.get(STOPPED, False)
        if stopped or (kwargs.get("reward_model") or {}).get("ground_truth", "") is None:
            outputs[-1].reward_score = 0.0
            outputs[-1].extra_fields["reward_extra_info"] = {"score": 0.0, "acc": math.nan, "feedback": ""}
            return
        limit = self.opd.rollout.grading_seconds
        grading = asyncio.ensure_future(super()._compute_score(outputs, kwargs=kwargs))
        try:
            done, _ = await asyncio.wait({grading}, timeout=limit)
            if not done:
                grading.cancel()
                raise TimeoutError(f"the reward function took longer than opd.rollout.grading_seconds={limit:g}")
            grading.result()
        except RayActorError:
            raise
        except Exception as error:  # the user's reward function may raise whatever it likes
            mark_ungraded(outputs[-1], error)

    # ------------------------------------------------------------------ annotation

    async def _compute_teacher_logprobs(self, output, prompt_ids, response_ids, validate, **kwargs: Any) -> None:
        """verl's hook between the score of a rollout and its way into the queue: the rollout servers are still awake,
        and earlier rollouts are annotated while later ones are being sampled."""
        scoring = super()._compute_teacher_logprobs(output, prompt_ids, response_ids, validate, **kwargs)
        if self.served_topk is not None and not validate:
            scoring = likeliest.answered(scoring, output, self.served_topk)
        await scoring
        if self.annotator is not None and not validate and FAILURE not in output.extra_fields:
            annotation = await self._annotate(output, kwargs["sample_kwargs"])
            if annotation is not None:
                output.extra_fields[ANNOTATION] = annotation

    async def _annotate(self, output: Any, sample: dict[str, Any]) -> dict[str, Any] | None:
        """The annotation of one rollout, or None if no loss term of this step would read it. Never raises."""
        step = int(sample["global_steps"])
        if self.opd.schedule(step)[0] == 0:
            return None
        grade = output.extra_fields.get("reward_extra_info") or {}
        score = float(output.reward_score or 0.0)
        correct = is_correct(float(grade.get("acc", score)), score)
        label = KEY if correct else ERROR
        if label not in self.opd.active_spans and self.opd.credit.inactive_span == "nonspan":
            return None
        extra_info, messages = dict(sample.get("extra_info") or {}), _messages(sample)
        ids = list(output.response_ids)
        request = Request(
            problem=str(extra_info.get("question") or messages[-1]["content"]),
            response_ids=tuple(ids),
            correct=correct,
            finished=bool(ids) and ids[-1] in self.stop_ids,
            extra_info=extra_info,
            seed=rollout_seed(self.opd.seed, step, messages, _draw(sample)),
        )
        return (await self.annotator.annotate(request)).as_dict()

    async def _generate_annotation(
        self, messages: Sequence[dict], max_tokens: int, temperature: float
    ) -> tuple[str, int, int]:
        """A chat with the model that is being trained, on its rollout servers, without thinking.

        Returns:
            Text, prompt tokens, sampled tokens.

        Raises:
            ValueError: prompt and answer exceed the servers' model length.
        """
        kwargs = {**(self.config.data.apply_chat_template_kwargs or {}), "enable_thinking": False}
        prompt = render(self.tokenizer, messages, kwargs)
        longest = self.config.actor_rollout_ref.rollout.max_model_len
        if len(prompt) + max_tokens > longest:
            raise ValueError(f"annotation needs {len(prompt)} + {max_tokens} tokens, max_model_len is {longest}")
        params = {"temperature": temperature, "max_tokens": max_tokens, "top_p": 1.0, "top_k": -1, "logprobs": False}
        params.update(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        answer = await self.servers.generate(request_id=uuid4().hex, prompt_ids=prompt, sampling_params=params)
        text = self.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        return text, len(prompt), len(answer.token_ids)


def _draw(sample: dict[str, Any]) -> int:
    return int(sample["first_draw"]) + int(sample["session_id"])


def _messages(sample: dict[str, Any]) -> list[dict]:
    return [dict(message) for message in sample["raw_prompt"]]


class OPDAgentLoopManager(AgentLoopManagerTQ):
    """Starts :class:`OPDAgentLoopWorker` actors (named in ``rollout.agent.agent_loop_manager_class``)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(OPDAgentLoopWorker)

    def first_exception(self) -> str | None:
        """Of the rollouts that left no row, in words; None if no worker met any."""
        for worker in self.agent_loop_workers:
            try:
                if told := ray.get(worker.first_exception.remote()):
                    return told
            except RayActorError:  # the others may know
                continue
        return None
