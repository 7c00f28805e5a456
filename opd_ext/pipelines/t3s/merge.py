# SPDX-License-Identifier: Apache-2.0
"""Recovering residual transfer on checkpoints: ``base + (final - bottleneck)``, file by file."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file

from opd_ext.files import put_in_place
from opd_ext.pipelines.t3s.selection import residual_transfer
from opd_ext.progress import track

_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", _INDEX)


class MergeError(ValueError):
    """One sentence: which checkpoint lacks what."""


def recovering_residual_transfer(base: str, bottleneck: Path, final: Path, out: Path) -> None:
    """Write the merged model to the folder ``out``: the base's configuration, tokenizer, dtypes and files.

    Sums are made in float32, one tensor at a time. A tensor that the base stores twice under tied names is merged
    once, under the name that the fine-tuned checkpoints use.

    Raises:
        MergeError: the models have different tensors, or one has no safetensors.
    """
    source = Path(base) if Path(base).is_dir() else Path(snapshot_download(base))
    folder = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    where = {name: _tensor_files(path) for name, path in (("base", source), ("b", bottleneck), ("f", final))}
    tied = _tied_names(source, where)
    if missing := set(where["b"]) ^ (set(where["base"]) - tied):
        raise MergeError(f"{sorted(missing)[0]} is in one of {source} and {bottleneck} only; they cannot be merged.")
    shards: dict[Path, list[str]] = {}
    for name, file in where["base"].items():
        if name not in tied:
            shards.setdefault(file, []).append(name)
    with ExitStack() as stack:
        handles = {
            file: stack.enter_context(safe_open(file, "pt")) for files in where.values() for file in files.values()
        }
        for file, names in track(shards.items(), "merging", len(shards), "files"):
            tensors = {
                name: residual_transfer(*(handles[where[of][name]].get_tensor(name) for of in ("base", "b", "f")))
                for name in names
            }
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
    _copy_the_rest(source, folder)
    if (source / _INDEX).exists():
        index = json.loads((source / _INDEX).read_text())
        index["weight_map"] = {name: file.name for file, names in shards.items() for name in names}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    put_in_place(folder, out)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    found = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _names(file)}
    if not found:
        raise MergeError(f"{folder} holds no safetensors.")
    return found


def _names(file: Path) -> Iterator[str]:
    with safe_open(file, "pt") as handle:
        yield from handle.keys()


def _tied_names(source: Path, where: dict[str, dict[str, Path]]) -> set[str]:
    """What the base stores besides its tied twin, and a saved checkpoint therefore does not."""
    config = json.loads((source / "config.json").read_text())
    return set(where["base"]) - set(where["b"]) if config.get("tie_word_embeddings") else set()


def _copy_the_rest(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in _WEIGHTS) and not file.name.startswith("."):
            shutil.copy(file, folder / file.name)
