# SPDX-License-Identifier: Apache-2.0
"""One row of the table that ``opd doctor`` prints, and what each stack needs of a machine."""

from dataclasses import dataclass

from opd_ext.versions import Stack

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One row of the table; ``problem`` is a sentence that says what to change, or None where all is well."""

    subject: str
    found: str
    wanted: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class Needs:
    """What a machine must have at least: GiB of memory, disk and shared memory, and open files of one process."""

    memory: float
    disk: float
    shm: float
    files: int


def needs(stack: Stack, gpus: int) -> Needs:
    """Needs of the miniature world on the CPU stack, and of a model of about a billion parameters per GPU on the other.

    Args:
        gpus: how many a run can use; none counts as one, since the stack is there for some.
    """
    if stack == "cpu":
        # Memory: Ray, one trainer rank and one vLLM replica with 1 GiB of cache, and some room. Shared memory: Ray's
        # object store and the weights on their way to vLLM; containers start with 0.06. Files: what Ray asks for.
        return Needs(memory=6, disk=5, shm=2, files=8192)
    gpus = max(gpus, 1)
    # Disk: Qwen3-8B on eight GPUs keeps three checkpoints of 107 GiB (weights, two moments, teacher) and writes one.
    # Memory: a trainer and a vLLM process per GPU of some 6 GiB, and a share of Ray's object store.
    return Needs(memory=8 + 16 * gpus, disk=55 * gpus, shm=8 * gpus, files=65536)
