# SPDX-License-Identifier: Apache-2.0
"""Situations of a model's architecture: heads, layers with a state, forwards that choose no rows, ends of a turn."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from opd_ext.bridge import selftest
from opd_ext.bridge.rollouts import read_rows
from opd_ext.context.sequence import render, render_teacher
from opd_ext.tokens.ends import stop_ids
from tests.gauntlet.engines import agrees
from tests.gauntlet.rollouts import put_rollouts
from tests.stack.dense_reference import dense_update
from tests.stack.engine_cases import FP32, REORDERED, SAMPLES, distance
from tests.stack.engine_harness import Rank
from tests.stack.engine_inputs import VOCABULARY, EngineSpec, Update
from tests.unit.teacher.conftest import CHATML

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


def save(rank: Rank, name: str, model: torch.nn.Module) -> str:
    model.save_pretrained(rank.folder / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(rank.folder / "untied" / file, rank.folder / name / file)
    return name


def unequal_heads(rank: Rank) -> None:
    """Whoever's head is taller, the rows beyond the other's are padding: cut, the loss is float64's."""
    agrees(rank, Update(SAMPLES, teacher="wide"))
    tall = rank.gradients(Update(SAMPLES, model="wide", teacher="untied"))
    model = AutoModelForCausalLM.from_pretrained(rank.folder / "wide", dtype=torch.float32)
    model.resize_token_embeddings(VOCABULARY)
    expected = dense_update(rank.folder, Update(SAMPLES, model=save(rank, "cut", model), teacher="untied"))
    embedding = tall["grads"]["model.embed_tokens.weight"]  # of the head too, which is tied to it
    assert not embedding[VOCABULARY:].any()
    tall["grads"]["model.embed_tokens.weight"] = embedding[:VOCABULARY]
    assert distance(tall, expected) < FP32


def first_token(rank: Rank) -> None:
    """What the first token of a response adds to the loss has a number of its own; an ending takes its cause away."""
    found = rank.gradients(Update(SAMPLES))["metrics"]
    firsts = [replace(s, mask=[m * (i == 0) for i, m in enumerate(s.mask)]) for s in SAMPLES]
    alone = dense_update(rank.folder, Update(firsts))["metrics"]["divergence"]
    assert abs(found["divergence_token0"] / alone - 1) < FP32 and found["divergence_token0"] != found["divergence"]
    tokenizer = AutoTokenizer.from_pretrained(rank.folder / "base")
    tokenizer.chat_template = CHATML
    chat, student = [{"role": "user", "content": "1+1?"}], {"enable_thinking": False}
    for ending, alike in ((None, False), ("student", True)):
        shown = render_teacher(tokenizer, chat, student, {"enable_thinking": True}, ending)
        assert (shown == render(tokenizer, chat, student)) == alike


def layers_with_a_state(rank: Rank) -> None:
    """A short convolution reads what lies before it: in a pack the neighbour, so such models get no neighbours."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(3)
    layers = {"layer_types": ["conv", "full_attention"]}
    name = save(rank, "lfm2", Lfm2ForCausalLM(Lfm2Config(**SHAPE | layers)))
    update = Update(SAMPLES, model=name, teacher=None, budget=1000, teacher_budget=1000)
    packed = rank.gradients(update)
    assert abs(packed["loss"] / plain_loss(rank.folder / name, AutoModelForCausalLM) - 1) < FP32
    assert distance(packed, rank.gradients(replace(update, rows=1))) < REORDERED
    engine = rank.worker(update.student).engine
    engine.alone = False
    try:
        assert abs(rank.gradients(update)["loss"] / packed["loss"] - 1) > 1e-2  # what a neighbour would do
    finally:
        engine.alone = True


def rows_that_the_forward_does_not_choose(rank: Rank) -> None:
    """Of a model for text and images, used for text, the rows in front of the head are chosen here."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(4)
    text = SHAPE | {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    name = save(rank, "qwen3_vl", Qwen3VLForConditionalGeneration(config))
    found = rank.gradients(Update(SAMPLES, model=name, teacher=None))
    assert abs(found["loss"] / plain_loss(rank.folder / name, AutoModelForImageTextToText) - 1) < FP32


def plain_loss(folder: Path, kind: type) -> float:
    """Mean reverse KL per trained token of a model and itself behind the teacher's prompts, one sequence at a time."""
    model = kind.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    total = tokens = 0.0
    for sample in SAMPLES:
        with torch.no_grad():
            z, w = (
                model(torch.tensor([prompt + sample.response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                for prompt in (sample.prompt, sample.teacher_prompt)
            )
        mask = torch.tensor(sample.mask, dtype=torch.float64)
        total += (mask * (z.exp() * (z - w)).sum(-1)).sum().item()
        tokens += mask.sum().item()
    return total / tokens


def several_ends_of_a_turn(config, queue, monkeypatch, world) -> None:
    """A response that ends with the second of two ends is finished, although it used all of its tokens."""

    def two_ends(folder: Path) -> None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [370, 371]}))

    folder = str(world.model(two_ends))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 370
    batch = put_rollouts(config, queue, monkeypatch, tokenizer, end=371)
    for stops, truncated in ((stop_ids(folder, tokenizer), [False] * 4), ([370], [True] * 4)):
        assert [row["truncated"] for row in read_rows(batch, tokenizer, 1, stops)] == truncated


def self_test(rank: Rank) -> None:
    """Engines that agree are measured as such; a sampler with other weights is told, and a model that bends its logits
    behind its head ends the run.
    """
    rank.gradients(Update(SAMPLES, teacher="untied"))
    engine = rank.worker(EngineSpec("untied")).engine
    known = {"ends": {"tokenizer": [2], "teacher": [2]}, "equal_weights": True, "untaught": ""}

    def verdict(sampler: str) -> tuple[dict, list[str], str | None]:
        probes = [
            selftest.Probe(s.prompt, s.response, s.mask, scores(rank.folder / sampler, s), s.teacher_prompt)
            for s in SAMPLES[:2]
        ]
        found = selftest.examine(engine, probes)
        return found, *selftest.report(found | known)[1:]

    found, notes, fault = verdict("untied")
    assert found["head"] < 1e-4 and found["packing"] < 1e-4 and abs(found["equal_input"]) < 1e-5
    assert found["sampler"] < 1e-4 and found["teacher_input"] > 0.1 and (notes, fault) == ([], None)
    _, notes, fault = verdict("untied_teacher")  # a replica that never got the student's weights
    assert fault is None and "The sampler's log-probs differ from the trainer's" in notes[0]
    bend = engine.module.register_forward_hook(soft_cap)
    try:
        assert "changes logits after the head" in verdict("untied")[2]
    finally:
        bend.remove()


def soft_cap(module, inputs, output):
    """What Gemma 2 does to its logits."""
    output.logits = 2.0 * torch.tanh(output.logits / 2.0)
    return output


def scores(folder: Path, sample) -> list[float]:
    """Log-probs of a response in float64, as a sampler of these weights would have given them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    ids = torch.tensor([sample.prompt + sample.response])
    with torch.no_grad():
        rows = model(ids).logits[0, len(sample.prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(-1, ids[0, len(sample.prompt) :, None])[:, 0].tolist()
