# SPDX-License-Identifier: Apache-2.0
"""Module names of release 0.1 that still work, and what they are now. All of them go with release 0.3.

A finder behind Python's own builds such a module on demand, from the modules that hold its names today, and warns. So
the tree has no rooms that nobody lives in, and nothing of ours can import an old name without a test seeing it.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "opd_ext.data.tinymath": ("opd_ext.tinymath",),
    "opd_ext.discover": ("opd_ext.pipelines.discover",),
    "opd_ext.objective.credit": ("opd_ext.credit.credits", "opd_ext.ratios"),
    "opd_ext.objective.divergence": ("opd_ext.divergence.divergences", "opd_ext.divergence.sampled"),
    "opd_ext.objective.loss": (
        "opd_ext.objective.objective",
        "opd_ext.objective.batch",
        "opd_ext.objective.metrics",
        "opd_ext.divergence.config",
        "opd_ext.divergence.sampled",
    ),
    "opd_ext.objective.policy": ("opd_ext.policy.advantages", "opd_ext.divergence.sampled"),
    "opd_ext.objective.schedule": ("opd_ext.credit.schedule", "opd_ext.teacher.kinds"),
    "opd_ext.offline": ("opd_ext.pipelines",),
    "opd_ext.offline.ssd": ("opd_ext.pipelines.ssd.target",),
    "opd_ext.offline.t3s": ("opd_ext.pipelines.t3s.selection",),
    "opd_ext.report.plan": ("opd_ext.plan.page",),
    "opd_ext.rewards.tinymath": ("opd_ext.tinymath.grader",),
    "opd_ext.teacher.annotate": ("opd_ext.credit.annotate",),
    "opd_ext.teacher.base": ("opd_ext.context.base",),
    "opd_ext.teacher.context": (
        "opd_ext.context.contexts",
        "opd_ext.context.base",
        "opd_ext.context.config",
        "opd_ext.context.sequence",
        "opd_ext.context.feedback",
    ),
    "opd_ext.teacher.feedback": ("opd_ext.context.feedback",),
    "opd_ext.teacher.prompts": ("opd_ext.context.prompts", "opd_ext.spans"),
}
"""Old name -> new modules; a name that two of them have is the first one's. What lay below a package moved with it."""

FUNCTIONS = {"opd_ext.bridge.rollouts": {"write_jsonl": "opd_ext.files", "drop_lines_after": "opd_ext.files"}}
"""A module that stayed -> names of its own that left, and where each is now."""


def old_functions(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module in :data:`FUNCTIONS`."""

    def find(name: str) -> Any:
        new = FUNCTIONS[module].get(name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", new)
        return getattr(importlib.import_module(new), name)

    return find


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} has moved to {new}; the old name goes with opd-ext 0.3.", DeprecationWarning, 3)


def _new_names(name: str) -> tuple[str, ...] | None:
    if name in MOVED:
        return MOVED[name]
    package, _, module = name.rpartition(".")
    below = f"{MOVED[package][0]}.{module}" if package in MOVED else None
    return (below,) if below and importlib.util.find_spec(below) else None


class _Face(ModuleType):
    """A module of an old name. Python would put a submodule in place of a function of its name (``parse``)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in vars(self)):
            super().__setattr__(name, value)


class _Old(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and fills modules of old names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not (new := _new_names(name)):
            return None
        is_package = any(other.startswith(f"{name}.") for other in MOVED) or _has_modules(new[0])
        return importlib.machinery.ModuleSpec(name, self, origin=f"moved to {new[0]}", is_package=is_package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Face(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        new = _new_names(module.__name__) or ()
        _warn(module.__name__, new[0])
        for name in reversed(new):
            public = vars(importlib.import_module(name)).items()
            module.__dict__.update({key: value for key, value in public if not key.startswith("_")})
        module.__doc__ = f"Moved to {new[0]}; this name goes with release 0.3."


def _has_modules(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.submodule_search_locations is not None


def answer_old_names() -> None:
    """Let ``import`` find the old names; idempotent."""
    if not any(isinstance(finder, _Old) for finder in sys.meta_path):
        sys.meta_path.append(_Old())
