# SPDX-License-Identifier: Apache-2.0
"""Files of a map, read back as the page reads them."""

import base64
import json
import re
from pathlib import Path

import numpy as np


def content(folder: Path, file: str):
    """What a data file hands to the page."""
    text = (folder / "data" / f"{file}.js").read_text()
    return json.loads(re.fullmatch(r'page\("\w+",\d+,(.*)\);\n', text)[1])


def unpacked(packed) -> np.ndarray:
    low, high, text = packed
    return low + np.frombuffer(base64.b64decode(text), "<u2") * (high - low) / 65535


def whole(packed) -> np.ndarray:
    width, text = packed
    return np.frombuffer(base64.b64decode(text), f"<u{width}")


def shown_loss(folder: Path, method: str, signal: str = "loss") -> float:
    """Sum over all tokens of a signal, over the trained tokens; of weight times divergence the loss of a step."""
    pages = range(len(content(folder, "index")["starts"]))
    total = sum(unpacked(content(folder, f"{method}_{page}")[signal]).sum() for page in pages)
    return total / sum(whole(content(folder, f"rollouts_{page}")["trained"]).sum() for page in pages)
