# SPDX-License-Identifier: Apache-2.0
"""What verl will load or ask of a user's files, asked once before anything is started: graders, tools, models."""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig
from verl.tools.tool_registry import load_all_tools
from verl.trainer.ppo.reward import resolve_reward_manager_cls
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
