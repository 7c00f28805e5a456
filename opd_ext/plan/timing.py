# SPDX-License-Identifier: Apache-2.0
"""Seconds of each phase of a step and of a validation, from bytes moved and products computed (a roofline)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd_ext.config.assumptions import Assumptions
from opd_ext.plan import lengths
from opd_ext.plan.disk import checkpoint_bytes
from opd_ext.plan.lengths import Server
from opd_ext.plan.machines import Machine
from opd_ext.plan.run import Run
from opd_ext.plan.shapes import ModelShape
from opd_ext.plan.teachers import Served
from opd_ext.plan.validation import Validation

# Orders of magnitude for what is neither bytes nor products.
_FP32_SHARE = 0.75  # of the peak that fp32 products reach
# The one trainer process: bookkeeping, and rollouts that it reads, decodes and keeps; the latter measured on 2026-11-27
# by `benchmarks/driver.py --model SMOLLM2`, Xeon at 2.5 GHz. Two thirds of it are ids and log-probs as compressed JSON.
_DRIVER_S, _DRIVER_TOKENS_S = 3.0, 0.46e6
_SYNC_S = 1.0  # sleep and wake of vLLM


@dataclass(frozen=True)
class Times:
    """Seconds per phase of a step, of a full validation, of all those in between, of a checkpoint; tokens of a step."""

    phases: dict[str, float]
    tokens: float
    validation: float
    meanwhile: float
    checkpoint: float
    run: Run

    @property
    def step(self) -> float:
        return sum(self.phases.values())

    @property
    def validating(self) -> float:
        return self.run.validations * self.validation + self.meanwhile

    @property
    def total(self) -> float:
        return self.run.steps * self.step + self.validating + self.run.saves * self.checkpoint


def times(run: Run) -> Times:
    """The mean over a few draws of response lengths, which every variant of a run sees alike."""
    found: list[dict[str, float]] = []
    tokens = 0.0
    for seed in range(lengths.DRAWS):
        drawn = lengths.draw(run.responses, run.mean, run.limit, run.assumed.length_spread, seed)
        found.append(_step(run, drawn))
        tokens += float(drawn.sum()) / lengths.DRAWS
    phases = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
    written = sum(checkpoint_bytes(run).values()) / (run.assumed.disk_gb_s * 1e9)
    meanwhile = sum(count * validation_s(run, sets) for count, sets in run.meanwhile)
    full = validation_s(run, run.validation) if run.validations else 0.0
    return Times(phases, tokens, full, meanwhile, written, run)


def _step(run: Run, drawn: np.ndarray) -> dict[str, float]:
    assumed, (forward, _, logits, _) = run.assumed, _rates(run)
    found = {"generation": lengths.generation_s(server(run), drawn, run.replicas, run.mean_prompt)}
    sequences, rows = drawn + run.mean_prompt, float(drawn.sum())
    if run.scores_old:
        work = _trunk(run.student, sequences, 1) / forward
        found["old log-probs"] = (work + _head(run.student, rows, 1) / logits) / run.ranks
    if run.passes:
        work = 0.0
        for i, (scorer, prompt) in enumerate(run.passes):  # a share of the rows each
            share = drawn[i :: len(run.passes)]
            pairs = np.minimum(share + prompt, run.pair)
            work += _trunk(scorer, pairs, 1) + _head(scorer, float(share.sum()), 1)
        found["teacher"] = work / forward / run.ranks
    if run.servers:  # of which each works by itself
        found["teacher servers"] = max(_served_s(run, each, drawn, forward) for each in run.servers)
    found["update"] = update_s(run, drawn)
    sent = run.student.parameters * 2 / (assumed.sync_gb_s * 1e9)
    found["weight sync"] = sent + (_SYNC_S if run.vllm_sleeps else 0.0)
    found["driver"] = _DRIVER_S + rows / _DRIVER_TOKENS_S
    return found


def _served_s(run: Run, served: Served, drawn: np.ndarray, forward: float) -> float:
    """Seconds of a teacher's servers in a step: its passes, their answers on the wire, and weights that have moved."""
    share = drawn[: round(served.part * len(drawn))]
    computed = _trunk(served.model, np.minimum(share + served.prompt, run.pair), 1) / forward / served.devices
    width, wire = run.sharding.compute, run.assumed.sync_gb_s * 1e9
    answered = float(share.sum()) * served.model.hidden * width / wire / served.replicas
    return computed + answered + served.moves * served.model.parameters * width / wire


def _rates(run: Run) -> tuple[float, float, float, float]:
    """FLOP/s of a pass without gradients, of an update, of the head's logits and of its gradients."""
    peak = run.machine.half if run.sharding.compute == 2 else run.machine.single
    forward, train = (peak * share for share in (run.assumed.mfu_forward, run.assumed.mfu_train))
    # Logits are multiplied as bf16 on CUDA, an fp32 head's too; its gradients are fp32 (objective/products.py).
    head = run.machine.single * _FP32_SHARE if run.fp32_head else train
    return forward, train, forward if run.device == "cuda" or not run.fp32_head else head, head


def update_s(run: Run, drawn: np.ndarray) -> float:
    """Seconds of the updates on responses of ``drawn`` tokens."""
    _, train, logits, head = _rates(run)
    sequences, rows = drawn + run.mean_prompt, float(drawn.sum())
    # A layer is computed forwards once, twice with checkpointing, and backwards twice, or once where weights are fixed.
    passes = (2 if run.checkpointing else 1) + (1 if run.adapter else 2)
    products = 4 if run.teaches else 3
    projected = _head(run.student, rows, products - 2) / (logits if run.fp32_head else train)
    projected += _head(run.student, rows, 2) / head
    computed = (_trunk(run.student, sequences, passes) / train + projected) / run.ranks
    return max(computed, _moved_s(run, float(sequences.sum())))


def server(run: Run) -> Server:
    """A vLLM replica of the student."""
    share = run.machine.memory * (run.vllm_share if run.vllm_share is not None else 0.5)
    return replica(run.student, run.machine, run.assumed, run.tp, share, run.vllm_sequences, run.vllm_width)


def replica(
    shape: ModelShape, machine: Machine, assumed: Assumptions, tp: int, share: float, sequences: int, width: int
) -> Server:
    """A vLLM replica of ``tp`` devices, on each of which it takes ``share`` bytes; ``width`` is of its dtype."""
    active = shape.parameters if shape.active + 2 * shape.head >= shape.parameters else shape.active + shape.head
    return Server(
        weights=float(width * shape.parameters),
        active=float(width * active),
        flops=2.0 * active,
        cache=shape.cache * width / 2,
        layers=shape.layers,
        tp=tp,
        share=share,
        bandwidth=machine.bandwidth * assumed.bandwidth_share,
        peak=machine.half if width == 2 else machine.single,
        allreduce_s=assumed.allreduce_us * 1e-6,
        sequences=sequences,
        reserve=0.0 if machine.is_cpu else lengths.ACTIVATIONS,
    )


def validation_s(run: Run, sets: Sequence[Validation]) -> float:
    """Seconds of one validation of these sets, all at once, shuffled over the replicas."""
    if not sets:
        return 0.0
    drawn = [lengths.draw(s.samples, s.mean, run.val_limit, run.assumed.length_spread, 0) for s in sets]
    mixed = np.concatenate(drawn)
    np.random.default_rng(1).shuffle(mixed)
    return lengths.generation_s(server(run), mixed, run.replicas, run.mean_prompt)


def pass_s(
    shape: ModelShape, machine: Machine, assumed: Assumptions, lengths: np.ndarray, rows: float, width: int
) -> float:
    """Seconds of one pass without gradients through one device.

    Args:
        lengths: of the sequences, tokens.
        rows: tokens whose logits are computed.
        width: bytes of an element that it computes in.
    """
    peak = machine.half if width == 2 else machine.single
    return (_trunk(shape, lengths, 1) + _head(shape, rows, 1)) / (peak * assumed.mfu_forward)


def _trunk(shape: ModelShape, sequences: np.ndarray, passes: int) -> float:
    """FLOP of the layers; attention is quadratic, and its backward pass counts two and a half."""
    linear = 2.0 * shape.active * float(sequences.sum())
    attention = 4.0 * shape.layers * shape.query * float((sequences.astype(float) ** 2 / 2).sum())
    return passes * (linear + attention * (1.1 if passes > 1 else 1.0))


def _head(shape: ModelShape, rows: float, products: int) -> float:
    return products * 2.0 * shape.head * rows


def _moved_s(run: Run, tokens: float) -> float:
    """Seconds that FSDP needs for weights and gradients, which overlap with computing: the longer of both counts."""
    if run.sharding.shards == 1:
        return 0.0
    within = run.sharding.shards <= run.gpus_per_node
    rate = run.machine.link if within else run.machine.network
    micro_batches = run.updates * -(-tokens / run.ranks / run.updates // run.budget)
    gathers = 2 * run.sharding.compute + (0 if run.adapter else 4)  # twice the weights, once gradients in fp32
    return micro_batches * gathers * run.student.parameters / rate
