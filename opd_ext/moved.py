# SPDX-License-Identifier: Apache-2.0
"""Module names of release 0.1 that still work, and what they are now. All of them go with release 0.3.

A finder behind Python's own builds such a module on demand, from the modules that hold its names today, and warns. So
the tree has no rooms that nobody lives in, and nothing of ours can import an old name without a test seeing it.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

MOVED: dict[str, tuple[str, ...]] = {
    "opd_ext.data.tinymath": ("opd_ext.tinymath",),
    "opd_ext.discover": ("opd_ext.pipelines.discover",),
    "opd_ext.objective.credit": ("opd_ext.credit.credits", "opd_ext.ratios"),
    "opd_ext.objective.divergence": ("opd_ext.divergence.divergences", "opd_ext.divergence.sampled"),
    "opd_ext.objective.loss": (
        "opd_ext.objective.objective",
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
"""Old name -> new modules; a name that two of them have is the first one's."""


class _Old(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and fills modules of old names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in MOVED:
            return None
        is_package = any(other.startswith(f"{name}.") for other in MOVED)
        return importlib.machinery.ModuleSpec(name, self, origin=f"moved to {MOVED[name][0]}", is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} has moved to {new[0]}; the old name goes with opd-ext 0.3.", DeprecationWarning, 2
        )
        for name in reversed(new):
            public = vars(importlib.import_module(name)).items()
            module.__dict__.update({key: value for key, value in public if not key.startswith("_")})
        module.__doc__ = f"Moved to {new[0]}; this name goes with release 0.3."


def answer_old_names() -> None:
    """Let ``import`` find the old names; idempotent."""
    if not any(isinstance(finder, _Old) for finder in sys.meta_path):
        sys.meta_path.append(_Old())
