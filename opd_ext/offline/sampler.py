# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine working through its share of the shards: ``python -m opd_ext.offline.sampler SPEC REPLICA REPLICAS``.

vLLM's engine runs in this process, not beside it: a shard's requests are then all known before the first is scheduled,
so batches do not depend on how fast they arrive.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import pandas as pd

from opd_ext.offline.sampling import Job, progress_file, request_seed
from opd_ext.offline.tables import PROMPTS, SAMPLES, content_key, read_table, write_table

REPORT_EVERY = 20  # engine steps between reports of progress

Request = tuple[str, int, list[int]]
"""uid, sample, prompt ids."""

Response = tuple[list[int], str]
"""Token ids, and why there are no more of them."""


class Generator(Protocol):
    """An engine that can take the weights of one checkpoint after another."""

    def load(self, model: str) -> None: ...

    def generate(self, job: Job, requests: list[Request], report: Callable[[int, int], None]) -> list[Response]:
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
        temporary = progress.with_suffix(".tmp")
        temporary.write_text(f"{done} {tokens + of_them}")
        os.replace(temporary, progress)

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


def _row(request: Request, response: Response) -> dict[str, Any]:
    (uid, sample, prompt), (ids, reason) = request, response
    if reason not in ("stop", "length"):
        raise RuntimeError(f"Request {uid} was ended with '{reason}'.")
    return {
        "uid": uid,
        "sample": sample,
        "key": content_key(prompt, ids),
        "prompt_ids": prompt,
        "response_ids": ids,
        "finish_reason": reason,
    }


class VLLM:
    """vLLM's engine, in this process."""

    def __init__(self, model: str, settings: dict[str, Any]):
        if settings.pop("device") == "cpu":
            from opd_ext import plugin

            plugin.register()  # vLLM then finds its CPU build
        from vllm import LLM

        # Without `generation_config="vllm"` a model's own defaults (top-k, penalties) would slip into every request.
        self._llm = LLM(model=model, generation_config="vllm", seed=0, disable_log_stats=True, **settings)
        self._model = model

    def load(self, model: str) -> None:
        """Take the weights of another checkpoint with the same architecture."""
        if model != self._model:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
            self._model = model

    def generate(self, job: Job, requests: list[Request], report: Callable[[int, int], None]) -> list[Response]:
        """See :class:`Generator`."""
        from vllm import SamplingParams, TokensPrompt

        self._llm.reset_prefix_cache()  # what an earlier shard left there would change the batches of this one
        engine = self._llm.llm_engine
        for index, (uid, sample, ids) in enumerate(requests):
            params = SamplingParams(
                temperature=job.temperature,
                top_k=max(job.top_k, 0),
                top_p=job.top_p,
                min_p=0.0,
                repetition_penalty=1.0,
                presence_penalty=0.0,
                frequency_penalty=0.0,
                max_tokens=job.max_tokens,
                stop_token_ids=list(job.stop_ids),
                seed=request_seed(job.seed, uid, sample),
                detokenize=False,
            )
            engine.add_request(str(index), TokensPrompt(prompt_token_ids=ids), params)
        done: dict[int, Response] = {}
        steps = tokens = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    (completion,) = output.outputs
                    done[int(output.request_id)] = list(completion.token_ids), completion.finish_reason
                    tokens += len(completion.token_ids)
            steps += 1
            if steps % REPORT_EVERY == 0:
                report(len(done), tokens)
        return [done[index] for index in range(len(requests))]


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), VLLM)
