# SPDX-License-Identifier: Apache-2.0
"""The models that come with the package: weights, tokenizer and record of each, under digests.

``shipped/world.json`` is the record of the world that they were built in, with the SHA-256 of every file. They are what
``opd data tinymath --rebuild`` makes, kept so that nobody waits for it and everybody starts from the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path

import torch

from opd_ext.tinymath.levels import FIRST, LEVELS, Level

FOLDER = Path(__file__).parent / "shipped"


class DamagedError(RuntimeError):
    """A file of the package is not what its record says; the message names it."""


def record(level: Level = FIRST) -> dict:
    """Settings, models (each with ``digests``: file name to SHA-256) and versions of the shipped world.

    A level of which nothing ships has settings None and no models.
    """
    file = FOLDER / level.shipped / "world.json"
    return json.loads(file.read_text()) if file.is_file() else {"settings": None, "models": {}}


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unpack(name: str, folder: Path, level: Level = FIRST) -> dict:
    """Copy the model ``name`` into ``folder`` and check what has arrived there.

    Returns:
        Its record.

    Raises:
        DamagedError: a file is missing or has other content.
    """
    model = record(level)["models"][name]
    for file, expected in model["digests"].items():
        source = FOLDER / level.shipped / name / file
        if source.is_file():
            shutil.copyfile(source, folder / file)
        if not source.is_file() or digest(folder / file) != expected:
            raise DamagedError(f"{source} is damaged or missing: install opd-ext again.")
    return model


def is_shipped(folder: Path, name: str, level: Level = FIRST) -> bool:
    """Whether ``folder`` holds the shipped model, bit for bit."""
    model = record(level)["models"].get(name)
    if model is None:
        return False
    files = model["digests"].items()
    return all((folder / file).is_file() and digest(folder / file) == expected for file, expected in files)


def compare(folder: Path, name: str, built: dict, level: Level = FIRST) -> str:
    """One sentence: is a model that was built here the shipped one?

    Arithmetic differs in the last bits between processors, thread counts and versions of torch, and a training run
    amplifies that; such a model must still do as well. It does if accuracy and length in every context differ by less
    than three standard errors of the difference.

    Args:
        folder: of the model that was built.
        built: its record.
        level: of the model.
    """
    model = record(level)["models"][name]
    if is_shipped(folder, name, level):
        return f"{name}: bit for bit the shipped model"
    versions = f"torch {torch.__version__} on {built['threads']} thread(s), shipped: {model['torch']} on " + str(
        model["threads"]
    )
    beyond = []
    for context in model["measured"].keys() & built["measured"].keys():
        for quantity in ("accuracy", "tokens"):
            there, here = (table[context]["all"][quantity] for table in (model["measured"], built["measured"]))
            noise = 3 / 1.96 * math.hypot(there[1], here[1])  # records hold 95 % half widths
            if abs(there[0] - here[0]) > noise:
                beyond.append(f"{quantity} {context}: {here[0]:.3f}, shipped {there[0]:.3f} (noise {noise:.3f})")
    if beyond:
        return f"{name}: NOT the shipped model, it differs beyond noise ({versions}): {'; '.join(beyond)}"
    return f"{name}: other bits than the shipped model, equal to it within noise ({versions})"


def ship(world: Path, level: Level = FIRST) -> None:
    """Make the models of ``world``, which was rebuilt, those that come with the package.

    python -m opd_ext.tinymath.shipped WORLD [LEVEL]
    """
    place = FOLDER / level.shipped
    new = json.loads((world / "world.json").read_text())
    for name, model in new["models"].items():
        shutil.rmtree(place / name, ignore_errors=True)
        (place / name).mkdir(parents=True)
        for file in sorted((world / name).iterdir()):
            shutil.copyfile(file, place / name / file.name)
        model["digests"] = {file.name: digest(file) for file in sorted((place / name).iterdir())}
        model.pop("seconds")  # of another machine
        model.setdefault("torch", torch.__version__)
    (place / "world.json").write_text(json.dumps(new, indent=2) + "\n")


if __name__ == "__main__":
    ship(Path(sys.argv[1]), LEVELS[sys.argv[2]] if len(sys.argv) > 2 else FIRST)
