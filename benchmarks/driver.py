# SPDX-License-Identifier: Apache-2.0
"""What the one trainer process does with a step's rollouts: read them as rows, read their ids, write both.

    python benchmarks/driver.py                                    # 512 responses of 2,048 tokens in the mean
    python benchmarks/driver.py --model ~/.cache/opd_ext/models/smollm2

Every GPU waits for it, so the plan counts it (``_DRIVER_TOKENS_S`` of opd_ext/plan/timing.py). Lengths are log-normal
with a spread of 0.75 as a plan draws them, log-probs are kept, the text is of the repository's documents. The queue
that brings the rollouts is left out: a stand-in hands over the same tensors. Seconds are CPU seconds of this process,
all threads together, so that other work on the machine does not count: what decoding does on several cores is
overstated.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from measure import RESULTS, provenance, write_json
from transformers import AutoTokenizer

from opd_ext import files, recorded
from opd_ext.bridge import rollouts
from opd_ext.tinymath.shipped import FOLDER

PROMPT = 300  # tokens
TEXTS = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


def fields(ids: list[int], lengths: np.ndarray) -> dict[str, Any]:
    """The fields of the queue that rows are made of, for responses of ``lengths`` tokens cut out of ``ids``."""
    generator, size = torch.Generator().manual_seed(0), len(lengths)

    def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    def objects(value: Any) -> np.ndarray:
        column = np.empty(size, dtype=object)
        column[:] = [value] * size
        return column

    long = torch.tensor(ids * (2 + max(int(lengths.max()), PROMPT) // len(ids)))
    starts = torch.randint(len(ids), (size,), generator=generator).tolist()
    responses = [long[start : start + length] for start, length in zip(starts, lengths.tolist(), strict=True)]
    return {
        "prompts": jagged([long[start : start + PROMPT] for start in starts]),
        "responses": jagged(responses),
        "loss_mask": jagged([torch.ones_like(row) for row in responses]),
        "rm_scores": jagged([torch.zeros(len(row)) for row in responses]),
        "rollout_log_probs": jagged([-torch.rand(len(row), generator=generator) for row in responses]),
        "data_source": objects("math"),
        "reward_model": objects({"ground_truth": "1"}),
        "extra_info": objects({"index": 1, "question": "q" * 400}),
        "extra_fields": objects({"reward_extra_info": {"acc": 1.0, "pred": "1"}}),
        "raw_prompt": objects([{"role": "user", "content": "q" * 400}]),
    }


def measure(tokenizer: Any, responses: int, mean: int, limit: int) -> dict[str, Any]:
    """CPU seconds of each part, and tokens of the responses per second of all of them."""
    spread = 0.75
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - spread**2 / 2, spread, responses)
    lengths = np.clip(drawn, 1, limit).astype(int)
    ids = tokenizer("\n".join(path.read_text() for path in TEXTS), verbose=False)["input_ids"]
    there, tokens = fields(ids, lengths), int(lengths.sum())
    queue = SimpleNamespace(kv_batch_get=lambda select_fields, **_: {name: there[name] for name in select_fields})
    batch = SimpleNamespace(keys=[f"t1p{i}_0_0" for i in range(responses)], partition_id="train")
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        before = time.process_time()
        found = call()
        seconds[name] = time.process_time() - before
        return found

    real, rollouts.tq = rollouts.tq, queue
    try:
        with TemporaryDirectory() as run:
            rows = timed("read_rows", lambda: rollouts.read_rows(batch, tokenizer, limit, [0]))
            kept = timed("read_tokens", lambda: rollouts.read_tokens(batch, log_probs=True))
            timed("write ids", lambda: recorded.write(Path(run), 1, kept))
            timed("write texts", lambda: files.write_jsonl(Path(run) / "train_1.jsonl", rows))
    finally:
        rollouts.tq = real
    return {"tokens": tokens, "cpu_seconds": seconds, "tokens_per_second": tokens / sum(seconds.values())}


def main(
    responses: int = 512,
    mean: Annotated[int, typer.Option(help="Tokens of a response.")] = 2048,
    limit: int = 8192,
    model: Annotated[Path, typer.Option(help="Folder with a tokenizer; the miniature world's by default.")] = FOLDER
    / "base",
    date: Annotated[str, typer.Option(help="Date to record; today by default.")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON file; results/driver_cpu.json.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Measure how fast the trainer process takes and keeps rollouts."""
    out = out or RESULTS / "driver_cpu.json"
    if out.exists() and not force:
        raise typer.BadParameter(f"{out} exists; choose another --out or pass --force.")
    found = measure(AutoTokenizer.from_pretrained(model.expanduser()), responses, mean, limit)
    setting = {"responses": responses, "mean": mean, "limit": limit, "tokenizer": model.name}
    write_json(out, {**provenance("cpu", date, "transformers"), "setting": setting, **found})
    for name, seconds in found["cpu_seconds"].items():
        print(f"{name}: {seconds:.2f} s")
    print(f"{found['tokens']:,} tokens, {found['tokens_per_second'] / 1e6:.2f} million per second; written to {out}")


if __name__ == "__main__":
    typer.run(main)
