# SPDX-License-Identifier: Apache-2.0
"""Before anything is started: the machine, the models, the data and the grader, looked at where they are here.

What cannot work is a ConfigError of one sentence; what is hardly meant is a note; the plan shows the rest as facts.
"""

from omegaconf import DictConfig

from opd_ext.config.checks import check_inputs
from opd_ext.config.schema import OPDConfig
from opd_ext.preflight.data import check_data
from opd_ext.preflight.findings import Findings
from opd_ext.preflight.machine import check_machine, on_cluster
from opd_ext.preflight.models import check_models
from opd_ext.preflight.resume import check_resume
from opd_ext.preflight.reward import check_reward

__all__ = ["Findings", "preflight"]


def preflight(config: DictConfig, opd: OPDConfig, starting: bool) -> Findings:
    """Look at everything that a run will read.

    Args:
        config, opd: checked already.
        starting: of a run that starts now; a plan may be for another machine and for files that are there.

    Raises:
        ConfigError: one sentence: what is wrong, what to change.
    """
    findings = Findings()
    check_machine(config, opd, starting)
    if starting:
        check_inputs(config)
    check_resume(config, opd, starting, findings)
    tokenizer = check_models(config, opd, starting, findings)
    found = check_data(config, opd, tokenizer, findings)
    graded = [samples for key in found for samples in found[key] if samples.answered]
    check_reward(config, graded, findings, here=starting and not on_cluster())
    return findings
