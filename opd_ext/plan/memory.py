# SPDX-License-Identifier: Apache-2.0
"""Bytes on one accelerator (or in one process of a CPU) in each phase of a step, by use.

Every phase is its worst moment: micro-batches are full, responses are as long as they may be, and the optimiser's
moments exist, as they do from the second step on. Formulas and what they were checked against: ``docs/plan.md``.
"""

from dataclasses import dataclass

from opd_ext.objective import chunks
from opd_ext.plan.machines import GiB
from opd_ext.plan.run import Run
from opd_ext.plan.shapes import ModelShape
from opd_ext.plan.teachers import Served

CONTEXT = 1.5 * GiB  # CUDA context, NCCL's buffers, cuBLAS workspaces
ASLEEP = 2.5 * GiB  # what a sleeping vLLM keeps: its context and its CUDA graphs
GRAPHS = 1.0 * GiB  # of an awake one, outside the share that it was given
PROCESS = 0.75 * GiB  # a CPU rank before it has a model: torch, verl, transformers
# Of a run on a CPU, proportional set sizes that `benchmarks/memory.py` measured (results/memory_cpu_*.json).
SAMPLER = 0.75 * GiB  # vLLM's worker besides weights and cache: torch, vLLM, what an engine step allocates
OTHERS = 2.55 * GiB  # 36 processes: driver, Ray, task runner, queue, agent loop, grader, vLLM's server and engine core
_BLOCK_COPIES = 6  # fp32 intermediates of a block of rows: softmax, divergence and their gradient
_FORWARD_BLOCKS = 3  # of them without a gradient: logits, probabilities, their product
_FORWARD_COPIES = 3  # of a layer's widest tensors, alive at a time without gradients
_AT_WORK = 2  # layers whose activations are on the device under verl's offload: one computes, one travels
_PREFETCHED = 2  # layers whose weights are gathered at a time


@dataclass(frozen=True)
class Phase:
    """A phase: bytes by use on the device, and those that wait in host memory."""

    name: str
    uses: dict[str, float]
    host: float = 0.0

    @property
    def bytes(self) -> float:
        return sum(self.uses.values())


SERVERS = "teacher servers"


def phases(run: Run) -> list[Phase]:
    """The phases of a step in order; those that a run does not have are left out."""
    found = [generation(run)] if run.device == "cuda" else []
    if run.scores_old:
        found.append(old_log_probs(run))
    if run.passes:
        found.append(teacher_pass(run))
    if run.servers and run.device == "cuda":
        found.append(max((served(run, server) for server in run.servers), key=lambda phase: phase.bytes))
    found.append(update(run))
    if run.device == "cuda":
        found.append(weight_sync(run))
    return found


def machine_uses(run: Run) -> dict[str, float]:
    """Bytes of a whole run on one CPU machine at its worst moment; vLLM does not sleep there.

    What a trainer frees in pieces below 32 MiB, glibc keeps until verl empties the device's cache, behind the update:
    the working tensors are there twice. vLLM's worker has its weights twice, as they came and packed for the
    processor's products, and receives them in a bucket.
    """
    phase = update(run)
    working = phase.bytes - sum(states(run, gradients=True, updating=True)[0].values()) - PROCESS
    sampler = 2 * run.student.parameters * run.vllm_width + run.tp * (run.cpu_cache + SAMPLER + run.bucket)
    found = {"trainer": run.ranks * (phase.bytes + working), "sampler": run.replicas * sampler, "others": OTHERS}
    if run.servers:
        width = run.sharding.compute
        each = [s.replicas * (2 * s.model.parameters * width + run.cpu_cache + SAMPLER) for s in run.servers]
        found["teacher servers"] = sum(each)
    return found


# ---------------------------------------------------------------------- what stays


def states(run: Run, gradients: bool, updating: bool) -> tuple[dict[str, float], float]:
    """Weights, gradients, moments and the teacher's weights, on the device and in the host's memory.

    verl's offload empties the device between updates alone; FSDP2's streams through every pass.
    """
    shards, master = run.sharding.shards, run.sharding.master
    weights = (run.student.parameters + run.adapter) * master / shards
    trained = run.trained * master / shards
    here = {"student weights": weights, "gradients": trained if gradients else 0.0, "AdamW moments": 2 * trained}
    if run.teachers:
        own, parameters = run.teacher_sharding, sum(shape.parameters for shape in run.teachers)
        here["teacher weights"] = parameters * own.master / own.shards
    here["teacher adapters"] = run.held_adapters / shards
    away = []
    if run.sharding.streamed or "weights" in run.sharding.offloaded:
        away.append("teacher adapters")  # where the student's was when they were made
    if run.sharding.streamed:
        away += ["student weights", "gradients", "AdamW moments"]
    elif not updating:
        away += ["student weights"] if "weights" in run.sharding.offloaded else []
        away += ["AdamW moments"] if "optimizer" in run.sharding.offloaded else []
    if run.teachers and (run.teacher_sharding.streamed or "weights" in run.teacher_sharding.offloaded):
        away.append("teacher weights")  # a forward-only engine streams what it is told to offload
    host = sum(here.pop(name) for name in away)
    return {name: size for name, size in here.items() if size}, host


def _process(run: Run, sleeping: bool = True) -> dict[str, float]:
    if run.device == "cpu":
        return {"Python, torch, verl": PROCESS}
    here = {"CUDA context, NCCL": CONTEXT}
    if run.sampler:
        return here
    if sleeping and run.vllm_sleeps:
        here["vLLM asleep"] = ASLEEP
    elif sleeping and run.vllm_share is not None:
        here["vLLM awake"] = run.machine.memory * run.vllm_share + GRAPHS
    return here


def _gathered(run: Run, shape: ModelShape, compute: int, trained: bool) -> float:
    """FSDP2's whole copies: the embedding, layers in flight, and a layer's gradient before it is scattered in fp32."""
    embedding = shape.head * compute
    layer = shape.layer * compute * _PREFETCHED
    gradient = shape.layer * (compute + 4) if trained and not run.adapter else 0
    return embedding + layer + gradient


# ---------------------------------------------------------------------- phases


def generation(run: Run) -> Phase:
    """vLLM has its share, and what the trainer keeps stays beside it, unless their devices differ."""
    here, host = ({}, 0.0) if run.sampler else states(run, gradients=False, updating=False)
    if run.vllm_share is not None:
        here["vLLM: weights, cache"] = run.machine.memory * run.vllm_share
        here["vLLM: CUDA graphs"] = GRAPHS
    return Phase("generation", here | _process(run, sleeping=False), host)


def weight_sync(run: Run) -> Phase:
    """vLLM's weights are back, its cache is not yet; tensors are gathered one by one into two buckets.

    Of two kinds of devices the trainer's, where more is kept.
    """
    here, host = states(run, gradients=False, updating=run.adapter > 0)
    if not run.sampler and (run.vllm_sleeps or run.vllm_share is None):
        here["vLLM: weights"] = run.student.parameters * 2 / run.tp
    here["tensors in transit"] = run.student.head * (run.sharding.master + 2) + 2 * run.bucket
    return Phase("weight sync", here | _process(run), host)


def teacher_pass(run: Run) -> Phase:
    """Trunk alone, packed by the teacher's lengths; rows of the mini-batch gather."""
    scorer = run.scorer or run.student
    sharding = run.teacher_sharding if run.teachers else run.sharding
    here, host = states(run, gradients=False, updating=True)
    here["teacher's rows and head"] = _rows(run) + run.heads * sharding.compute
    here["gathered weights"] = _gathered(run, scorer, sharding.compute, trained=False)
    here["pass without gradients"] = run.teacher_budget * _forward(scorer, sharding.compute)
    if run.teacher_adapters:  # meanwhile the teacher's is in its place
        here["student's adapter"] = run.adapter * run.sharding.master / run.sharding.shards
    return Phase("teacher", here | _process(run), host)


def served(run: Run, server: Served) -> Phase:
    """A device of a teacher's server: what vLLM takes of it, or more if the weights and one request need more."""
    width = run.sharding.compute
    needed = {
        "weights": server.model.parameters * width / server.tp,
        "pass without gradients": max(run.pair, server.call) * _forward(server.model, width) / server.tp,
        "hidden states": server.call * server.model.hidden * width,
    }
    taken = server.share * run.machine.memory - sum(needed.values())
    return Phase(SERVERS, needed | {"CUDA context, NCCL": CONTEXT, "vLLM's cache": max(0.0, taken)}, 0.0)


def old_log_probs(run: Run) -> Phase:
    """The worse of the head's pass in a step with a teacher, and of verl's pass in one without."""
    here, host = states(run, gradients=False, updating=True)
    here["gathered weights"] = _gathered(run, run.student, run.sharding.compute, trained=False)
    heads = [_whole_scores(run)] if run.dense else []
    heads += [{"chunked head": _chunked_scores(run)}] if run.teaches or not run.dense else []
    here |= max(heads, key=lambda head: sum(head.values()))
    return Phase("old log-probs", here | _process(run), host)


def _whole_scores(run: Run) -> dict[str, float]:
    """verl's forward pass with whole logits, of which it always computes the entropy, too.

    Under autocast softmax, logsumexp and the sum read the logits as fp32, and each makes that copy for itself.
    """
    compute = run.sharding.compute
    logits = run.score_budget * run.student.vocabulary
    stored = 4 if run.fp32_head else compute
    copies = 2 if stored == 4 else 3  # probabilities and one exponential; the logits themselves, unless they are fp32
    return {
        "whole logits": logits * stored * run.temperature_copies,
        "their entropy": logits * 4 * copies,
        "projection": run.student.head * compute,
    }


def _chunked_scores(run: Run) -> float:
    """Projection, logits of a chunk of rows, intermediates of a block; of the student alone, without a gradient."""
    compute, shape = run.sharding.compute, run.student
    chunk, block = chunks._rows(run.chunk, shape.vocabulary, run.device)
    width = 4 if run.fp32_head else compute
    wide = shape.head * 4 if width != compute and run.device != "cuda" else 0
    return (
        shape.head * compute + wide + chunk * shape.vocabulary * width + _FORWARD_BLOCKS * block * shape.vocabulary * 4
    )


def update(run: Run) -> Phase:
    """The worst of a step with a teacher and one without."""
    kinds = [True] if run.teaches or not run.dense else []
    kinds += [False] if run.dense else []
    return max((_update(run, taught) for taught in kinds), key=lambda phase: phase.bytes)


def _update(run: Run, taught: bool) -> Phase:
    """Layer inputs of a micro-batch, and then either the head or a layer that is computed anew, whichever is larger."""
    here, host = states(run, gradients=True, updating=True)
    compute, shape = run.sharding.compute, run.student
    if taught and run.teaches:
        here["teacher's rows and head"] = _rows(run) + run.heads * compute
    layer = shape.saved(compute) * run.budget
    use, kept = ("layer inputs", run.budget * shape.hidden * compute) if run.checkpointing else ("activations", layer)
    layers = min(_AT_WORK, shape.layers) if run.offloads else shape.layers
    here[use] = layers * kept
    host += (shape.layers - layers) * kept
    here["gathered weights"] = _gathered(run, shape, compute, trained=True)
    head = _chunked_head(run) if taught else _dense_head(run)
    anew = run.budget * _layer_gradients(shape, compute) + (layer if run.checkpointing else 0)
    name = "one layer's backward" if anew > head else ("chunked head" if taught else "whole logits")
    here[name] = max(anew, head)
    return Phase("update", here | _process(run), host)


def _layer_gradients(shape: ModelShape, compute: int) -> float:
    """Bytes per token of a layer's gradients that are alive at a time: of the MLP's inner tensors, or of attention."""
    return compute * max(3 * shape.inner + 2 * shape.hidden, 2 * (shape.query + 2 * shape.key) + 3 * shape.hidden)


def _forward(shape: ModelShape, compute: int) -> float:
    """Bytes per token of a layer without gradients: its input, and the widest tensors of MLP or attention."""
    widest = max(_FORWARD_COPIES * shape.inner, 2 * (shape.query + 2 * shape.key))
    return compute * (2 * shape.hidden + widest) + 4 * shape.hidden


def _rows(run: Run) -> float:
    """Hidden states of the teacher that predict the responses of a mini-batch, on one rank, which may share them."""
    scorer = run.scorer or run.student
    return run.rank_responses * run.limit * scorer.hidden * run.sharding.compute / run.sequence_parallel


def _chunked_head(run: Run) -> float:
    """Projection and its gradient, whole; logits of a chunk of rows, of both sides; intermediates of a block."""
    compute, shape = run.sharding.compute, run.student
    scorer = run.scorer or shape
    chunk, block = chunks._rows(run.chunk, shape.vocabulary, run.device)
    width = 4 if run.fp32_head else compute
    gradient = 0 if run.adapter else 4 + (compute if width == compute else 0)
    # On CUDA the gradient alone needs fp32 weights, see objective/products.py.
    copied = shape.head + (0 if run.device == "cuda" and compute == 2 else scorer.head)
    wide = copied * 4 if width != compute else 0
    logits = chunk * (shape.vocabulary + scorer.vocabulary) * width
    return shape.head * (compute + gradient) + wide + logits + _BLOCK_COPIES * block * shape.vocabulary * 4


def _dense_head(run: Run) -> float:
    """Whole logits; the loss writes their gradient over them, and a temperature makes one more copy."""
    compute, shape = run.sharding.compute, run.student
    logits = run.budget * shape.vocabulary
    width = 4 if run.fp32_head else compute
    copies = run.temperature_copies + (1 if run.dense_entropy else 0)
    entropy = logits * 4 if run.dense_entropy else 0
    weights = shape.head * (compute + (4 if run.fp32_head else 0))
    gradient = 0 if run.adapter else shape.head * (compute + 4)
    return logits * width * copies + entropy + weights + gradient
