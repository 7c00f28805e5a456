# SPDX-License-Identifier: Apache-2.0
"""Before anything is started: the machine, the models, the data and the grader, looked at where they are here.

What cannot work is a ConfigError of one sentence; what is hardly meant is a note; the plan shows the rest as facts.
"""

from omegaconf import DictConfig

from opd_ext.bridge.known_keys import check_added_keys
from opd_ext.config.checks import check_inputs
from opd_ext.config.schema import OPDConfig
from opd_ext.preflight.agents import check_agents, check_next_turn, check_turns
from opd_ext.preflight.data import check_data, open_data
from opd_ext.preflight.findings import Findings
from opd_ext.preflight.machine import check_loggers, check_machine, on_cluster
from opd_ext.preflight.models import check_models
from opd_ext.preflight.resume import check_resume
from opd_ext.preflight.reward import check_reward, check_verls
from opd_ext.preflight.size import check_size
from opd_ext.preflight.tables import Samples

__all__ = ["Findings", "look", "preflight"]


def look(config: DictConfig, opd: OPDConfig, starting: bool, findings: Findings) -> dict[str, list[Samples]]:
    """Look at keys, machine, rows of the data and the grader: what needs neither verl nor a model, which take seconds.

    Args:
        config, opd: checked already, verl's part not yet.
        starting: of a run that starts now; a plan may be for another machine and for files that are there.
        findings: gets what was seen.

    Returns:
        The data files that are on this machine, for :func:`preflight`.

    Raises:
        ConfigError: one sentence: what is wrong, what to change.
    """
    check_added_keys(config)
    check_loggers(config)
    check_machine(config, opd, starting)
    if starting:
        check_inputs(config)
    data = open_data(config, opd)
    check_agents(config, opd, _all(data))
    check_turns(config, opd, _all(data), starting)
    check_reward(config, _graded(data), findings, here=starting and not on_cluster())
    return data


def preflight(
    config: DictConfig, opd: OPDConfig, data: dict[str, list[Samples]], starting: bool, findings: Findings
) -> None:
    """Look at everything else that a run will read: checkpoint, models, prompts, what grades within verl.

    Args:
        config, opd: checked already.
        data: of :func:`look`.
        starting, findings: as there.

    Raises:
        ConfigError: one sentence: what is wrong, what to change.
    """
    check_resume(config, opd, starting, findings)
    tokenizer = check_models(config, opd, starting, findings)
    check_next_turn(config, opd, _all(data), tokenizer, findings)
    check_size(config, opd, starting, findings)
    check_data(data, config, opd, tokenizer, findings)
    check_verls(config, _graded(data), findings, here=starting and not on_cluster())


def _all(data: dict[str, list[Samples]]) -> list[Samples]:
    return [samples for files in data.values() for samples in files]


def _graded(data: dict[str, list[Samples]]) -> list[Samples]:
    """The files whose rows have reference answers."""
    return [samples for samples in _all(data) if samples.answered]
