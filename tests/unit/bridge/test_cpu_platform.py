# SPDX-License-Identifier: Apache-2.0
"""What host memory answers in a device's place."""

import os
import subprocess
import sys

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

from opd_ext.bridge.cpu_platform import own_socket

FREED = """
import psutil, torch
from opd_ext.bridge.cpu_platform import PlatformCPU, _CPUDeviceModule

def resident():
    return psutil.Process().memory_info().rss

torch.ones(7 << 20)  # 28 MiB, freed at once: glibc keeps from now on what is smaller
lasting = []
for empty_cache in (PlatformCPU().empty_cache, _CPUDeviceModule("device").empty_cache):
    pieces = [torch.ones(1 << 18) for _ in range(200)]
    lasting += pieces[::2]
    del pieces
    before = resident()
    empty_cache()
    print((before - resident()) >> 20)
"""


def test_two_runs_on_one_machine_exchange_no_weights(monkeypatch):
    """Ray numbers the jobs of every local instance alike, and verl names the socket for weights after the job."""
    handle = "ipc:///tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock"
    names = []
    for run in ("a1", "b2"):
        monkeypatch.setenv("OPD_RUN", run)
        names.append(own_socket(handle))
        assert own_socket(handle) == names[-1]
    assert len({handle, *names}) == 3
    monkeypatch.delenv("OPD_RUN")
    assert own_socket(handle) == handle


def test_an_emptied_cache_is_the_systems_again():
    """A hundred freed pieces of 1 MiB between a hundred that live on; nothing was given back before."""
    freed = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True).stdout.split()
    assert len(freed) == 2 and all(90 <= int(size) <= 110 for size in freed), freed
