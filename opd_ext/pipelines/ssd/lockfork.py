# SPDX-License-Identifier: Apache-2.0
"""Locks and forks: where a self-distilled model moved, and in which way (SSD, arXiv 2604.01193).

The text is the base model's own. At a *lock* one token has most of the base's mass (:data:`REFERENCE` keeps it alone),
at a *fork* several share it; the states are the same for every arm. The split of the loss
(:func:`~opd_ext.pipelines.ssd.target.split_loss`) then says how far an arm cut the tail and how far it spread mass.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from opd_ext.pipelines.ssd.target import kept_mass, split_loss, truncated_distribution
from opd_ext.pipelines.steps import write_frame
from opd_ext.progress import track
from opd_ext.sampling.config import Decoding
from opd_ext.tokens.tables import SAMPLES, read_table

COLUMNS = ("support", "shape", "alignment", "kept_mass", "entropy", "top")
REFERENCE = Decoding(1.0, 20, 0.8)
ROWS = 512  # states that are worked on at a time
LONGEST = 4096  # tokens of a response that are looked at: the logits of two models are held for all of them


def measure(
    base: str,
    models: dict[str, str],
    decodings: dict[str, Decoding],
    samples: Path,
    count: int,
    out: Path,
    device: str,
    trust_remote_code: bool = False,
) -> None:
    """Write one row per arm, whose model it is (the base or the arm's), and kind of state (lock, fork).

    Columns: ``states``; ``support``, ``shape`` and ``alignment`` (nats, means); ``kept_mass`` at temperature 1;
    ``entropy`` (nats) of the model; ``top`` probability of its likeliest token.

    Args:
        samples: of the base at temperature 1; the first ``count`` are looked at.
    """
    rows = read_table(samples, SAMPLES).head(count)
    pairs = [(p, r[:LONGEST]) for p, r in zip(rows["prompt_ids"], rows["response_ids"], strict=True)]
    records = []
    for arm, path in models.items():
        decoding, found = decodings[arm], {}
        both = zip(*(_logits(model, pairs, device, trust_remote_code) for model in (base, path)), strict=True)
        for before, after in track(both, f"locks and forks, {arm}", len(pairs), "responses"):
            for start in range(0, len(before), ROWS):
                _add(found, before[start : start + ROWS], after[start : start + ROWS], decoding)
        for (model, kind), parts in found.items():
            values = np.concatenate(parts)
            means = values.mean(0) if len(values) else np.full(len(COLUMNS), np.nan)
            numbers = dict(zip(COLUMNS, means, strict=True))
            records.append({"arm": arm, "model": model, "kind": kind, "states": len(values), **numbers})
    write_frame(out, pd.DataFrame(records))


def _add(found: dict[tuple[str, str], list[np.ndarray]], before: Tensor, after: Tensor, decoding: Decoding) -> None:
    """Append what both models do at some states, [R, V] each, under (whose model, kind of state)."""
    target = truncated_distribution(before, decoding.temperature, decoding.top_k, decoding.top_p)
    reference = truncated_distribution(before, REFERENCE.temperature, REFERENCE.top_k, REFERENCE.top_p)
    lock = (reference > 0).sum(-1) == 1
    for model, logits in (("base", before), ("arm", after)):
        values = _values(logits, target, decoding.temperature)
        for kind, chosen in (("lock", lock), ("fork", ~lock)):
            found.setdefault((model, kind), []).append(values[chosen].cpu().numpy())


def _values(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """[R, V] twice -> [R, 6], in the order of ``COLUMNS``."""
    split = split_loss(logits, target, temperature)
    p = logits.softmax(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    return torch.stack(
        [split.support, split.shape, split.alignment, kept_mass(logits, target), entropy, p.amax(-1)], -1
    )


@torch.inference_mode()
def _logits(model: str, pairs: list, device: str, trust_remote_code: bool) -> Iterator[Tensor]:
    """Float32 logits [R, V] that predict the response tokens of each pair."""
    disable_progress_bar()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    network = (
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=trust_remote_code).to(device).eval()
    )
    for prompt, response in pairs:
        ids = torch.tensor(np.concatenate([prompt, response])[None], dtype=torch.long, device=device)
        yield network(ids, logits_to_keep=len(response) + 1).logits[0, :-1].float()
