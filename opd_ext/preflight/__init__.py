# SPDX-License-Identifier: Apache-2.0
"""Before anything is started: the machine, the models, the data and the grader, looked at where they are here.

What cannot work is a ConfigError of one sentence; what is hardly meant is a note; the plan shows the rest as facts.
"""

from omegaconf import DictConfig

from opd_ext.config.checks import check_inputs
from opd_ext.config.schema import OPDConfig
from opd_ext.preflight.data import check_data, open_data
from opd_ext.preflight.findings import Findings
from opd_ext.preflight.machine import check_loggers, check_machine, on_cluster
from opd_ext.preflight.models import check_models
from opd_ext.preflight.resume import check_resume
from opd_ext.preflight.reward import check_reward
from opd_ext.preflight.tables import Samples

__all__ = ["Findings", "look", "preflight"]


def look(config: DictConfig, opd: OPDConfig, starting: bool) -> dict[str, list[Samples]]:
    """Look at the machine and at the rows of the data: what needs neither verl nor a model, which take seconds to load.

    Args:
        config, opd: checked already, verl's part not yet.
        starting: of a run that starts now; a plan may be for another machine and for files that are there.

    Returns:
        The data files that are on this machine, for :func:`preflight`.

    Raises:
        ConfigError: one sentence: what is wrong, what to change.
    """
    check_machine(config, opd, starting)
    if starting:
        check_inputs(config)
    return open_data(config, opd)


def preflight(config: DictConfig, opd: OPDConfig, data: dict[str, list[Samples]], starting: bool) -> Findings:
    """Look at everything else that a run will read: checkpoint, models, prompts, grader.

    Args:
        config, opd: checked already.
        data: of :func:`look`.
        starting: as there.

    Raises:
        ConfigError: one sentence: what is wrong, what to change.
    """
    findings = Findings()
    check_loggers(config)
    check_resume(config, opd, starting, findings)
    tokenizer = check_models(config, opd, starting, findings)
    check_data(data, config, opd, tokenizer, findings)
    graded = [samples for files in data.values() for samples in files if samples.answered]
    check_reward(config, graded, findings, here=starting and not on_cluster())
    return findings
