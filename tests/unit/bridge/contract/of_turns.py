# SPDX-License-Identifier: Apache-2.0
"""Contracts of rollouts of several turns: verl's agent with tools, its parsers, and the tokens between two turns."""

import asyncio
import random
from types import SimpleNamespace

from transformers import AutoTokenizer
from verl.experimental.agent_loop import agent_loop
from verl.experimental.agent_loop.tool_agent_loop import AgentState, ToolAgentLoop
from verl.workers.rollout.replica import TokenOutput

from opd_ext.bridge import inputs
from opd_ext.bridge.turns import OPDToolAgentLoop, finish
from tests.unit.bridge.transcripts import Script, check, play

from .seams import bare, says, seam

LOOP = "verl.experimental.agent_loop.tool_agent_loop:"
AGENT = f"{LOOP}ToolAgentLoop."


@seam("bridge/agent_loop.py", pins={"verl.experimental.agent_loop.agent_loop:register": "agent_name"})
def names_of_loops():
    """A name registered again means the later class; a file of the user's is read after that."""
    before = dict(agent_loop._agent_loop_registry)
    try:
        agent_loop.register("tool_agent")(OPDToolAgentLoop)
        assert agent_loop._agent_loop_registry["tool_agent"] == {"_target_": "opd_ext.bridge.turns.OPDToolAgentLoop"}
    finally:
        agent_loop._agent_loop_registry.clear()
        agent_loop._agent_loop_registry.update(before)
    says(
        "verl.experimental.agent_loop.agent_loop:AgentLoopWorker.__init__",
        "_agent_loop_registry[agent_loop_config.name] = agent_loop_config",
    )
    says("verl.experimental.agent_loop.agent_loop:AgentLoopWorker._run_agent_loop", "server_manager=self.llm_client")


@seam(
    "bridge/turns.py",
    covers="OPDToolAgentLoop.run OPDToolAgentLoop._handle_generating_state "
    "OPDToolAgentLoop._handle_processing_tools_state OPDToolAgentLoop._call_tool OPDToolAgentLoop.config "
    "OPDToolAgentLoop.max_assistant_turns OPDToolAgentLoop.max_user_turns OPDToolAgentLoop.max_parallel_calls "
    "OPDToolAgentLoop.tool_parser OPDToolAgentLoop.tools",
    pins={
        f"{AGENT}run": "self sampling_params priority= **kwargs",
        f"{AGENT}_handle_generating_state": "self agent_data sampling_params ignore_termination=",
        f"{AGENT}_handle_processing_tools_state": "self agent_data",
        f"{AGENT}_call_tool": "self tool_call tools_kwargs agent_data",
        f"{LOOP}AgentData": None,
        f"{LOOP}AgentState": None,
        f"{LOOP}ToolAgentLoop": None,
        "verl.experimental.agent_loop.tool_parser:FunctionCall": None,
        "verl.tools.schemas:ToolResponse": None,
        "verl.workers.rollout.replica:TokenOutput": None,
    },
)
def turns_of_an_agent(config, model):
    """Every turn is one state that generates and one that calls tools; a rollout ends where either says TERMINATED,
    and a failed call is told in the words that we count."""
    assert issubclass(OPDToolAgentLoop, ToolAgentLoop) and AgentState.TERMINATED.value == "terminated"
    says(f"{AGENT}_call_tool", "Unknown function '", "Invalid JSON in arguments for '", "Error executing tool '")
    says(f"{AGENT}_call_tool", "return ToolResponse(text=f\"Error executing tool '{tool_name}': {e}\"), 0.0, {}")
    says(
        f"{AGENT}_handle_generating_state",
        "if self.max_assistant_turns and agent_data.assistant_turns >= self.max_assistant_turns:",
        "sampling_params=sampling_params",
    )
    tokenizer, states = AutoTokenizer.from_pretrained(model), []
    plain = OPDToolAgentLoop._handle_generating_state

    async def seen(self, agent_data, sampling_params, ignore_termination=False):
        states.append(await plain(self, agent_data, sampling_params, ignore_termination))
        return states[-1]

    OPDToolAgentLoop._handle_generating_state = seen
    try:
        played = play(config, tokenizer, "qwen3", 0)
    finally:
        OPDToolAgentLoop._handle_generating_state = plain
    check(played, tokenizer.eos_token_id)
    assert len(states) == len(played.script.replies)
    assert set(states[:-1]) <= {AgentState.PROCESSING_TOOLS}


@seam("bridge/turns.py", covers="output.response_ids output.response_logprobs output.response_mask")
def ends_of_a_rollout():
    """A rollout's ids, mask and log-probs may be exchanged before it goes into the queue; pictures are told apart."""
    output = agent_loop.AgentLoopOutput(
        prompt_ids=[1], response_ids=[2, 3, 4], response_mask=[1, 1, 0], response_logprobs=[-1.0, -2.0, 0.0], metrics={}
    )
    rollout = SimpleNamespace(ended="answer", last=[2, 3], record=lambda mask: {"written": sum(mask)})
    finish(output, rollout, [3])
    found = output.as_dict()
    assert found["responses"].tolist() == [2, 3] and found["response_mask"].tolist() == [1, 1]
    assert found["rollout_log_probs"].tolist() == [-1.0, -2.0]
    assert found["extra_fields"]["opd_turns"] == {"written": 2} and not output.multi_modal_data


@seam(
    "bridge/turns.py",
    pins={"verl.workers.rollout.llm_server:LLMServerClient.generate": None},
)
def requests_of_turns(model):
    """An empty ``TokenOutput`` is a turn without tokens, and a loop asks its client by keyword alone."""
    empty = TokenOutput(token_ids=[])
    assert not empty.log_probs and not empty.token_ids and empty.extra_fields == {}
    says(f"{AGENT}_handle_generating_state", "request_id=agent_data.request_id, prompt_ids=agent_data.prompt_ids")
    script = Script(AutoTokenizer.from_pretrained(model), random.Random(0))
    found = asyncio.run(script.generate("r", prompt_ids=[1], sampling_params={"max_tokens": 3}))
    assert len(found.token_ids) == len(found.log_probs) <= 3


@seam(
    "bridge/inputs.py",
    pins={
        "verl.experimental.agent_loop.tool_parser:ToolParser": None,
        "verl.experimental.agent_loop.tool_parser:ToolParser.get_tool_parser": None,
        "verl.utils.tokenizer.continuous_token_wiring:create_continuous_token_builder": "tokenizer * model_family= "
        "hf_model_type= chat_template_kwargs= mm_processor_kwargs= processor= **builder_kwargs",
        "verl.utils.tokenizer.continuous_token:ContinuousTokenBuilder.merge_context_tokens": "self previous_messages "
        "updated_messages runtime_token_ids * tools=",
    },
)
def templates_of_turns(config, model):
    """The builder of a model's family says what stands between two turns; a parser is asked for by its format."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    wanted = "\n<|im_start|>tool\n17<|im_end|>\n<|im_start|>assistant\n"
    assert inputs.next_turn(config, tokenizer, "qwen3") == wanted
    config.actor_rollout_ref.rollout.multi_turn.format = "none"
    try:
        inputs.next_turn(config, tokenizer, "qwen3")
    except ValueError as error:
        assert str(error) == "Unknown tool parser: none"
    else:
        raise AssertionError("a format that verl does not have was taken")
    loop = bare(ToolAgentLoop)
    assert not hasattr(loop, "tool_parser"), "the constructor asks for it"
    says(f"{AGENT}__init__", "ToolParser.get_tool_parser(self.rollout_config.multi_turn.format, self.tokenizer)")
