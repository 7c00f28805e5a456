# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine working through its share of the shards: ``python -m opd_ext.offline.sampler SPEC REPLICA REPLICAS``.

vLLM's engine runs in this process, not beside it: a shard's requests are then all known before the first is scheduled,
so batches do not depend on how fast they arrive.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import pandas as pd

from opd_ext.offline.sampling import Job, progress_file, request_seed
from opd_ext.offline.tables import PROMPTS, SAMPLES, content_key, read_table, write_table

REPORT_EVERY = 20  # engine steps between reports of progress


def main(spec: Path, replica: int, replicas: int) -> None:
    """Generate and store every missing shard that falls to this replica, model after model."""
    content = json.loads(spec.read_text())
    jobs = [Job(**{**job, "stop_ids": tuple(job["stop_ids"])}) for job in content["jobs"]]
    if content["device"] == "cpu":
        from opd_ext import plugin

        plugin.register()  # vLLM then finds its CPU build
    sampler, turn = None, 0
    for job in jobs:
        requests = job.requests(read_table(Path(job.prompts), PROMPTS))
        for path, share in job.shards(requests):
            turn += 1
            if turn % replicas != replica or path.exists():
                continue
            if sampler is None:
                sampler = Sampler(job.model, content["engine"], progress_file(spec, replica))
            sampler.load(job.model)
            write_table(path, sampler.generate(job, share), SAMPLES, job=job.digest)
            sampler.stored()


class Sampler:
    """A vLLM engine that can take the weights of one checkpoint after another."""

    def __init__(self, model: str, settings: dict[str, Any], report: Path):
        from vllm import LLM

        # Without `generation_config="vllm"` a model's own defaults (top-k, penalties) would slip into every request.
        self._llm = LLM(model=model, generation_config="vllm", seed=0, disable_log_stats=True, **settings)
        self._model, self._report, self._tokens = model, report, 0

    def load(self, model: str) -> None:
        """Take the weights of another checkpoint with the same architecture."""
        if model != self._model:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
            self._llm.reset_prefix_cache()
            self._model = model

    def generate(self, job: Job, requests: list[tuple[str, int, list[int]]]) -> pd.DataFrame:
        """Rows of :data:`~opd_ext.offline.tables.SAMPLES` for ``requests``, in their order.

        Raises:
            RuntimeError: vLLM ended a request for another reason than its own end or its length.
        """
        from vllm import SamplingParams, TokensPrompt

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
        done: dict[int, Any] = {}
        steps = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    done[int(output.request_id)] = output.outputs[0]
                    self._tokens += len(output.outputs[0].token_ids)
            steps += 1
            if steps % REPORT_EVERY == 0:
                self._say(len(done))
        return pd.DataFrame([_row(*request, done[index]) for index, request in enumerate(requests)])

    def stored(self) -> None:
        """The shard now counts as a file."""
        self._say(0)

    def _say(self, finished: int) -> None:
        temporary = self._report.with_suffix(".tmp")
        temporary.write_text(f"{finished} {self._tokens}")
        os.replace(temporary, self._report)


def _row(uid: str, sample: int, prompt: list[int], output: Any) -> dict[str, Any]:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended {uid} with '{output.finish_reason}'.")
    response = list(output.token_ids)
    return {
        "uid": uid,
        "sample": sample,
        "key": content_key(prompt, response),
        "prompt_ids": prompt,
        "response_ids": response,
        "finish_reason": output.finish_reason,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
