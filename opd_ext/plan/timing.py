# SPDX-License-Identifier: Apache-2.0
"""Seconds of each phase of a step and of a validation, from bytes moved and products computed (a roofline)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd_ext.plan import lengths
from opd_ext.plan.disk import checkpoint_bytes
from opd_ext.plan.lengths import Server
from opd_ext.plan.run import Run, Validation
from opd_ext.plan.shapes import ModelShape

# Orders of magnitude for what is neither bytes nor products.
_FP32_SHARE = 0.75  # of the peak that fp32 products reach
_DRIVER_S, _DRIVER_TOKENS_S = 3.0, 0.45e6  # the one trainer process: bookkeeping, and rows that it decodes
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
    assumed, compute = run.assumed, run.sharding.compute
    peak = run.machine.half if compute == 2 else run.machine.single
    forward, train = (peak * share for share in (assumed.mfu_forward, assumed.mfu_train))
    # Logits are multiplied as bf16 on CUDA, an fp32 head's too; its gradients are fp32 (objective/products.py).
    head = run.machine.single * _FP32_SHARE if run.fp32_head else train
    logits = forward if run.device == "cuda" or not run.fp32_head else head
    found = {"generation": lengths.generation_s(server(run), drawn, run.replicas, assumed.mean_prompt)}
    sequences, rows = drawn + assumed.mean_prompt, float(drawn.sum())
    if run.scores_old:
        work = _trunk(run.student, sequences, 1) / forward
        found["old log-probs"] = (work + _head(run.student, rows, 1) / logits) / run.ranks
    if run.teaches and run.scorer is not None:
        work = _trunk(run.scorer, drawn + run.teacher_prompt, 1) + _head(run.scorer, rows, 1)
        found["teacher"] = work / forward / run.ranks
    # A layer is computed forwards once, twice with checkpointing, and backwards twice, or once where weights are fixed.
    passes = (2 if run.checkpointing else 1) + (1 if run.adapter else 2)
    products = 4 if run.teaches else 3
    projected = _head(run.student, rows, products - 2) / (logits if run.fp32_head else train)
    projected += _head(run.student, rows, 2) / head
    computed = (_trunk(run.student, sequences, passes) / train + projected) / run.ranks
    found["update"] = max(computed, _moved_s(run, float(sequences.sum())))
    found["weight sync"] = _SYNC_S + run.student.parameters * 2 / (assumed.sync_gb_s * 1e9)
    found["driver"] = _DRIVER_S + rows / _DRIVER_TOKENS_S
    return found


def server(run: Run) -> Server:
    """A vLLM replica of the student."""
    shape = run.student
    share = run.machine.memory * (run.vllm_share if run.vllm_share is not None else 0.5)
    active = shape.parameters if shape.active + 2 * shape.head >= shape.parameters else shape.active + shape.head
    return Server(
        weights=2.0 * shape.parameters,
        active=2.0 * active,
        flops=2.0 * active,
        cache=shape.cache,
        layers=shape.layers,
        tp=run.tp,
        share=share,
        bandwidth=run.machine.bandwidth * run.assumed.bandwidth_share,
        peak=run.machine.half,
        allreduce_s=run.assumed.allreduce_us * 1e-6,
        sequences=run.vllm_sequences,
        reserve=lengths.ACTIVATIONS if run.device == "cuda" else 0.0,
    )


def validation_s(run: Run, sets: Sequence[Validation]) -> float:
    """Seconds of one validation of these sets, all at once, shuffled over the replicas."""
    if not sets:
        return 0.0
    drawn = [lengths.draw(s.samples, s.mean, run.val_limit, run.assumed.length_spread, 0) for s in sets]
    mixed = np.concatenate(drawn)
    np.random.default_rng(1).shuffle(mixed)
    return lengths.generation_s(server(run), mixed, run.replicas, run.assumed.mean_prompt)


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
