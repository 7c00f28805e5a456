# SPDX-License-Identifier: Apache-2.0
"""A pipeline as a list of stages over one folder: each runs once, what it made is recorded, nothing is made twice.

``manifest.json`` says of every stage with which settings it ran, from which inputs and what came out, as digests. A
stage is skipped when all of that still holds. When it does not, the pipeline stops and says what differs, instead of
overwriting results or mixing them with new ones.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from opd_ext.files import write_whole
from opd_ext.moved import MOVED
from opd_ext.plan.work import Work
from opd_ext.terminal import terminal
from opd_ext.tokens.tables import file_digest

MANIFEST = "manifest.json"
# Graders in the settings of stages that an older release has finished.
RENAMED = {f"pkg://{old}": f"pkg://{new[0]}" for old, new in MOVED.items()}


class StageError(RuntimeError):
    """One sentence: why the pipeline cannot go on in this folder."""


@dataclass
class Stage:
    """Files from files.

    ``settings`` holds everything but the inputs that decides the outputs. ``after`` names the stages whose outputs it
    reads. ``outputs`` are relative to the run's folder; a folder counts with all it holds. ``owns`` (patterns) is what
    else must go when the stage is made anew: state that an interrupted run goes on from. ``work`` is what a plan
    reckons with. ``run`` may return numbers worth remembering.
    """

    name: str
    run: Callable[[], dict[str, Any] | None]
    settings: dict[str, Any]
    outputs: list[str]
    after: list[str] = field(default_factory=list)
    owns: list[str] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)


class Manifest:
    """What is on record of the stages of a folder."""

    def __init__(self, folder: Path):
        self._path = folder / MANIFEST

    def record(self, stage: str) -> dict[str, Any]:
        """The entry of a stage, empty where it never ran."""
        return self._read().get(stage, {})

    def outputs_digest(self, stage: str) -> str:
        """Of a stage's outputs, as they are on record now."""
        content = json.dumps(self.record(stage).get("outputs"), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def write(self, stage: str, entry: dict[str, Any]) -> None:
        self._replace(self._read() | {stage: entry})

    def forget(self, stage: str) -> None:
        manifest = self._read()
        manifest.pop(stage, None)
        self._replace(manifest)

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        text = self._path.read_text()
        for old, new in RENAMED.items():
            text = text.replace(f'"{old}"', f'"{new}"')
        return json.loads(text)

    def _replace(self, manifest: dict[str, Any]) -> None:
        write_whole(self._path, json.dumps(manifest, indent=2) + "\n")


class Pipeline:
    """Stages in order, and what became of them."""

    def __init__(self, folder: Path, stages: Sequence[Stage], refusals: tuple[type[Exception], ...] = ()):
        """``refusals`` are errors by which a stage says that it did not begin: it then counts as never run."""
        self._folder, self._stages = folder, {stage.name: stage for stage in stages}
        self._manifest = Manifest(folder)
        self._console, self._refusals = terminal(), refusals

    @property
    def names(self) -> list[str]:
        return list(self._stages)

    def record(self, name: str) -> dict[str, Any]:
        """The manifest's entry of a stage, empty where it never ran."""
        return self._manifest.record(name)

    def run(self, until: str | None = None, only: str | None = None, force: str | None = None) -> None:
        """Run what is not done.

        Args:
            until: last stage to run.
            only: the one stage to run; those before it must be done.
            force: throw away what this stage made, and do it again.

        Raises:
            StageError: an unknown stage, a stage that was run with other settings, another process at work here.
        """
        for name in filter(None, (until, only, force)):
            if name not in self._stages:
                raise StageError(f"There is no stage '{name}'; the stages are {', '.join(self.names)}.")
        last = only or until
        if force and last and not (force == only or (not only and self.names.index(force) <= self.names.index(last))):
            raise StageError(f"--force {force} would not make '{force}' again with what else was asked for.")
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            if force:
                self._discard(force)
            for name, stage in self._stages.items():
                if only in (None, name):
                    self._step(stage)
                elif not self._is_done(stage):
                    raise StageError(f"Stage '{only}' comes after '{name}', which is not done; run that first.")
                if name in (until, only):
                    return

    @property
    def work(self) -> dict[str, list[Work]]:
        """What the stages do, as a plan sees it."""
        return {name: stage.work for name, stage in self._stages.items()}

    def overview(self) -> list[tuple[str, str, list[str]]]:
        """(name, `done` | `begun` | `to do`, stages before it) of every stage."""
        states = []
        for name, stage in self._stages.items():
            state = "done" if self._is_done(stage) else "begun" if self.record(name) else "to do"
            states.append((name, state, stage.after))
        return states

    def _step(self, stage: Stage) -> None:
        if self._is_done(stage):
            self._say(stage, f"done before, in {self.record(stage.name)['seconds']:.0f} s")
            return
        self._check_settings(stage)
        before = self.record(stage.name)
        entry = {"settings": stage.settings, "inputs": self._inputs(stage)}
        self._manifest.write(stage.name, entry)
        self._say(stage, "running")
        began = time.monotonic()
        try:
            notes = stage.run()
        except self._refusals:
            if not before:
                self._manifest.forget(stage.name)
            raise
        if missing := [name for name in stage.outputs if not (self._folder / name).exists()]:
            raise StageError(
                f"Stage '{stage.name}' ended without making {missing[0]}; --force {stage.name} begins it anew."
            )
        entry |= {
            "outputs": {name: file_digest(self._folder / name) for name in stage.outputs},
            "seconds": round(time.monotonic() - began, 2),  # of the run that finished it
            "notes": notes or {},
        }
        self._manifest.write(stage.name, entry)

    def _is_done(self, stage: Stage) -> bool:
        """Whether the stage ran to its end, with these settings on these inputs, and left what is still there."""
        entry = self.record(stage.name)
        if "outputs" not in entry or entry["settings"] != stage.settings or entry["inputs"] != self._inputs(stage):
            return False
        for name, digest in entry["outputs"].items():
            if not (self._folder / name).exists():
                return False
            if (self._folder / name).is_file() and file_digest(self._folder / name) != digest:
                raise StageError(
                    f"{self._folder / name} is not what stage '{stage.name}' wrote; put it back, or make it again with "
                    f"--force {stage.name}."
                )
        return set(entry["outputs"]) == set(stage.outputs)

    def _inputs(self, stage: Stage) -> dict[str, Any]:
        return {name: self.record(name).get("outputs") for name in stage.after}

    def _check_settings(self, stage: Stage) -> None:
        """A stage that was run, or begun, under other conditions is not gone on with."""
        entry = self.record(stage.name)
        if not entry:
            return
        if (changed := _first_difference(entry["settings"], stage.settings)) is not None:
            key, before, now = changed
            raise StageError(
                f"Stage '{stage.name}' of {self._folder} was run with {key}={before}, not {now}: make it again with "
                f"--force {stage.name}, or choose another run_dir."
            )
        if "outputs" in entry or entry["inputs"] != self._inputs(stage):
            # An output was lost, or its inputs were made again on request and came out different: what is left of it,
            # half a fine-tuning on other data say, must not be gone on from.
            self._discard(stage.name)

    def _discard(self, name: str) -> None:
        stage = self._stages[name]
        for pattern in (*stage.outputs, *stage.owns):
            for path in list(self._folder.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._manifest.forget(name)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with (self._folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StageError(
                    f"Another process works in {self._folder}; wait for it or choose another run_dir."
                ) from None
            yield

    def _say(self, stage: Stage, text: str) -> None:
        self._console.print(Text.assemble((stage.name, "bold"), f": {text}"))


def _first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            path = f"{key}.{name}" if key else name
            if (found := _first_difference(before.get(name), now.get(name), path)) is not None:
                return found
        return None
    return None if before == now else (key, before, now)
