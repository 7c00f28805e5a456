# SPDX-License-Identifier: Apache-2.0
"""T3S for a masked-diffusion model: the autoregressive pilot selects, the diffusion model is trained.

select -> train-diffusion-plain, train-diffusion-t3s, train-diffusion-random -> evaluate-diffusion-MODEL
"""

from typing import TYPE_CHECKING

from opd_ext.offline.settings import T3SConfig
from opd_ext.offline.stages import Stage

if TYPE_CHECKING:
    from opd_ext.offline.t3s_pipeline import T3S


def stages(steps: "T3S", config: T3SConfig, traces: str) -> list[Stage]:
    return []
