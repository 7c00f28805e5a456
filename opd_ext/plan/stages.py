# SPDX-License-Identifier: Apache-2.0
"""Memory, seconds and disk of a pipeline's stages, by the formulas of a training run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from opd_ext.config.assumptions import Assumptions
from opd_ext.plan import lengths, memory
from opd_ext.plan.advice import FULL
from opd_ext.plan.disk import checkpoint_bytes
from opd_ext.plan.machines import GiB, Machine, machine
from opd_ext.plan.run import Run, Sharding, dtype_bytes
from opd_ext.plan.shapes import ModelShape, model_shape
from opd_ext.plan.timing import pass_s, replica, update_s
from opd_ext.plan.work import Reading, Sampling, Training, Work

_SHARDS = 8  # that are played through; more of them take as much longer
_SHARE = 0.9  # of a GPU that vLLM takes where nobody says
_FP32_LOGITS = 3  # copies that a softmax of whole logits makes, as in plan/memory.py
_SEQUENCES = 256  # that vLLM runs at a time where nobody says


@dataclass(frozen=True)
class Place:
    """Where stages run, and what is assumed of it.

    Attributes:
        vllm: the fields of :class:`opd_ext.sampling.config.VLLMConfig`.
        cache: bytes for keys and values of an engine on a CPU.
    """

    device: str
    assumed: Assumptions
    vllm: Mapping[str, Any]
    cache: float = 0.0

    @property
    def machine(self) -> Machine:
        return machine(self.assumed.gpu, self.device)


@dataclass(frozen=True)
class Estimate:
    """One piece of a stage's work.

    Attributes:
        gpus: that are busy.
        memory: bytes by use, on each of them.
        seconds: until the last is done.
        tokens: that are written, trained or read.
        disk: bytes that stay.
        passing: bytes that are there for a while besides.
        advice: sentences.
    """

    gpus: int
    memory: dict[str, float]
    seconds: float
    tokens: float
    disk: float = 0.0
    passing: float = 0.0
    advice: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


def estimate(work: Work, place: Place) -> Estimate | None:
    """What a piece of work needs; None where the size of its model is not known here."""
    shape = model_shape(work.model)
    if shape is None:
        return None
    if isinstance(work, Sampling):
        return _sampling(work, shape, place)
    return _training(work, shape, place) if isinstance(work, Training) else _reading(work, shape, place)


def _process(place: Place) -> dict[str, float]:
    cpu = place.machine.is_cpu
    return {"Python, torch": memory.PROCESS} if cpu else {"CUDA context, NCCL": memory.CONTEXT}


# ---------------------------------------------------------------------- sampling


def _sampling(work: Sampling, shape: ModelShape, place: Place) -> Estimate:
    """Shards go round the engines; one is written to its end before the next begins, so each waits for its longest."""
    vllm, there, assumed = place.vllm, place.machine, place.assumed
    tp, replicas, args = vllm["tensor_parallel_size"], vllm["replicas"], vllm["args"]
    width = 4 if str(vllm["dtype"]) in ("float32", "float") else 2
    weights = width * shape.parameters / tp
    share = args.get("gpu_memory_utilization", _SHARE) * there.memory
    engine = replica(shape, there, assumed, tp, share, args.get("max_num_seqs", _SEQUENCES), width)
    size = min(vllm["shard"], work.requests)
    shards = -(-work.requests // size)
    played = min(shards, _SHARDS)
    drawn = [lengths.draw(size, work.mean, work.limit, assumed.length_spread, seed) for seed in range(played)]
    seconds = [lengths.written_s(engine, each, assumed.mean_prompt) for each in drawn]
    each_writes = -(-shards // replicas)
    longest = max(sum(seconds[first::replicas]) for first in range(min(replicas, played)))
    total = longest if played == shards else float(np.mean(seconds)) * each_writes
    tokens = float(np.mean([each.sum() for each in drawn])) * work.requests / size
    loaded = work.loads * width * shape.parameters / (assumed.disk_gb_s * 1e9)
    advice = []
    if there.is_cpu:
        used = {"vLLM: weights": weights, "vLLM: cache": place.cache} | _process(place)
    else:
        used = {"vLLM: weights, cache": share, "vLLM: CUDA graphs": memory.GRAPHS} | _process(place)
        if (held := sum(used.values())) > FULL * there.memory:
            advice.append(
                f"OUT OF MEMORY in sampling: {held / GiB:.1f} of {there.memory / GiB:.1f} GiB; set "
                f"vllm.args.gpu_memory_utilization={FULL - (held - share) / there.memory - 0.005:.2f}."
            )
        if engine.room < vllm["max_model_len"]:
            advice.append(
                f"vLLM WILL NOT START: beside the weights its share holds {max(0, engine.room):,.0f} tokens, and one "
                f"sequence may have {vllm['max_model_len']:,}; raise vllm.tensor_parallel_size or "
                "vllm.args.gpu_memory_utilization."
            )
    if work.known and shards < replicas and work.requests >= replicas:
        advice.append(
            f"{work.requests:,} responses are {shards} shard(s) for {replicas} engines, so some have nothing to do: "
            f"set vllm.shard={max(1, work.requests // replicas)}."
        )
    return Estimate(replicas * tp, used, total + loaded, tokens, advice=advice)


# ---------------------------------------------------------------------- training


def fine_tuning_run(work: Training, shape: ModelShape, place: Place) -> Run:
    """A fine-tuning as a training run whose responses are given: verl's own loss, on whole logits."""
    train = work.train
    verl = train["verl"]
    engine, model = verl.get("engine") or {}, verl.get("model") or {}
    parts = {"weights": engine.get("param_offload"), "optimizer": engine.get("optimizer_offload")}
    size, ranks, nodes = engine.get("fsdp_size") or -1, train["ranks"], train["nodes"]
    compute = dtype_bytes((engine.get("mixed_precision") or {}).get("param_dtype", "bf16"))
    sharding = Sharding(
        shards=size if 0 < size < ranks else ranks,
        master=dtype_bytes(engine.get("model_dtype", "fp32")),
        compute=compute,
        offloaded=frozenset(name for name, moved in parts.items() if moved),
        streamed=bool(engine.get("offload_policy")),
    )
    saves = len({*range(train["save_every"], train["steps"] + 1, train["save_every"]), train["steps"]})
    budget = max(train["tokens_per_gpu"], train["max_length"])
    return Run(
        device=place.device,
        machine=place.machine,
        assumed=place.assumed,
        nodes=nodes,
        gpus_per_node=ranks // nodes,
        student=shape,
        teachers=(),
        scorer=None,
        passes=(),
        heads=0,
        beside=(),
        servers=(),
        sharding=sharding,
        teacher_sharding=sharding,
        tp=1,
        vllm_share=None,
        vllm_sequences=0,
        vllm_length=0,
        vllm_width=2,
        cpu_cache=0.0,
        vllm_sleeps=False,
        bucket=0.0,
        prompts=train["batch_size"],
        n=1,
        updates=1,
        limit=train["max_length"],
        mean=work.mean,
        mean_prompt=place.assumed.mean_prompt,
        thinks=False,
        pair=train["max_length"],
        budget=budget,
        teacher_budget=budget,
        score_budget=budget,
        sequence_parallel=1,
        checkpointing=bool(model.get("enable_gradient_checkpointing", True)),
        offloads=bool(model.get("enable_activation_offload", False)),
        trained=shape.parameters,
        trained_tensors=shape.tensors,
        adapter=0,
        adapter_tensors=0,
        chunk=0,
        fp32_head=False,
        dense=True,
        temperature_copies=1,
        dense_entropy=False,
        scores_old=False,
        teaches=False,
        moving=(),
        teacher_adapters=0,
        steps=train["steps"],
        validations=0,
        validation=(),
        meanwhile=(),
        val_limit=0,
        saves=saves,
        kept=work.kept,
        run_dir="",
    )


def _training(work: Training, shape: ModelShape, place: Place) -> Estimate:
    run = fine_tuning_run(work, shape, place)
    phase = memory.update(run)
    drawn = [
        lengths.draw(run.prompts, work.mean, run.limit, place.assumed.length_spread, seed)
        for seed in range(lengths.DRAWS)
    ]
    model = shape.parameters * run.sharding.master
    resumable = sum(checkpoint_bytes(run).values())
    step = float(np.mean([update_s(run, each) for each in drawn]))
    saved = run.saves * (resumable + model) / (place.assumed.disk_gb_s * 1e9)
    return Estimate(
        gpus=run.ranks,
        memory=phase.uses,
        seconds=run.steps * step + saved,
        tokens=run.steps * float(np.mean([each.sum() for each in drawn])),
        disk=work.kept * model,
        # What is needed to go on is kept of the last checkpoint, until the next is whole.
        passing=min(2, run.saves) * resumable + model,
        advice=list(_overflow(run, phase.bytes)),
    )


def _overflow(run: Run, used: float) -> Iterator[str]:
    room = run.machine.memory
    if used <= FULL * room:
        return
    better = [words for words, other in _remedies(run) if memory.update(other).bytes <= FULL * room]
    yield (
        f"OUT OF MEMORY in training: {used / GiB:.0f} of {room / GiB:.0f} GiB; "
        + (f"set {' or '.join(better[:2])}." if better else "use more GPUs, or a smaller model.")
    )


def _remedies(run: Run) -> Iterator[tuple[str, Run]]:
    if not run.checkpointing:
        yield "train.verl.model.enable_gradient_checkpointing=true", replace(run, checkpointing=True)
    if run.budget > run.pair:
        yield f"train.tokens_per_gpu={run.pair}", replace(run, budget=run.pair)
    for times in (2, 4):
        more = replace(run.sharding, shards=run.sharding.shards * times)
        if run.sharding.shards == run.ranks and run.prompts % (run.ranks * times) == 0:
            yield f"train.ranks={run.ranks * times}", replace(run, sharding=more)
    if run.device == "cuda":
        streamed = replace(run, sharding=replace(run.sharding, streamed=True))
        yield "train.verl.engine.offload_policy=true", streamed


# ---------------------------------------------------------------------- reading


def _reading(work: Reading, shape: ModelShape, place: Place) -> Estimate:
    assumed, there = place.assumed, place.machine
    drawn = np.full(max(1, work.sequences), int(work.mean))
    tokens = float((drawn + assumed.mean_prompt).sum())
    once = pass_s(shape, there, assumed, drawn + assumed.mean_prompt, float(drawn.sum()), work.width)
    loaded = work.passes * shape.parameters * work.width / (assumed.disk_gb_s * 1e9)
    used = {"weights": work.resident * shape.parameters * work.width / work.ranks} | _process(place)
    used["logits"] = work.logits * shape.vocabulary * (work.width + _FP32_LOGITS * 4)
    advice, room = [], FULL * there.memory
    if (total := sum(used.values())) > room:
        advice.append(
            f"OUT OF MEMORY in a pass over given responses: {total / GiB:.0f} of {there.memory / GiB:.0f} GiB; use "
            "shorter ones (train.max_length), more GPUs or a smaller model."
        )
    return Estimate(work.ranks, used, work.passes * once / work.ranks + loaded, work.passes * tokens, advice=advice)
