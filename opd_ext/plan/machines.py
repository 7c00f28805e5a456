# SPDX-License-Identifier: Apache-2.0
"""What machines can do, by their vendors' data sheets."""

import os
from dataclasses import dataclass

from opd_ext.config.processor import multiplies_in_bf16
from opd_ext.errors import one_of

GiB = 2**30
TERA = 1e12
GIGA = 1e9


@dataclass(frozen=True)
class Machine:
    """One accelerator in its node; rates are peaks, per accelerator.

    Attributes:
        memory: bytes that a process sees.
        bandwidth: of the memory, bytes/s.
        half, single: dense FLOP/s of matrix products in bf16 and in fp32.
        link: bytes/s to the other accelerators of the node, one way.
        network: bytes/s to other nodes.
    """

    name: str
    memory: float
    bandwidth: float
    half: float
    single: float
    link: float
    network: float

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


_CORE = 0.11 * TERA  # FLOP/s of a core with AVX2 or better; PyTorch reaches 0.05 in the products of a small model
_BF16 = 2.4  # times as fast are products of bf16 where the processor has them, measured with SmolLM2-135M


def cpu(cores: int | None = None, bf16: bool | None = None) -> Machine:
    """A machine without an accelerator: peaks of EPYC cores, of which an update reaches the same share as on a GPU.

    Args:
        cores, bf16: how many, and whether they multiply in bf16; None: as on this machine.
    """
    single = (cores or os.cpu_count() or 1) * _CORE
    half = single * (_BF16 if (multiplies_in_bf16() if bf16 is None else bf16) else 1.0)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine("cpu", memory, 20 * GIGA, half, single, 5 * GIGA, 1 * GIGA)


# Memory is what torch reports as total, a little less than the name says. FLOP/s are dense, without sparsity. A node
# with 8 network cards of 400 Gb/s gives a GPU 50 GB/s; of 200 Gb/s, 25; without such cards 100 Gb/s are shared by all.
_GPUS = {
    # NVIDIA H200 data sheet, SXM: 141 GB at 4.8 TB/s, 989 TFLOP/s bf16, 67 fp32, NVLink 900 GB/s both ways.
    "h200": Machine("h200", 140.4 * GiB, 4.8 * TERA, 989 * TERA, 67 * TERA, 450 * GIGA, 50 * GIGA),
    # NVIDIA H100 data sheet, SXM: 80 GB at 3.35 TB/s, otherwise as H200.
    "h100": Machine("h100", 79.2 * GiB, 3.35 * TERA, 989 * TERA, 67 * TERA, 450 * GIGA, 50 * GIGA),
    # NVIDIA A100 data sheet, SXM: 80 GB at 2.04 TB/s or 40 GB at 1.56, 312 TFLOP/s bf16, 19.5 fp32, NVLink 600 GB/s.
    "a100": Machine("a100", 79.3 * GiB, 2.04 * TERA, 312 * TERA, 19.5 * TERA, 300 * GIGA, 25 * GIGA),
    "a100_40gb": Machine("a100_40gb", 39.6 * GiB, 1.56 * TERA, 312 * TERA, 19.5 * TERA, 300 * GIGA, 25 * GIGA),
    # NVIDIA L40S data sheet: 48 GB at 864 GB/s, 362 TFLOP/s bf16 (733 with sparsity), 91.6 fp32, PCIe 4 x16.
    "l40s": Machine("l40s", 44.4 * GiB, 0.864 * TERA, 362 * TERA, 91.6 * TERA, 25 * GIGA, 3 * GIGA),
    # NVIDIA Ada whitepaper, RTX 4090: 24 GB at 1,008 GB/s, 165 TFLOP/s bf16 with fp32 sums, 82.6 fp32, PCIe 4 x16.
    "rtx4090": Machine("rtx4090", 23.5 * GiB, 1.008 * TERA, 165 * TERA, 82.6 * TERA, 20 * GIGA, 1.5 * GIGA),
}


def machine(name: str | None, device: str) -> Machine:
    """The machine that ``opd.plan.gpu`` names; without a name that of ``opd.device``.

    Raises:
        ConfigError: there is no such machine in the table.
    """
    name = name or ("cpu" if device == "cpu" else "h200")
    one_of("opd.plan.gpu", name, (*_GPUS, "cpu"))
    return cpu() if name == "cpu" else _GPUS[name]
