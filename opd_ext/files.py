# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are there as a whole or not at all: written under another name, then renamed.

A rename within one file system is atomic, so a process that is killed leaves what was there before.
"""

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A scratch file beside ``path``, which takes its place when the block ends, and is gone when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        put_file(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def put_file(scratch: Path, path: Path) -> None:
    """Give a file that is complete its name, on the same file system; what was there is whole until then."""
    scratch.chmod(0o644)
    os.replace(scratch, path)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file; text as UTF-8, half a character (a lone surrogate, in feedback say) as a question mark."""
    with whole(path) as scratch:
        scratch.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]], default: Callable[[Any], Any] = float) -> None:
    """Write one JSON object per line, compressed if the name ends in ``.gz``.

    Args:
        default: what becomes of a value that JSON does not know.
    """
    lines = (json.dumps(row, ensure_ascii=False, default=default) + "\n" for row in rows)
    with whole(path) as scratch:
        if path.suffix != ".gz":
            with scratch.open("w", encoding="utf-8", errors="replace") as file:
                file.writelines(lines)
            return
        # Neither time nor name in the header: the same rows are the same bytes.
        with scratch.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as file:
            file.writelines(line.encode(errors="replace") for line in lines)


def read_jsonl(path: Path, cut_off_end: bool = False) -> list[Any]:
    """One value per line that is not blank. Lines end with a line feed alone: JSON text may hold U+2028 and U+0085.

    Args:
        cut_off_end: ignore a last line that is no JSON, as a process leaves it that was killed.

    Raises:
        ValueError: a line is not JSON, or the file is not UTF-8; one sentence.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = content.decode("utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            if cut_off_end and number == len(lines):
                break
            raise ValueError(f"line {number} of {path} is not JSON: repair or remove the line") from error
    return rows


def drop_lines_after(path: Path, step: int) -> None:
    """Remove what a killed run recorded beyond ``step``, a half-written last line included: it will be done again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    write_whole(path, "".join(kept))


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A scratch folder on the same file system as ``target``, gone afterwards unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename ``folder`` to ``target``; what was there stays whole until the moment of the exchange."""
    if not target.exists():
        os.rename(folder, target)
        return
    with beside(target) as trash:
        os.rename(target, trash / "old")
        try:
            os.rename(folder, target)
        except BaseException:
            os.rename(trash / "old", target)
            raise


def undo_exchange(target: Path) -> None:
    """Take back what a process that was killed within :func:`put_in_place` had moved away, and remove its scratch."""
    for scratch in target.parent.glob(f".{target.name}.*"):
        if (scratch / "old").exists() and not target.exists():
            os.rename(scratch / "old", target)
        shutil.rmtree(scratch, ignore_errors=True)
