# SPDX-License-Identifier: Apache-2.0
"""What this machine's processor computes in: bf16 where it multiplies in it, which is twice as fast, else fp32."""

from pathlib import Path

from omegaconf import OmegaConf

_MULTIPLY_IN_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, Arm


def multiplies_in_bf16(description: str | None = None) -> bool:
    """Whether the processor has instructions for products of bf16; elsewhere these are emulated, and slow.

    Args:
        description: as in ``/proc/cpuinfo``; None: of this machine. A system without such a file has none.
    """
    if description is None:
        try:
            description = Path("/proc/cpuinfo").read_text()
        except OSError:
            return False
    return not _MULTIPLY_IN_BF16.isdisjoint(description.split())


# Of scale=cpu: `${cpu_dtype:bf16,fp32}` is its first word on such a processor, its second elsewhere.
OmegaConf.register_new_resolver("cpu_dtype", lambda bf16, fp32: bf16 if multiplies_in_bf16() else fp32, replace=True)
