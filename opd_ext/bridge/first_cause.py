# SPDX-License-Identifier: Apache-2.0
"""Why a run ended: the innermost exception, and what a process that died wrote last."""

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from opd_ext.bridge.failures import in_words

TAIL = 12
"""Lines of a dead process that are shown."""

_PID = re.compile(r"\bpid[:=]\s*(\d+)")
_DIED = "died unexpectedly"  # so Ray says it; the process alone knows why
_WHO = "class_name: "
_NOISE = re.compile(r"^\s*$|^:(actor_name|task_name|job_id):")


def first_cause(error: BaseException, roots: Iterable[Path]) -> str:
    """One sentence of what was raised first; if a process died, its last lines below.

    Args:
        error: of Ray, which holds exceptions of other processes, or any.
        roots: folders that Ray may have put its sessions into, as far as they are on this machine.
    """
    said = in_words(error)
    if _DIED not in str(error):
        return said
    roots = list(roots)
    for pid in reversed(_PID.findall(str(error))):  # the innermost comes last
        files = [file for root in roots for file in root.glob(f"session_*/logs/worker-*-{pid}.err")]
        for file in sorted(files, key=lambda found: found.stat().st_mtime, reverse=True)[:1]:
            lines = [line for line in file.read_text(errors="replace").split("\n") if not _NOISE.match(line)]
            if lines:
                shown = "\n".join(f"  {line}" for line in lines[-TAIL:])
                return (
                    f"{said.split('. ')[0]}{_who(said)}. The last lines of process {pid} ({file.resolve()}):\n{shown}"
                )
    return said


def _who(said: str) -> str:
    """Class and name of the actor that Ray speaks of, in brackets."""
    found = [match[1] for key in ("class_name", "name") if (match := re.search(rf"\b{key}: (\S+)", said))]
    return f" ({' '.join(name.rpartition('.')[2] for name in found)})" if _WHO in said else ""


def session_roots(temp_dir: str | None) -> list[Path]:
    """Where Ray's sessions may be: the run's own folder, the environment's, Ray's default."""
    named = [
        temp_dir,
        os.environ.get("RAY_TMPDIR") and f"{os.environ['RAY_TMPDIR']}/ray",
        f"{tempfile.gettempdir()}/ray",
    ]
    return [Path(root) for root in named if root]
