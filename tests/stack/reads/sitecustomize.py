# SPDX-License-Identifier: Apache-2.0
"""Writes down every key of the configuration that a run reads; Python imports this where its folder is on PYTHONPATH.

A read is an access to one key of the composed configuration, or of the dataclasses that verl makes of its sections, by
a line of verl or of the package. Not a read: composing, checking, printing or converting a section, which touch every
key. ``KEY.*`` stands for a plain dictionary that is handed on whole.
"""

import dataclasses
import importlib.util
import os
import sys

from hydra._internal.instantiate import _instantiate2
from omegaconf import DictConfig, OmegaConf

FILE = os.environ.get("OPD_READ_KEYS")
# Whose accesses count, and which of them only check or convert.
READERS = ("/verl/", "/opd_ext/")
NOT_READERS = (
    "/verl/utils/config.py",
    "/verl/base_config.py",
    "/opd_ext/config/",
    "/opd_ext/preflight/",
    "/opd_ext/bridge/known_keys.py",
    "/opd_ext/train.py",
)
CONFIG_CLASSES = "/verl/workers/config/"  # their own checks; the model's class alone does its work there
_PATH = "_path_in_the_configuration"

_told: set[str] = set()
_built: list[str] = []  # sections whose dataclass is being made


def _tell(key: str, value: object) -> None:
    if isinstance(value, dict) and value:
        key += ".*"
    if key not in _told:
        _told.add(key)
        descriptor = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{key}\n".encode())  # short appends stay whole
        os.close(descriptor)


def _reads(depth: int) -> bool:
    frame = sys._getframe(depth + 1)
    while frame and frame.f_code.co_filename.endswith(("/verl/base_config.py", "/_collections_abc.py", __file__)):
        frame = frame.f_back
    file = frame.f_code.co_filename if frame else ""
    checks = CONFIG_CLASSES in file and not file.endswith("/model.py") and frame.f_code.co_name == "__post_init__"
    return any(part in file for part in READERS) and not any(part in file for part in NOT_READERS) and not checks


def _trace_access(name: str) -> None:
    original = getattr(DictConfig, name)

    def traced(self, key, *args):
        value = original(self, key, *args)
        if isinstance(key, str) and not key.startswith("_") and not isinstance(value, DictConfig) and _reads(1):
            _tell(self._get_full_key(key), value)
        return value

    setattr(DictConfig, name, traced)


def _trace_whole_sections() -> None:
    original = OmegaConf.to_container

    def traced(*args, **kwargs):
        config = args[0] if args else kwargs["cfg"]
        full = config._get_full_key(None) if OmegaConf.is_config(config) else ""
        if full.count(".") and _reads(1):  # a section of a section: the others are printed or logged as they are
            _tell(full, {"handed": "on"})
        return original(*args, **kwargs)

    OmegaConf.to_container = staticmethod(traced)


def _trace_dataclass(base: type) -> None:
    """verl's base class of all its configurations."""
    original = base.__getattribute__

    def traced(self, name):
        value = original(self, name)
        if not name.startswith("_") and name in type(self).__dataclass_fields__ and _reads(1):
            path = self.__dict__.get(_PATH) or (_built[-1] if _built else None)
            if path is not None and not dataclasses.is_dataclass(value):
                _tell(f"{path}.{name}", value)
        return value

    base.__getattribute__ = traced


class _Finder:
    """Traces that class as soon as its module is there: a process may get an object of it before it makes one."""

    @classmethod
    def find_spec(cls, name, path, target=None):
        if name != "verl.base_config":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def traced(module):
            execute(module)
            _trace_dataclass(module.BaseConfig)

        spec.loader.exec_module = traced
        return spec


def _trace_construction() -> None:
    original, replace = _instantiate2._call_target, dataclasses.replace

    def traced(_target_, _partial_, args, kwargs, full_key):
        if not any(cls.__name__ == "BaseConfig" for cls in getattr(_target_, "__mro__", ())):
            return original(_target_, _partial_, args, kwargs, full_key)
        _built.append(full_key)
        try:
            built = original(_target_, _partial_, args, kwargs, full_key)
        finally:
            _built.pop()
        built.__dict__[_PATH] = full_key
        return built

    def replaced(built, /, **changes):
        new = replace(built, **changes)
        if path := getattr(built, "__dict__", {}).get(_PATH):
            new.__dict__[_PATH] = path
        return new

    _instantiate2._call_target = traced
    dataclasses.replace = replaced


if FILE:
    for access in ("__getattr__", "__getitem__", "get", "pop"):
        _trace_access(access)
    _trace_whole_sections()
    _trace_construction()
    sys.meta_path.insert(0, _Finder)
