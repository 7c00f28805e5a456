# SPDX-License-Identifier: Apache-2.0
"""A process that works through its share of the shards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from opd_ext.files import write_whole
from opd_ext.sampling.jobs import Job, progress_file
from opd_ext.tokens.tables import PROMPTS, SAMPLES, content_key, read_table, write_table

REPORT_EVERY = 20  # engine steps between reports of progress


SamplingRequest = tuple[str, int, list[int]]
"""uid, sample, prompt ids."""


Response = tuple[list[int], str]
"""Token ids, and why there are no more of them."""


class Generator(Protocol):
    """An engine that can take the weights of one checkpoint after another."""

    def load(self, model: str) -> None: ...

    def generate(self, job: Job, requests: list[SamplingRequest], report: Callable[[int, int], None]) -> list[Response]:
        """One response per request, in their order; ``report`` takes how many are done and their tokens."""
        ...


def work(spec: Path, replica: int, replicas: int, start: Callable[[str, dict[str, Any]], Generator]) -> None:
    """Generate and store every missing shard that falls to this replica, model after model.

    Args:
        start: from a model and the engine's settings to the engine.
    """
    content = json.loads(spec.read_text())
    jobs = [Job(**{**job, "stop_ids": tuple(job["stop_ids"])}) for job in content["jobs"]]
    generator, turn, tokens = None, 0, 0
    progress = progress_file(spec, replica)

    def report(done: int, of_them: int) -> None:
        write_whole(progress, f"{done} {tokens + of_them}")

    for job in jobs:
        requests = job.requests(read_table(Path(job.prompts), PROMPTS))
        for path, share in job.shards(requests):
            turn += 1
            if turn % replicas != replica or path.exists():
                continue
            generator = generator or start(job.model, content["engine"] | {"device": content["device"]})
            generator.load(job.model)
            responses = generator.generate(job, share, report)
            rows = [_row(request, response) for request, response in zip(share, responses, strict=True)]
            write_table(path, pd.DataFrame(rows), SAMPLES, job=job.digest)
            tokens += sum(len(ids) for ids, _ in responses)
            report(0, 0)  # the shard now counts as a file


def _row(request: SamplingRequest, response: Response) -> dict[str, Any]:
    (uid, sample, prompt), (ids, reason) = request, response
    if reason not in ("stop", "length"):
        raise RuntimeError(f"SamplingRequest {uid} was ended with '{reason}'.")
    return {
        "uid": uid,
        "sample": sample,
        "key": content_key(prompt, ids),
        "prompt_ids": prompt,
        "response_ids": ids,
        "finish_reason": reason,
    }
