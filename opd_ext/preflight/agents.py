# SPDX-License-Identifier: Apache-2.0
"""Agent loops that a run or a row of its data names: verl looks them up minutes later, when a rollout begins."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd_ext.bridge.sources import agent_loops
from opd_ext.config.schema import OPDConfig
from opd_ext.config.sequence_parallel import sequence_parallel
from opd_ext.context.turns import opened
from opd_ext.errors import ConfigError
from opd_ext.preflight.findings import Findings, refuse
from opd_ext.preflight.tables import Samples

COLUMN = "agent_name"
"""Of a row that is not to be rolled out by the run's default loop."""
_AGENT = "actor_rollout_ref.rollout.agent"
_TURNS = "actor_rollout_ref.rollout.multi_turn"
SINGLE, TOOLS = "single_turn_agent", "tool_agent"
"""verl's names of a loop that asks once, and of one that lets the model call tools."""


def check_agents(config: DictConfig, opd: OPDConfig, files: Iterable[Samples]) -> None:
    """The default loop and every row's own are loops of verl's, or of the user's file.

    A module in ``opd.external_lib`` may register some, which cannot be known before verl is imported: beside one, only
    the file itself is looked at.

    Raises:
        ConfigError: one sentence.
    """
    agent = config.actor_rollout_ref.rollout.agent
    known = [*agent_loops(), *_of_file(agent.agent_loop_config_path)]
    if opd.external_lib:
        return
    choices = f"choose one of: {', '.join(sorted(known))}, or name a file with yours in {_AGENT}.agent_loop_config_path"
    if agent.default_agent_loop not in known:
        raise ConfigError(f"{_AGENT}.default_agent_loop={agent.default_agent_loop} does not exist; {choices}.")
    for samples in files:
        for i, row in enumerate(samples.sample if COLUMN in samples.columns else ()):
            if (name := row.get(COLUMN)) not in known:
                raise ConfigError(f"{samples.name}: row {i} has {COLUMN}={name}, which does not exist; {choices}.")


def loops(config: DictConfig, files: Iterable[Samples]) -> set[str]:
    """The loops that a run uses, as far as its files are here."""
    files = list(files)
    named = {row.get(COLUMN) for samples in files if COLUMN in samples.columns for row in samples.sample}
    rest = not files or any(COLUMN not in samples.columns for samples in files)
    return named | ({config.actor_rollout_ref.rollout.agent.default_agent_loop} if rest else set())


def check_turns(config: DictConfig, opd: OPDConfig, files: Iterable[Samples], starting: bool) -> None:
    """What several turns need: tools, and places that know of turns.

    Args:
        starting: of a run that starts now; a plan may be for files that are elsewhere.

    Raises:
        ConfigError: one sentence.
    """
    used, told = loops(config, files) - {SINGLE}, opd.told_in_turns
    if told and not used:
        raise ConfigError(
            f"opd.context of kind={told} speaks in later turns, and {_AGENT}.default_agent_loop={SINGLE} has one: "
            f"choose {TOOLS}, or say it in the prompt alone."
        )
    if not used:
        return
    if told and sequence_parallel(config.actor_rollout_ref.actor) > 1:
        raise ConfigError(
            f"opd.context of kind={told} speaks in later turns, and ranks that share sequences do not count what only "
            "the teacher reads: set actor_rollout_ref.actor.ulysses_sequence_parallel_size=1."
        )
    loop = sorted(map(str, used))[0]
    if opd.credit.annotates:
        raise ConfigError(
            f"opd.credit.annotator reads one answer, and the agent loop {loop} has turns: choose {SINGLE}, or a credit "
            "without an annotator."
        )
    if any(view.opd.teacher.foreign for view in opd.views):
        raise ConfigError(
            f"opd.teacher.tokenizer=own reads one answer, and the agent loop {loop} has turns, written in the "
            f"student's control tokens: choose {SINGLE}, or a teacher of the student's tokenizer."
        )
    if TOOLS not in used:
        return
    turns = config.actor_rollout_ref.rollout.multi_turn
    if not (turns.tool_config_path or turns.function_tool_path):
        raise ConfigError(
            f"{_AGENT}.default_agent_loop={TOOLS} has no tools to call: name a file with some in "
            f"{_TURNS}.function_tool_path or .tool_config_path."
        )
    for key in ("tool_config_path", "function_tool_path"):
        if starting and turns[key] and not Path(turns[key]).is_file():
            raise ConfigError(f"{_TURNS}.{key}={turns[key]} is not there: name a file with tools.")


def check_next_turn(
    config: DictConfig, opd: OPDConfig, files: Iterable[Samples], tokenizer: Any, findings: Findings
) -> None:
    """The model's template goes on behind what a tool answers; the plan says what an agent may do.

    Args:
        tokenizer: the student's; None where it is not at hand.

    Raises:
        ConfigError: one sentence.
    """
    if TOOLS not in loops(config, files):
        return
    turns = config.actor_rollout_ref.rollout.multi_turn
    paths = [turns[key] for key in ("tool_config_path", "function_tool_path") if turns[key]]
    most = f"up to {turns.max_assistant_turns} turns" if turns.max_assistant_turns else "turns without a limit"
    findings.fact("agent", f"{most}, {opd.rollout.train_tokens:,} tokens in all; tools of {', '.join(paths)}")
    if tokenizer is None or not all(Path(path).is_file() for path in paths):  # a plan may be for files elsewhere
        return
    from opd_ext.bridge.inputs import next_turn  # verl, which takes seconds

    model = Path(config.actor_rollout_ref.model.path)
    file = model / "config.json"
    kind = json.loads(file.read_text()).get("model_type") if file.is_file() else None
    try:
        said = next_turn(config, tokenizer, kind)
    except Exception as error:
        raise refuse(
            f"{model} cannot go on behind a tool's answer: choose another chat template, or another "
            f"{_TURNS}.format={turns.format}",
            error,
        ) from None
    kwargs = dict(config.data.apply_chat_template_kwargs or {})
    if opd.told_in_turns and not said.endswith(tokenizer.decode(opened(tokenizer, kwargs))):
        raise ConfigError(
            f"{model}: the chat template opens the turn behind a tool's answer in another way than the first, so that "
            f"opd.context of kind={opd.told_in_turns} has no place to speak there: say it in the prompt alone."
        )
    if "17" not in said:
        raise ConfigError(f"{model}: the chat template leaves out what a tool answers: choose another one.")


def _of_file(path: str | None) -> list[str]:
    """Names of the loops in a file of verl's form: a list of ``{name, _target_, ...}``."""
    if not path:
        return []
    key = f"{_AGENT}.agent_loop_config_path={path}"
    if not Path(path).is_file():
        raise ConfigError(f"{key} is not there: name a YAML file that lists {{name: ..., _target_: ...}}.")
    try:
        entries = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise refuse(f"{key} cannot be read", error) from None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and entry.get("_target_") for entry in entries
    ):
        raise ConfigError(f"{key} must be a list of {{name: ..., _target_: module.Class}}.")
    return [entry["name"] for entry in entries]
