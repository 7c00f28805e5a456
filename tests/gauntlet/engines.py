# SPDX-License-Identifier: Apache-2.0
"""Situations of the engine: real FSDP2, packed, against one sequence at a time in float64."""

import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from opd_ext.objective.objective import Objective
from opd_ext.teacher.kinds import get_teacher
from tests.gauntlet.frozen import FROZEN
from tests.stack.dense_reference import dense_update
from tests.stack.engine_cases import DIVERGENCES, FP32, METHODS, NOTHING, REORDERED, SAMPLES, SOME, distance, identical
from tests.stack.engine_harness import Rank, run_ranks
from tests.stack.engine_inputs import EngineSpec, Update, make_samples, to_batch

LORA_RANK = 4


def agrees(rank: Rank, update: Update) -> dict:
    """What the engine makes of ``update``, which is what the dense reference makes of it."""
    found = rank.gradients(update)
    assert distance(found, dense_update(rank.folder, update)) < FP32
    return found


@contextmanager
def seen(module: torch.nn.Module):
    """The keyword arguments of every forward pass of ``module``."""
    calls: list[dict] = []
    hook = module.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    yield calls
    hook.remove()


def teacher_passes(rank: Rank, update: Update) -> list[dict]:
    with seen(rank.worker(EngineSpec(update.teacher, forward_only=True)).engine.module) as calls:
        agrees(rank, update)
    return calls


def longer_teacher_prompts(rank: Rank) -> None:
    """Prompts of 3 to 6 tokens against 9 to 60: a position that goes on from another sequence would be 60 and more."""
    samples = [
        replace(s, teacher_prompt=[5 + i % 50 for i in range(9 + 7 * n)] + s.prompt) for n, s in enumerate(SAMPLES)
    ]
    calls = teacher_passes(rank, Update(samples, teacher_budget=1000))
    positions = torch.cat([call["position_ids"].flatten() for call in calls])
    lengths = sorted(len(s.teacher_prompt + s.response) for s in samples)
    starts = (positions == 0).nonzero()[:, 0].tolist()
    pieces = torch.tensor_split(positions, starts[1:])
    assert sorted(map(len, pieces)) == lengths
    assert all(torch.equal(piece, torch.arange(len(piece))) for piece in pieces)


def short_beside_long_answers(rank: Rank) -> None:
    """The teacher reads its prompts and the sampled ids and nothing else: there is no pad that could be history."""
    samples = make_samples([18, 3, 33])
    calls = teacher_passes(rank, Update(samples, teacher_budget=1000))
    read = torch.cat([call["input_ids"].flatten() for call in calls]).tolist()
    pieces = [s.teacher_prompt + s.response for s in samples]
    assert len(read) == sum(map(len, pieces))
    for piece in pieces:
        assert any(read[i : i + len(piece)] == piece for i in range(len(read)))


def empty_responses(rank: Rank) -> None:
    assert identical(*(rank.gradients(Update(samples, rows=1)) for samples in (SAMPLES + NOTHING, SAMPLES)))
    nothing = rank.gradients(Update(NOTHING))
    assert nothing["loss"] == 0.0 and all(not grad.any() for grad in nothing["grads"].values())


def moving_average(rank: Rank) -> None:
    rate = get_teacher("ema")(rate=0.05).share(step=7, updates=1)
    moved = rank.refresh("untied", "untied_teacher", rate)
    for name, after in moved["after"].items():
        expected = 0.95 * moved["before"][name].double() + 0.05 * moved["student"][name].double()
        assert torch.allclose(after.double(), expected, rtol=0, atol=1e-6), name


def accumulated_gradients(rank: Rank) -> None:
    for policy in (False, True):
        update = Update(SOME, policy=policy, distillation_weight=0.5, objective=Objective(reduction="token-mean"))
        whole = agrees(rank, replace(update, rows=8))
        for rows in (4, 1):
            parts = rank.gradients(replace(update, rows=rows))
            assert parts["micro_batches"] == 8 // rows and distance(parts, whole) < REORDERED


def columns_of_rollout_log_probs(rank: Rank) -> None:
    """Log-probs of each sequence alone, in float64: paired with the wrong column they would differ by nats."""
    model = AutoModelForCausalLM.from_pretrained(rank.folder / "untied", dtype=torch.float64)
    samples = [replace(s, prompt=[7] * (1 + 6 * n) + s.prompt) for n, s in enumerate(SAMPLES)]
    scored = []
    for sample in samples:
        with torch.no_grad():
            rows = model(torch.tensor([sample.prompt + sample.response])).logits[0, len(sample.prompt) - 1 : -1]
        found = rows.log_softmax(-1).gather(-1, torch.tensor(sample.response)[:, None])[:, 0]
        scored.append(replace(sample, rollout_log_probs=found.tolist()))
    assert rank.gradients(Update(scored))["metrics"]["rollout_gap"] < 1e-5
    turned = [replace(s, rollout_log_probs=s.rollout_log_probs[::-1]) for s in scored]
    assert rank.gradients(Update(turned))["metrics"]["rollout_gap"] > 0.1


def dropout(rank: Rank) -> None:
    """With a share of 0.3 the student's own passes differ; those of the live teacher are equal to the bit."""
    shutil.copytree(rank.folder / "untied", rank.folder / "dropout")
    path = rank.folder / "dropout" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.3}))
    update = Update(SAMPLES, model="dropout", teacher=None)
    assert not identical(rank.gradients(update), rank.gradients(update))
    engine = rank.worker(update.student).engine
    with engine.train_mode():
        outputs = [engine.teacher_output(to_batch(SAMPLES)).rows for _ in range(2)]
        assert engine.module.training
    undisturbed = rank.worker(EngineSpec("untied")).engine
    rank.gradients(Update(SAMPLES, teacher=None))
    with undisturbed.train_mode():
        expected = undisturbed.teacher_output(to_batch(SAMPLES)).rows
    for one, other, right in zip(*outputs, expected, strict=True):
        assert torch.equal(one, other) and torch.equal(one, right)


def wrappers(rank: Rank) -> None:
    """Sharded parameters and an adapter are between the engine and the head it reads; neither is passed by."""
    two_ranks(rank)
    adapter(rank)


def two_ranks(rank: Rank) -> None:
    expected = dense_update(rank.folder, Update(SAMPLES))
    for found in run_ranks(2, rank.folder, _usual):
        assert distance(found, expected) < FP32


def _usual(rank: Rank) -> dict:
    return rank.gradients(Update(SAMPLES))


def adapter(rank: Rank) -> None:
    """An adapter is part of the student's forward pass, and it gets the gradients that the chain rule gives it."""
    engine, merged = _adapted(rank)
    update = Update(SAMPLES, lora_rank=LORA_RANK)
    found, expected = rank.gradients(update), dense_update(rank.folder, Update(SAMPLES, model=merged))
    assert math.isclose(found["loss"], expected["loss"], rel_tol=FP32)
    assert abs(found["loss"] - dense_update(rank.folder, Update(SAMPLES))["loss"]) > 1e-3  # without it
    weights = {name: p.full_tensor().double() for name, p in engine.module.named_parameters() if p.requires_grad}
    assert len(weights) == 2 * 2 * 7  # A and B of seven matrices in two layers
    for name, grad in found["grads"].items():
        whole = expected["grads"][_plain(name)]
        a, b = (weights[name.replace("lora_A", part).replace("lora_B", part)] for part in ("lora_A", "lora_B"))
        right = 2 * (b.T @ whole if "lora_A" in name else whole @ a.T)
        assert (grad - right).abs().max() < 10 * FP32 * right.abs().max(), name


def resumed_adapter(rank: Rank, tmp_path) -> None:
    """What a server gets after a resume is the adapter merged into its base, in the dtype of the wire."""
    engine, merged = _adapted(rank)
    sent = {name: weight.clone() for name, weight in engine.get_per_tensor_param()[0]}
    engine.save_checkpoint(str(tmp_path / "checkpoint"), global_step=1)
    resumed = rank._build_worker(EngineSpec("untied", lora_rank=LORA_RANK)).engine
    resumed.load_checkpoint(str(tmp_path / "checkpoint"))
    expected = AutoModelForCausalLM.from_pretrained(rank.folder / merged, dtype=torch.float32).state_dict()
    initial = AutoModelForCausalLM.from_pretrained(rank.folder / "untied", dtype=torch.float32).state_dict()
    given = dict(resumed.get_per_tensor_param()[0])
    assert given.keys() == expected.keys() == sent.keys()
    assert all(torch.equal(weight, sent[name]) for name, weight in given.items()), "the bits that were sent before"
    moved = 0
    for name, weight in given.items():
        # The wire has bf16: 8 bits.
        assert torch.allclose(weight.float(), expected[name], rtol=2**-7, atol=1e-4), name
        moved += not torch.allclose(weight.float(), initial[name], rtol=2**-7, atol=1e-4)
    assert moved == 2 * 7
    rollouts = []
    for weights in (sent, given, initial):
        server = AutoModelForCausalLM.from_pretrained(rank.folder / "untied", dtype=torch.float32)
        server.load_state_dict({name: weight.float() for name, weight in weights.items()})
        prompt = torch.tensor([SAMPLES[0].prompt])
        rollouts.append(server.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None).tolist())
    assert rollouts[0] == rollouts[1] != rollouts[2], "the first rollout after a resume is that of the adapted model"


def _adapted(rank: Rank):
    """The engine with an adapter that is not zero, and the name of a model into which that adapter is merged."""
    engine = rank.worker(EngineSpec("untied", lora_rank=LORA_RANK)).engine
    model = AutoModelForCausalLM.from_pretrained(rank.folder / "untied", dtype=torch.float32)
    generator, pairs = torch.Generator().manual_seed(0), {}
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if "lora_" not in name:
                continue
            local = parameter.to_local()
            local.copy_(0.1 * torch.randn(local.shape, generator=generator))
            pairs.setdefault(_plain(name), {})["lora_A" in name] = local.clone()
        for name, pair in pairs.items():
            model.get_parameter(name).add_(2.0 * pair[False] @ pair[True])  # alpha is twice the rank
    model.save_pretrained(rank.folder / "merged")
    return engine, "merged"


def _plain(name: str) -> str:
    """The matrix that an adapter's matrix belongs to."""
    whole, _, _ = name.partition(".lora_")
    return whole.removeprefix("base_model.model.") + ".weight"


def frozen_batch(rank: Rank) -> None:
    """Losses and gradients of one batch, and one whole step: what float64 gave without verl, no version may move."""
    updates = {"reverse_kl": Update(SAMPLES)} | {name: Update(SAMPLES, objective=o) for name, o in DIVERGENCES.items()}
    updates |= METHODS
    assert updates.keys() == FROZEN.keys()
    for name, (loss, norm) in FROZEN.items():
        found = rank.gradients(updates[name])
        ours = math.sqrt(sum(grad.double().square().sum().item() for grad in found["grads"].values()))
        assert math.isclose(found["loss"], loss, rel_tol=FP32), f"{name}: {found['loss']}"
        assert math.isclose(ours, norm, rel_tol=FP32), f"{name}: {ours}"
    whole_step(rank)


def whole_step(rank: Rank) -> None:
    """AdamW's first step with the gradient clipped to a norm of 1, as its paper writes it, in float64."""
    update = Update(SAMPLES)
    grads = dense_update(rank.folder, update)["grads"]
    initial = AutoModelForCausalLM.from_pretrained(rank.folder / update.model, dtype=torch.float64).state_dict()
    clip = min(1.0, 1.0 / math.sqrt(sum(grad.square().sum().item() for grad in grads.values())))
    optimiser = rank.worker(update.student).engine.optimizer_config
    assert (optimiser.clip_grad, tuple(optimiser.betas)) == (1.0, (0.9, 0.999))
    for name, after in rank.train(update)["weights"].items():
        grad = clip * grads[name]
        moved = optimiser.lr * (optimiser.weight_decay * initial[name] + grad / (grad.abs() + 1e-8))
        # Of a gradient that is nearly 0 the step is its sign, which rounding may turn.
        sure = grad.abs() > 1e-5
        assert sure.any() and (after.double() - initial[name] + moved).abs()[sure].max() < 1e-5, name
