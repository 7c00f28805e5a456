# SPDX-License-Identifier: Apache-2.0
"""Sampling on vLLM: what is asked for, in which batches, and where the answers go.

A job is a model, prompts as token ids and a way of decoding. Its requests are cut into shards; a shard is generated as
one batch by one engine and stored as one file. So an interrupted job goes on with the shards that are missing, and ends
with the same samples: the same shard is the same batch, every request has a seed of its own, and neither depends on how
many engines there are or which shards were there already.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from opd_ext import launch
from opd_ext.files import write_whole
from opd_ext.progress import Progress
from opd_ext.sampling.config import VLLMConfig
from opd_ext.seeds import request_seed
from opd_ext.tokens.tables import PROMPTS, SAMPLES, file_digest, read_table, write_table


@dataclass(frozen=True)
class Job:
    """Samples of one model; ``prompts`` and ``out`` are token tables.

    ``weights`` identifies the model by content and ``engine`` says in what numbers it computes, so that paths and
    placement may change.
    """

    model: str
    weights: str
    engine: str
    prompts: str
    out: str
    temperature: float
    top_k: int
    top_p: float
    n: int
    max_tokens: int
    seed: int
    stop_ids: tuple[int, ...]  # tokens that end a response
    shard: int

    @cached_property
    def digest(self) -> str:
        """Of everything that decides the samples."""
        content = {**asdict(self), "model": None, "out": None, "prompts": file_digest(Path(self.prompts))}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def parts(self) -> Path:
        """Folder of the shards until the job is complete."""
        out = Path(self.out)
        return out.parent / f".{out.stem}.{self.digest}.parts"

    @property
    def done(self) -> bool:
        """Whether ``out`` holds the samples of this very job."""
        if not Path(self.out).exists():
            return False
        return (pq.read_schema(self.out).metadata or {}).get(b"opd.job") == self.digest.encode()

    @property
    def metadata(self) -> dict[str, str]:
        """What the file of samples says about itself."""
        asked = ("temperature", "top_k", "top_p", "n", "max_tokens", "seed", "stop_ids")
        return {"sampling": json.dumps({name: getattr(self, name) for name in asked}), "job": self.digest}

    def requests(self, prompts: pd.DataFrame) -> list[tuple[str, int, list[int]]]:
        """(uid, sample, prompt ids) of every request, in order."""
        pairs = zip(prompts["uid"], prompts["prompt_ids"], strict=True)
        return [(uid, sample, list(map(int, ids))) for uid, ids in pairs for sample in range(self.n)]

    def shards(self, requests: Sequence) -> Iterator[tuple[Path, Sequence]]:
        """The file of every shard, and its requests."""
        for index, start in enumerate(range(0, len(requests), self.shard)):
            yield self.parts / f"{index:05d}.parquet", requests[start : start + self.shard]


def sample_seed(seed: int, uid: str, sample: int) -> int:
    """Seed of one request, in [0, 2^31): its own, whatever else is sampled beside it."""
    return request_seed(f"{seed}/{uid}/{sample}", bits=31)


@dataclass(frozen=True)
class Engines:
    """What generates: a module that works through shards by :func:`~opd_ext.sampling.worker.work`, and its settings."""

    module: str
    settings: dict[str, Any]
    replicas: int
    devices: int  # of each

    @classmethod
    def vllm(cls, module: str, config: VLLMConfig, trust_remote_code: bool = False) -> "Engines":
        """Engines of ``module``, configured as vLLM is."""
        own = ("dtype", "max_model_len", "tensor_parallel_size")
        settings = {name: getattr(config, name) for name in own}
        settings |= {"trust_remote_code": trust_remote_code} | config.args
        return cls(module, settings, config.replicas, config.tensor_parallel_size)


def sample(
    jobs: Sequence[Job], engines: Engines, device: str, environment: dict[str, str], logs: Path, title: str
) -> None:
    """Run jobs that share an architecture (checkpoints of one model, say) on one start of the engines.

    Jobs whose samples are there already are skipped. Progress is shown on the console.

    Raises:
        LaunchError: an engine failed.
    """
    for job in jobs:
        if job.done:  # a run that was killed behind the last rename left its shards
            shutil.rmtree(job.parts, ignore_errors=True)
    jobs = [job for job in jobs if not job.done]
    if not jobs:
        return
    for job in jobs:
        job.parts.mkdir(parents=True, exist_ok=True)
    spec = logs / f"{title.replace(' ', '-')}.json"
    content = {"jobs": [asdict(job) for job in jobs], "engine": engines.settings, "device": device}
    write_whole(spec, json.dumps(content))
    commands = [
        launch.Command(
            engines.module,
            [str(spec), str(replica), str(engines.replicas)],
            spec.with_suffix(f".{replica}.log"),
            devices=engines.devices,
            environment=environment,
        )
        for replica in range(engines.replicas)
    ]
    total = sum(job.n * pq.read_metadata(job.prompts).num_rows for job in jobs)
    with Progress(title, total, "samples") as progress:

        def watch() -> None:
            samples, tokens = _counts(jobs, spec, engines.replicas)
            progress.update(samples, note=f"{tokens / 1000:.1f}k tokens" if tokens else "starting")

        launch.run(commands, device, watch)
    for job in jobs:
        _merge(job)


def progress_file(spec: Path, replica: int) -> Path:
    """Where an engine says how far it is with its current shard: requests and tokens since it started."""
    return spec.with_suffix(f".{replica}.progress")


def _counts(jobs: Sequence[Job], spec: Path, replicas: int) -> tuple[int, int]:
    stored = sum(pq.read_metadata(part).num_rows for job in jobs for part in job.parts.glob("[0-9]*.parquet"))
    running, tokens = 0, 0
    for replica in range(replicas):
        try:
            of_shard, since_start = map(int, progress_file(spec, replica).read_text().split())
        except (FileNotFoundError, ValueError):
            continue
        running, tokens = running + of_shard, tokens + since_start
    return stored + running, tokens


def _merge(job: Job) -> None:
    """One file out of all shards, in the order of the requests."""
    requests = job.requests(read_table(Path(job.prompts), PROMPTS))
    parts = [read_table(path, SAMPLES, {"job": job.digest}) for path, _ in job.shards(requests)]
    write_table(Path(job.out), pd.concat(parts, ignore_index=True), SAMPLES, **job.metadata)
    shutil.rmtree(job.parts)
