# SPDX-License-Identifier: Apache-2.0
"""Agent loops that a run or a row of its data names: verl looks them up minutes later, when a rollout begins."""

from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from opd_ext.bridge.sources import agent_loops
from opd_ext.config.schema import OPDConfig
from opd_ext.errors import ConfigError
from opd_ext.preflight.findings import refuse
from opd_ext.preflight.tables import Samples

COLUMN = "agent_name"
"""Of a row that is not to be rolled out by the run's default loop."""
_AGENT = "actor_rollout_ref.rollout.agent"


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
