# SPDX-License-Identifier: Apache-2.0
"""Random rollouts of several turns through verl's own agent loop, parser and templates; the model alone is scripted."""

import asyncio
import json
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.experimental.agent_loop.tool_agent_loop import ToolListWrap
from verl.tools.function_tool import FunctionTool
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput

from opd_ext.bridge.turns import ROLLOUT, OPDToolAgentLoop, TurnClient, Turns, finish

LIMIT, MOST_TURNS = 400, 6
WORDS = "the price of two cups is now 17 and then <think> hm </think> Ünïcødé 价格 🙂 \n\n Answer: {}".split(" ")


def price(item: str) -> str:
    """The price of an item; some have none, and some are long.

    Args:
        item: its name
    """
    if item == "nothing":
        raise ValueError("there is no nothing")
    return "17" if item != "scroll" else "a long story " * 20


SCHEMA = {
    "type": "function",
    "function": {
        "name": "price",
        "description": "The price of an item.",
        "parameters": {
            "type": "object",
            "properties": {"item": {"type": "string", "description": "its name"}},
            "required": ["item"],
        },
    },
}
TOOLS = ToolListWrap([FunctionTool("price", price, OpenAIFunctionToolSchema.model_validate(SCHEMA))])


@dataclass
class Script:
    """A model that writes at random: text, thoughts, calls that are right, wrong, several or broken.

    Attributes:
        requests: prompt and parameters of each.
        replies: ids and their log-probs, which are all different and negative.
    """

    tokenizer: Any
    draw: random.Random
    requests: list[tuple[list[int], dict]] = field(default_factory=list)
    replies: list[tuple[list[int], list[float]]] = field(default_factory=list)

    async def generate(self, request_id, *, prompt_ids, sampling_params, **_):
        self.requests.append((list(prompt_ids), dict(sampling_params)))
        ids = self.tokenizer.encode(self._text(), add_special_tokens=False)
        ids = [*ids, *([self.tokenizer.eos_token_id] if self.draw.random() < 0.95 else [])]
        ids = ids[: sampling_params["max_tokens"]]
        log_probs = [-self.draw.random() - 1e-3 for _ in ids]
        self.replies.append((ids, log_probs))
        return TokenOutput(token_ids=ids, log_probs=log_probs)

    def _text(self) -> str:
        said = " ".join(self.draw.choices(WORDS, k=self.draw.randint(0, 8)))
        thought = f"<think>\n{said}\n</think>\n\n" if self.draw.random() < 0.5 else said
        kind = self.draw.choices(("call", "two", "wrong", "raises", "long", "broken", "text"), (9, 1, 1, 1, 1, 1, 3))[0]
        item = {"raises": "nothing", "long": "scroll"}.get(kind, "cup")
        name = "prize" if kind == "wrong" else "price"
        call = f"<tool_call>\n{json.dumps({'name': name, 'arguments': {'item': item}})}\n</tool_call>"
        if kind == "broken":
            call = call.replace("}}", "}")
        return thought + ("" if kind == "text" else call * (2 if kind == "two" else 1))


@dataclass(frozen=True)
class Played:
    """A rollout, what stood behind it, and what is said of it."""

    script: Script
    output: AgentLoopOutput
    turns: Turns


def play(config, tokenizer, model_type: str, seed: int, limit: int = LIMIT, parallel: int = 2) -> Played:
    """One rollout with random replies, finished as the worker finishes it."""
    draw = random.Random(seed)
    config.actor_rollout_ref.rollout.response_length = LIMIT
    config.actor_rollout_ref.rollout.prompt_length = 4096
    config.actor_rollout_ref.rollout.multi_turn.max_assistant_turns = draw.choice([None, 2, MOST_TURNS])
    config.actor_rollout_ref.rollout.multi_turn.max_parallel_calls = draw.randint(1, parallel)
    script = Script(tokenizer, draw)
    turns = Turns(seed=seed, limit=limit)
    question = " ".join(draw.choices(WORDS, k=5))

    async def run():
        ROLLOUT.set(turns)
        loop = OPDToolAgentLoop(
            DictConfigWrap(config),
            TurnClient(SimpleNamespace(generate=script.generate)),
            tokenizer,
            None,
            RLHFDataset,
            DictConfigWrap(config.data),
            hf_model_type=model_type,
            tools=TOOLS,
        )
        chat = [{"role": "user", "content": question}]
        if draw.random() < 0.5:
            chat.insert(0, {"role": "system", "content": "You sell."})
        return await loop.run({"seed": seed, "max_tokens": limit}, raw_prompt=chat)

    output = asyncio.run(run())
    finish(output, turns, [tokenizer.eos_token_id])
    return Played(script, output, turns)


def check(played: Played, stop: int, limit: int = LIMIT) -> None:
    """What must be true of every rollout of turns, whatever the template."""
    script, output, turns = played.script, played.output, played.turns
    prompts = [prompt for prompt, _ in script.requests]
    ids, mask = output.response_ids, output.response_mask
    whole = output.prompt_ids + ids
    assert output.prompt_ids == prompts[0] and len(ids) == len(mask) <= limit
    # Only what the model wrote trains, all of it, as it was sampled, each token with its own log-prob.
    trained = [token for token, used in zip(ids, mask, strict=True) if used]
    assert trained == [token for reply, _ in script.replies for token in reply]
    sampled = [value for _, values in script.replies for value in values]
    assert [v for v, used in zip(output.response_logprobs, mask, strict=True) if used] == sampled
    assert not any(v for v, used in zip(output.response_logprobs, mask, strict=True) if not used)
    # Every turn was sampled behind exactly what is in front of it in training.
    for prompt, (reply, _) in zip(prompts, script.replies, strict=True):
        assert whole[: len(prompt)] == prompt and whole[len(prompt) : len(prompt) + len(reply)] == reply
        assert mask[len(prompt) - len(prompts[0]) :][: len(reply)] == [1] * len(reply)
    assert not ids or mask[-1] == 1
    # Requests differ in their random numbers, and together stay within the limit.
    assert len({params["seed"] for _, params in script.requests}) == len(script.requests)
    for prompt, params in script.requests:
        assert params["max_tokens"] == limit - (len(prompt) - len(prompts[0]))
    record = turns.record(mask)
    assert record["written"] == len(trained) and record["turns"] == len(script.replies)
    assert record["environment_tokens"] == len(mask) - len(trained)
    assert (record["ended"] == "answer") <= (script.replies[-1][0][-1:] == [stop])
