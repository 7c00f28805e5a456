# SPDX-License-Identifier: Apache-2.0
"""What verl will load from a user's files, loaded once before anything is started: grader, tools, loggers."""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig
from verl.tools.tool_registry import load_all_tools
from verl.trainer.ppo.reward import get_custom_reward_fn, resolve_reward_manager_cls
from verl.utils.tracking import Tracking

from opd_ext.bridge.graders import default_compute_score


def reward_function(config: DictConfig) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function that will grade, the user's or verl's by data source, and keyword arguments that it always gets.

    Raises:
        Exception: whatever its module raises when it is imported; verl's own for a manager that does not exist.
    """
    resolve_reward_manager_cls(config)
    bound = get_custom_reward_fn(config)
    return (default_compute_score, {}) if bound is None else (bound.args[0], bound.args[1])


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


def loggers() -> list[str]:
    """Names that ``trainer.logger`` may list."""
    return list(Tracking.supported_backend)
