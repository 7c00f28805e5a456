# SPDX-License-Identifier: Apache-2.0
"""What verl will load or ask of a user's files, asked once before anything is started: graders, tools, models."""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig
from verl.experimental.agent_loop.tool_parser import ToolParser
from verl.tools.tool_registry import load_all_tools
from verl.trainer.ppo.reward import resolve_reward_manager_cls
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
from verl.workers.rollout.utils import get_max_position_embeddings

from opd_ext.bridge.graders import default_compute_score


def default_grader(config: DictConfig) -> Callable[..., Any]:
    """What grades where the configuration names no function: verl's, by data source.

    Raises:
        Exception: verl's own, for a reward manager that does not exist.
    """
    resolve_reward_manager_cls(config)
    return default_compute_score


def longest_sequence(model: Any) -> int:
    """Tokens beyond which verl starts no server for a model, by its configuration of transformers.

    Raises:
        ValueError: it does not say.
    """
    return get_max_position_embeddings(model)


def tool_schemas(config: DictConfig) -> list[dict[str, Any]] | None:
    """The tools that a prompt is rendered with, or None.

    Raises:
        Exception: whatever the user's files raise; verl itself would go on without tools.
    """
    data = config.data
    if not (data.get("tool_config_path") or data.get("function_tool_path")):
        return None
    tools = load_all_tools(tool_config_path=data.tool_config_path, function_tool_path=data.function_tool_path)
    return [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in tools]


def next_turn(config: DictConfig, tokenizer: Any, model_type: str | None) -> str:
    """What answers of tools, ``17``, add to a rollout, as text.

    verl's agent loop goes on from the sampled ids, and lets the model's template write what comes behind them. There
    are as many answers as a turn may have calls.

    Raises:
        Exception: verl's own, for a format of calls that it does not read, and a template that cannot go on.
    """
    turns, tools = config.actor_rollout_ref.rollout.multi_turn, tool_schemas(config)
    ToolParser.get_tool_parser(turns.format, tokenizer)
    kwargs = dict(config.data.apply_chat_template_kwargs or {})
    builder = create_continuous_token_builder(tokenizer, hf_model_type=model_type, chat_template_kwargs=kwargs)
    asked = [{"role": "user", "content": "What does it cost?"}]
    calls = [{"type": "function", "function": {"name": "price", "arguments": {}}}] * turns.max_parallel_calls
    called = [*asked, {"role": "assistant", "content": "", "tool_calls": calls}]
    sampled = [*builder.build_initial_tokens(asked, tools=tools), tokenizer.eos_token_id]
    told = [*called, *([{"role": "tool", "content": "17"}] * turns.max_parallel_calls)]
    found = builder.merge_context_tokens(called, told, sampled, tools=tools)
    return tokenizer.decode(found.token_ids[len(sampled) - found.removed_prefix_token_count :])
