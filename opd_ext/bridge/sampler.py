# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine working through its share of the shards: ``python -m opd_ext.bridge.sampler SPEC REPLICA REPLICAS``.

vLLM's engine runs in this process, not beside it: a shard's requests are then all known before the first is scheduled,
so batches do not depend on how fast they arrive.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


from opd_ext.sampling.jobs import Job, sample_seed
from opd_ext.sampling.worker import REPORT_EVERY, Response, SamplingRequest, work


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

    def generate(self, job: Job, requests: list[SamplingRequest], report: Callable[[int, int], None]) -> list[Response]:
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
                seed=sample_seed(job.seed, uid, sample),
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
