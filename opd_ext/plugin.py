# SPDX-License-Identifier: Apache-2.0
"""What verl loads in every process through the entry point group ``verl.plugins``.

verl only imports an entry point, it never calls it, so registration happens at import. verl also reports a plugin
that fails to load at DEBUG level only; ``opd doctor`` and ``opd train`` therefore call :func:`register` themselves
and let its error through.
"""

import os


def register() -> None:
    """Register the CPU platform when this process was asked to run on it; do nothing otherwise.

    Idempotent and light: no trainer, no vLLM and no transformers import happens here, because this runs at the first
    ``import verl`` of every process of a run. ``VERL_PLATFORM=cpu`` is set by the scale config (``opd.device: cpu``).
    """
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        from opd_ext.bridge import cpu_platform

        cpu_platform.register()


register()
