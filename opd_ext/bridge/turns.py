# SPDX-License-Identifier: Apache-2.0
"""Rollouts of several turns: what each request of one may ask for, and how the whole came to its end.

Between an agent loop, verl's or a user's, and the rollout servers stands :class:`TurnClient`. verl hands every turn the
same parameters; with the same seed a turn would repeat the random numbers of the one before, and with the same
``max_tokens`` a rollout of six turns could be six times as long as ``opd.rollout`` allows.
"""

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.tool_agent_loop import AgentData, AgentState, ToolAgentLoop
from verl.experimental.agent_loop.tool_parser import FunctionCall
from verl.tools.schemas import ToolResponse
from verl.workers.rollout.replica import TokenOutput

from opd_ext.seeds import canonical, request_seed

TURNS = "opd_turns"
"""Under which name a rollout of an agent with tools carries what :meth:`Turns.record` says of it."""

ANSWERED, OUT_OF_TOKENS, OUT_OF_TURNS = "answer", "tokens", "turns"

# How verl words what a model may mend: a tool that does not exist, arguments that are no JSON, a tool that raised.
_FAILED = ("Unknown function '", "Invalid JSON in arguments for '", "Error executing tool '")


@dataclass
class Turns:
    """One rollout.

    Attributes:
        seed: of its first request.
        limit: tokens behind its prompt at most, what tools say included.
        agent: an agent with tools is at work, so that one turn is one of several that might have been.
        asked: requests so far.
        prompt: tokens of the first request's prompt.
        last: what the model wrote last.
        calls, failures, ignored: of tools: calls that were made; those that a tool or its name or arguments failed;
            those beyond ``max_parallel_calls`` of their turn, which nobody answered.
        ended: why there was no further turn.
    """

    seed: int
    limit: int
    agent: bool = False
    asked: int = 0
    prompt: int = 0
    last: list[int] = field(default_factory=list)
    calls: int = 0
    failures: int = 0
    ignored: int = 0
    ended: str = ANSWERED

    @property
    def several(self) -> bool:
        """Whether this is a rollout of turns."""
        return self.agent or self.asked > 1

    def parameters(self, prompt_ids: list[int], sampling: dict[str, Any]) -> dict[str, Any] | None:
        """Those of the next request behind ``prompt_ids``; None if no token of it would be within the limit.

        The first is asked for as ever; every later one has a seed of its own, made of the first's and its number.
        """
        if not self.asked:
            self.prompt = len(prompt_ids)
        room = self.limit - (len(prompt_ids) - self.prompt)
        found = {**sampling, "max_tokens": min(room, sampling.get("max_tokens", room))}
        if self.asked:
            found["seed"] = request_seed(canonical([self.seed, self.asked]))
        self.asked += 1
        return found if room > 0 else None

    def record(self, mask: list[int]) -> dict[str, Any]:
        """What is reported of it; ``mask`` is its response's, 1 where the model wrote."""
        return {
            "turns": self.asked - (self.asked > 1 and not self.last),
            "written": sum(mask),
            "environment_tokens": len(mask) - sum(mask),
            "tool_calls": self.calls,
            "tool_failures": self.failures,
            "ignored_calls": self.ignored,
            "ended": self.ended,
        }


ROLLOUT: ContextVar[Turns | None] = ContextVar("opd_rollout", default=None)
"""The rollout that the running task belongs to."""


class TurnClient:
    """verl's client of the rollout servers, which tells the turns of a rollout apart."""

    def __init__(self, client: Any):
        self.client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> TokenOutput:
        """As verl's; a turn that has no room is empty, and nobody is asked for it."""
        rollout = ROLLOUT.get()
        if rollout is None:
            return await self.client.generate(
                request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **kwargs
            )
        own = rollout.parameters(prompt_ids, sampling_params)
        if own is None:
            rollout.last, rollout.ended = [], OUT_OF_TOKENS
            return TokenOutput(token_ids=[])
        found = await self.client.generate(request_id, prompt_ids=prompt_ids, sampling_params=own, **kwargs)
        rollout.last = list(found.token_ids)
        return found


class OPDToolAgentLoop(ToolAgentLoop):
    """verl's agent with tools, which says how it ended and what became of its calls.

    Whatever a tool raises, and an answer that takes longer than ``opd.rollout.tool_seconds``, is told to the model in
    words, as verl does; a call that cannot be read is text, and ends the rollout as any other text.
    """

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        if (rollout := ROLLOUT.get()) is not None:
            rollout.agent = True
        return await super().run(sampling_params, priority=priority, **kwargs)

    async def _handle_generating_state(
        self, agent_data: AgentData, sampling_params: dict[str, Any], ignore_termination: bool = False
    ) -> AgentState:
        state = await super()._handle_generating_state(agent_data, sampling_params, ignore_termination)
        rollout = ROLLOUT.get()
        if rollout is not None and state == AgentState.TERMINATED and rollout.ended == ANSWERED:
            rollout.ended = await self._reason(agent_data)
        return state

    async def _reason(self, agent_data: AgentData) -> str:
        """Why no turn follows: verl looks for calls only where one may."""
        tools = [tool.tool_schema for tool in self.tools.values()]
        _, calls = await self.tool_parser.extract_tool_calls(agent_data.response_ids, tools)
        if not calls:
            return ANSWERED
        turns = (self.max_assistant_turns, agent_data.assistant_turns), (self.max_user_turns, agent_data.user_turns)
        return OUT_OF_TURNS if any(most and made >= most for most, made in turns) else OUT_OF_TOKENS

    async def _handle_processing_tools_state(self, agent_data: AgentData) -> AgentState:
        rollout = ROLLOUT.get()
        if rollout is not None:
            rollout.ignored += max(0, len(agent_data.tool_calls) - self.max_parallel_calls)
        state = await super()._handle_processing_tools_state(agent_data)
        if rollout is not None and state == AgentState.TERMINATED:  # what the tools say has no room
            rollout.ended = OUT_OF_TOKENS
        return state

    async def _call_tool(
        self, tool_call: FunctionCall, tools_kwargs: dict[str, Any], agent_data: AgentData
    ) -> tuple[ToolResponse, float, dict]:
        seconds = self.config.opd.rollout.tool_seconds
        try:
            found = await asyncio.wait_for(super()._call_tool(tool_call, tools_kwargs, agent_data), seconds)
        except asyncio.TimeoutError:  # a tool's own is told by verl
            late = f"Error executing tool '{tool_call.name}': it took longer than {seconds:g} s"
            found = ToolResponse(text=late), 0.0, {}
        if (rollout := ROLLOUT.get()) is not None:
            rollout.calls += 1
            rollout.failures += (found[0].text or "").startswith(_FAILED)
        return found


def finish(output: AgentLoopOutput, rollout: Turns, stops: list[int]) -> None:
    """End a rollout of turns with what the model wrote last, and say whether that was an answer.

    What tools said behind it is in no loss and in nobody's context, so it leaves the response; pictures cannot, since
    their places are counted.
    """
    if rollout.ended == ANSWERED and not (rollout.last and rollout.last[-1] in stops):
        rollout.ended = OUT_OF_TOKENS
    end = len(output.response_mask)
    while end and not output.response_mask[end - 1]:
        end -= 1
    if end and not output.multi_modal_data:
        output.response_ids, output.response_mask = output.response_ids[:end], output.response_mask[:end]
        if output.response_logprobs is not None:
            output.response_logprobs = output.response_logprobs[:end]
    output.extra_fields[TURNS] = rollout.record(output.response_mask)
