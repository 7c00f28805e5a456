# SPDX-License-Identifier: Apache-2.0
"""Building the miniature world: one folder, complete or absent.

    <out>/world.json                     settings, their hash, what was measured
    <out>/MODEL_CARD.md                  the same for people
    <out>/{train,val,test}.parquet       problems in verl's format
    <out>/base/, <out>/large/, ...       transformers checkpoints with their tokenizer
    <out>/tools.py                       on the level of several turns, the tools as verl takes them

The models come with the package (:mod:`opd_ext.tinymath.shipped`), the problems are drawn here. Models can be
trained from nothing as well: a function of the settings alone, up to floating-point differences between machines,
thread counts and versions of torch.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from opd_ext.files import beside, put_in_place, write_whole
from opd_ext.tinymath import shipped
from opd_ext.tinymath.card import measure_model, render_card
from opd_ext.tinymath.diffusion import HiddenReplies, add_mask_token, to_diffusion
from opd_ext.tinymath.levels import FIRST, LONG, Level
from opd_ext.tinymath.long.properties import of_world
from opd_ext.tinymath.pretrain import DiffusionSpec, make_corpus, make_model, next_token, pretrain
from opd_ext.tinymath.splits import draw_splits, write_splits


class WorldError(RuntimeError):
    """The folder cannot be used as asked; the message says what to do."""


def build(
    out: Path,
    models: Sequence[str] | None = None,
    force: bool = False,
    seed: int = 0,
    progress: bool = True,
    rebuild: bool = False,
    threads: int = 1,
    level: Level = FIRST,
) -> Path:
    """Build the world in ``out``, or as much of it as is missing.

    A world that is there already is left alone: a model that it lacks is added, nothing else is touched.
    Everything is prepared beside its destination and renamed, so an interrupted build leaves no half world.

    Args:
        out: destination folder.
        models: models to have, of those of the level (``base``, ``large`` and, on the first, ``diffusion``); None: all.
        force: build everything anew, with exactly the models named.
        seed: of the splits, the corpus, the initial weights and the sampling of the model card.
        progress: show progress and one line per thing done.
        rebuild: train the models from nothing (minutes) instead of unpacking them, and say whether they are the same.
        threads: of a rebuild. One is as fast as two wherever anything else runs, since threads wait for each other.
        level: which world.

    Returns:
        ``out``, absolute.

    Raises:
        ValueError: an unknown model is named, or none, or one without the model that it starts from.
        WorldError: ``out`` holds something else, or a world built with other settings (unless ``force``); the package
            is damaged, or has no models for these settings.
    """
    specs = level.specs
    models = list(specs) if models is None else models
    unknown = [name for name in models if name not in specs]
    if unknown or not models:
        raise ValueError(f"unknown models {unknown}: name one or more of {', '.join(specs)}")
    out = Path(out).expanduser().absolute()
    found = _read_world(out)
    there = [] if found is None or force else list(found["models"])
    models = sorted(models, key=list(specs).index)  # a parent before its child
    for name in models:
        parent = getattr(specs[name], "parent", name)
        if parent not in (*there, *models):
            raise ValueError(f"the model {name} starts from {parent}: name both")
    settings = _settings(seed, level)
    known = settings == shipped.record(level)["settings"]
    if not rebuild and not known:
        raise WorldError("the package has no models for these settings: train them with rebuild")

    def make(world: Path, folder: Path, name: str) -> tuple[dict, str]:
        if rebuild:
            record = _train_model(world, folder, name, seed, progress, threads, level)
            return record, f"; {shipped.compare(folder, name, record, level)}" if known else ""
        try:
            return shipped.unpack(name, folder, level), ""
        except shipped.DamagedError as error:
            raise WorldError(str(error)) from None

    say = print if progress else lambda *_: None
    if found is None or force:
        with beside(out) as folder:
            _start_world(folder, settings, seed, level)
            _add_models(folder, models, make, say, level)
            _add_properties(folder, seed, level, threads)
            put_in_place(folder, out)
        say(f"{level.name}: {out}")
        return out
    _check_same(out, found, settings, models, level)
    missing = [name for name in models if name not in found["models"]]
    _add_models(out, missing, make, say, level)
    _add_properties(out, seed, level, threads)
    if not missing:
        say(f"{level.name}: {out} is complete ({', '.join(found['models'])}), nothing to do")
    for name in models:
        if name not in missing and not rebuild and not shipped.is_shipped(out / name, name, level):
            say(f"{level.name}: {name} was trained here and is not the shipped one; force replaces it")
    return out


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _settings(seed: int, level: Level = FIRST) -> dict:
    """What decides the world. A sample of the corpus stands for the grammar, prompts and writing habits."""
    rng = random.Random(0)
    sample = []
    for index in range(500):
        difficulty = level.difficulties[index % len(level.difficulties)]
        question = level.problems.draw_question(rng, difficulty)
        corpora = level.chats.textbook(), level.chats.chats()
        sample += [asdict(corpus.chat(rng, question, difficulty)) for corpus in corpora]
    settings = {
        "seed": seed,
        "splits": level.sizes,
        "corpus_sample": _digest(sample),
        "vocabulary": _digest([level.vocabulary.phrases(), level.vocabulary.words()]),
    }
    return {**settings, "hash": _digest(settings)}


def _read_world(out: Path) -> dict | None:
    """The world's record, None where nothing is; refuses a folder that holds something else."""
    if (out / "world.json").is_file():
        return json.loads((out / "world.json").read_text())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WorldError(f"{out} exists and is not a tinymath world: choose another folder")
    return None


def _check_same(out: Path, found: dict, settings: dict, models: Sequence[str], level: Level) -> None:
    changed = [key for key in settings if key != "hash" and found["settings"].get(key) != settings[key]]
    changed += [
        f"models.{name}"
        for name in models
        if name in found["models"] and found["models"][name]["spec"] != asdict(level.specs[name])
    ]
    if changed:
        raise WorldError(
            f"{out} was built with other settings ({', '.join(changed)}): "
            "use force to replace it, or choose another folder"
        )


def _write_record(world: Path, record: dict, level: Level) -> None:
    write_whole(world / "MODEL_CARD.md", render_card(record, level))
    write_whole(world / "world.json", json.dumps(record, indent=2) + "\n")


def _start_world(folder: Path, settings: dict, seed: int, level: Level) -> None:
    write_splits(draw_splits(seed, level), folder, level)
    if level.tools is not None:
        write_whole(folder / "tools.py", level.tools)
    _write_record(folder, {"settings": settings, "models": {}}, level)


def _add_models(
    world: Path,
    names: Sequence[str],
    make: Callable[[Path, Path, str], tuple[dict, str]],
    say: Callable[[str], None],
    level: Level,
) -> None:
    """Have every model made beside its place, then put it there.

    Args:
        make: called with world, folder and name; returns the model's record and what to say of it.
        say: prints a line.
    """
    for name in names:
        began = time.perf_counter()
        with beside(world / name) as folder:
            record, remark = make(world, folder, name)
            put_in_place(folder, world / name)
        found = json.loads((world / "world.json").read_text())
        found["models"][name] = record
        _write_record(world, found, level)
        say(f"{level.name}: {name} ready in {time.perf_counter() - began:.1f} s{remark}")


def _add_properties(world: Path, seed: int, level: Level, threads: int) -> None:
    """What student and teacher are to each other, on the second level; measured unless the shipped record has it."""
    found = json.loads((world / "world.json").read_text())
    pair = ("base", "large")
    if level is not LONG or "properties" in found or not all(name in found["models"] for name in pair):
        return
    if all(shipped.is_shipped(world / name, name, level) for name in pair):
        found["properties"] = shipped.record(level)["properties"]
    else:
        with _threads(threads):
            val = draw_splits(seed, level)["val"][: level.measured]
            found["properties"] = of_world(world, val, seed, level.max_new_tokens or 0)
    _write_record(world, found, level)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_model(world: Path, folder: Path, name: str, seed: int, progress: bool, threads: int, level: Level) -> dict:
    """Pre-train, save and measure one model; returns its record for ``world.json``."""
    import torch

    with _threads(threads):
        return _train(world, folder, name, seed, progress, level) | {"threads": threads, "torch": torch.__version__}


def _train(world: Path, folder: Path, name: str, seed: int, progress: bool, level: Level) -> dict:
    from transformers import Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    started = time.perf_counter()
    spec, splits, tokenizer = level.specs[name], draw_splits(seed, level), level.make_tokenizer()
    held_out = {question for split in ("val", "test") for _, question in splits[split]}
    corpus = make_corpus(tokenizer, spec, seed, held_out)
    if isinstance(spec, DiffusionSpec):
        add_mask_token(tokenizer)
        model, objective = Qwen3ForCausalLM.from_pretrained(world / spec.parent), HiddenReplies(spec, seed)
        to_diffusion(model, spec, tokenizer, seed)
    else:
        model, objective = make_model(spec, tokenizer, seed), next_token
    training = time.perf_counter()
    tokens = 0
    for phases, course in spec.courses():
        now, corpus = corpus[:phases], corpus[phases:]
        tokens += pretrain(model, now, course, seed, progress, name, objective)
    trained = time.perf_counter()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    val = splits["val"][: level.measured]
    measured = measure_model(model, tokenizer, val, seed, progress, level, name in level.teachers)
    done = time.perf_counter()
    return {
        "spec": asdict(spec),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "tokens": tokens,
        "seconds": {
            "corpus": training - started,
            "training": trained - training,
            "measuring": done - trained,
            "total": done - started,
        },
        "measured": measured,
    }
