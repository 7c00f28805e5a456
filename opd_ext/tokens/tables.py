# SPDX-License-Identifier: Apache-2.0
"""Token tables: parquet files of prompts, responses and numbers per response token, each row under a content key.

Every stage after sampling reads token ids from these files. Text survives decoding and encoding only most of the time
(samples at a high temperature often do not), and a mask that is off by one token trains the wrong thing in silence; so
rows are joined by a hash of their ids, never by position.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from opd_ext.files import whole

_IDS = pa.list_(pa.int32())

PROMPTS = pa.schema({"uid": pa.string(), "prompt_ids": _IDS})
"""What a sampler reads: a name that is unique in the file, and the rendered prompt."""

SAMPLES = pa.schema(
    {
        "uid": pa.string(),
        "sample": pa.int32(),  # 0 .. n - 1 within a uid
        "key": pa.string(),  # content_key of the row
        "prompt_ids": _IDS,
        "response_ids": _IDS,  # with the token that ended it, where finish_reason is "stop"
        "finish_reason": pa.string(),  # "stop": the model ended it; "length": it ran into the limit
    }
)
"""What a sampler writes."""

TRAINING = pa.schema([SAMPLES.field(name) for name in ("key", "prompt_ids", "response_ids", "finish_reason")])
"""The part of it that fine-tuning needs."""

CONFIDENCE = pa.schema({"key": pa.string(), "logp": pa.list_(pa.float32())})
"""Teacher-forced natural log-probability of every response token, by content key."""

FLAGS = pa.schema({"key": pa.string(), "flags": pa.list_(pa.bool_())})
"""One yes or no per response token, by content key: a keep-mask, or the positions a diffusion model must restore."""


class TableError(ValueError):
    """One sentence: which file does not hold what it should."""


def content_key(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
    """Hex SHA-256 of both id lists, each as its length and its ids in little-endian 32-bit integers."""
    digest = hashlib.sha256()
    for ids in (prompt_ids, response_ids):
        digest.update(struct.pack("<i", len(ids)))
        digest.update(np.asarray(ids, dtype="<i4").tobytes())
    return digest.hexdigest()


def write_table(path: Path, rows: pd.DataFrame, schema: pa.Schema, **metadata: str) -> None:
    """Write ``rows`` to a file that is there as a whole or not at all.

    Equal rows give equal bytes. Floats are split into byte planes before compression: log-probs of one text under
    similar models share their upper bytes.
    """
    table = pa.Table.from_pandas(rows, schema=schema, preserve_index=False)
    table = table.replace_schema_metadata({f"opd.{name}": value for name, value in metadata.items()})
    floats = [f"{field.name}.list.element" for field in schema if field.type == pa.list_(pa.float32())]
    # Dictionaries would make the byte planes moot for floats, and pay for nothing else but ids.
    ids = [f"{field.name}.list.element" for field in schema if field.type == _IDS]
    with whole(path) as scratch:
        pq.write_table(
            table, scratch, compression="zstd", use_dictionary=ids, use_byte_stream_split=floats, write_statistics=False
        )


def read_table(path: Path, schema: pa.Schema, metadata: dict[str, str] | None = None) -> pd.DataFrame:
    """Rows of a token table, in file order; further columns of the file come along.

    Args:
        metadata: what :func:`write_table` was given and must have been given, else the file belongs to something else.

    Raises:
        TableError: the file is missing, damaged, lacks columns, or carries other metadata.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise TableError(f"{path} does not exist; run the stage that makes it.") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise TableError(f"{path} is not a readable parquet file ({error}); remove it and run again.") from None
    if missing := [name for name in schema.names if name not in table.column_names]:
        raise TableError(f"{path} has no column {missing[0]}; it needs {', '.join(schema.names)}.")
    found = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    for name, value in (metadata or {}).items():
        if found.get(f"opd.{name}") != value:
            raise TableError(f"{path} was made with {name} {found.get(f'opd.{name}')}, not {value}.")
    return table.to_pandas()


def check_keys(rows: pd.DataFrame, path: Path) -> None:
    """Compare every row with its content key.

    Raises:
        TableError: ids and key of a row disagree.
    """
    for key, prompt, response in zip(rows["key"], rows["prompt_ids"], rows["response_ids"], strict=True):
        if content_key(prompt, response) != key:
            raise TableError(f"{path}: the token ids of row {key[:12]} are not those that its key was made of.")


def aligned(rows: pd.DataFrame, other: pd.DataFrame, column: str, path: Path) -> list[np.ndarray]:
    """Per row of ``rows``, the entry of ``column`` in ``other`` under the same content key.

    Raises:
        TableError: a row has no counterpart, or one of another length than its response.
    """
    found = dict(zip(other["key"], other[column], strict=True))
    entries = []
    for key, response in zip(rows["key"], rows["response_ids"], strict=True):
        entry = found.get(key)
        if entry is None:
            raise TableError(f"{path} has nothing for row {key[:12]}: it was made for other token ids.")
        if len(entry) != len(response):
            raise TableError(f"{path} has {len(entry)} values for the {len(response)} response tokens of {key[:12]}.")
        entries.append(np.asarray(entry))
    return entries


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file, or of the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for file in _files(path):
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _files(path: Path) -> Iterable[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
