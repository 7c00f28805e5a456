# SPDX-License-Identifier: Apache-2.0
"""Pre-training of the miniature models: a plain supervised loop, minutes on a few CPU cores.

Sequences are batched by length. Padding stands on the right, where a causal model never looks at it, so
no attention mask is needed and the fast attention kernel applies; the loss covers the replies only.

Two choices make minutes suffice. A first phase of concise textbook chats teaches the arithmetic before
filler dilutes it. And Muon (momentum orthogonalised by Newton-Schulz iterations, Jordan et al. 2024) trains
the matrices of the trunk; embeddings, head and norms have AdamW.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from opd_ext.context import render_text
from opd_ext.progress import Progress
from opd_ext.tinymath.chats import Chat, Corpus, chats, textbook
from opd_ext.tinymath.tokenizer import TURN_START
from opd_ext.tinymath.writing import VERBOSE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM


@dataclass(frozen=True)
class ModelSpec:
    """Size and pre-training of one model.

    ``slip_scale`` multiplies the slip rates of its corpus: the larger model reads more careful authors.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    textbook_chats: int
    chats: int
    slip_scale: float = 1.0
    head_dim: int = 32
    batch_size: int = 16
    muon_rate: float = 0.01
    adam_rate: float = 4e-3
    warmup: float = 0.05
    weight_decay: float = 0.05

    def phases(self) -> tuple[tuple[Corpus, int], ...]:
        """What is read in which order, and how much of it."""
        return (textbook(), self.textbook_chats), (chats(self.slip_scale), self.chats)

    def courses(self) -> tuple[tuple[int, ModelSpec], ...]:
        """How many phases are read in one go, each course with rates that rise and fall, and with which rates."""
        return ((len(self.phases()), self),)


@dataclass(frozen=True)
class DiffusionSpec(ModelSpec):
    """A model that reconstructs hidden tokens; see :mod:`opd_ext.tinymath.diffusion`.

    Its size is that of ``parent``, from whose weights it starts. Its authors write under the student prompt only, at
    every line a filler with probability ``filler``.
    """

    parent: str = "base"
    block_size: int = 8
    filler: float = VERBOSE

    def phases(self) -> tuple[tuple[Corpus, int], ...]:
        concise, habits = (
            Corpus({"student": 1.0}, (), filler, slips)
            for filler, slips in ((textbook().filler, 0.0), (self.filler, self.slip_scale))
        )
        return (concise, self.textbook_chats), (habits, self.chats)


SPECS: dict[str, ModelSpec] = {
    "base": ModelSpec(
        hidden_size=128,
        layers=3,
        heads=4,
        kv_heads=2,
        intermediate_size=256,
        textbook_chats=16_000,
        chats=28_000,
    ),
    "large": ModelSpec(
        hidden_size=192,
        layers=4,
        heads=6,
        kv_heads=2,
        intermediate_size=384,
        textbook_chats=26_000,
        chats=28_000,
        slip_scale=0.2,
    ),
    "diffusion": DiffusionSpec(
        hidden_size=128,
        layers=3,
        heads=4,
        kv_heads=2,
        intermediate_size=256,
        textbook_chats=12_000,
        chats=4_000,
    ),
}


@dataclass
class Example:
    """Token ids of one chat; the reply is ``ids[reply_start:]``, less what tools said in it (``said``: start, end)."""

    ids: list[int]
    reply_start: int
    said: tuple[tuple[int, int], ...] = ()


def make_model(spec: ModelSpec, tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A freshly initialised fp32 Qwen3 model over the tokenizer's vocabulary."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=spec.hidden_size,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            intermediate_size=spec.intermediate_size,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    # Unfiltered sampling by default: every consumer of the checkpoint then sees the same distribution.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def render_requests(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """User messages as text, through the chat template, up to where the assistant begins."""
    return [render_text(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]


def make_corpus(
    tokenizer: PreTrainedTokenizerFast, spec: ModelSpec, seed: int, held_out: set[str]
) -> list[list[Example]]:
    """The two phases of the corpus, tokenised; questions in ``held_out`` never occur in it."""
    rng = random.Random(seed)
    return [
        _tokenise(tokenizer, [corpus.chat(rng, q, d) for d, q in _questions(rng, corpus, count, held_out)])
        for corpus, count in spec.phases()
    ]


def _questions(rng: random.Random, corpus: Corpus, count: int, held_out: set[str]) -> Iterator[tuple[int, str]]:
    for index in range(count):
        difficulty, question = corpus.question(rng, index)
        while question in held_out:
            difficulty, question = corpus.question(rng, index)
        yield difficulty, question


def _tokenise(tokenizer: PreTrainedTokenizerFast, drawn: list[Chat]) -> list[Example]:
    shown = tokenizer(render_requests(tokenizer, [chat.prompt for chat in drawn])).input_ids
    replies = tokenizer([chat.response + tokenizer.eos_token for chat in drawn]).input_ids
    start, end = tokenizer.convert_tokens_to_ids(TURN_START), tokenizer.eos_token_id
    return [Example(p + r, len(p), _said(p + r, len(p), start, end)) for p, r in zip(shown, replies, strict=True)]


def _said(ids: list[int], reply_start: int, turn_start: int, turn_end: int) -> tuple[tuple[int, int], ...]:
    """Stretches of a reply of several turns that are not the assistant's: from the end of a turn, which is, to behind
    the opening of the assistant's next (its mark, the role, a line break)."""
    found, begins = [], None
    for i in range(reply_start, len(ids)):
        if begins is None and i and ids[i - 1] == turn_end and i > reply_start:
            begins, turns = i, 0
        if begins is not None and ids[i] == turn_start:
            turns += 1
            if turns == 2:  # the tool's, and the assistant's
                found.append((begins, i + 3))
                begins = None
    return tuple(found)


def batches(examples: list[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """One pass in random order, each batch holding sequences of similar length."""
    rng = random.Random(seed)
    order = rng.sample(examples, len(examples))
    window = 32 * batch_size
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda example: len(example.ids))
        chunks = [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
        yield from rng.sample(chunks, len(chunks))


def collate(batch: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ``ids [B, T]`` (int64) and the mask of the reply's own tokens ``[B, T]`` (bool)."""
    width = max(len(example.ids) for example in batch)
    ids = torch.full((len(batch), width), pad)
    reply = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        reply[row, example.reply_start : len(example.ids)] = True
        for start, end in example.said:
            reply[row, start:end] = False
    return ids, reply


def reply_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, reply: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the reply tokens; the head runs on their rows only. Scalar."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    rows = hidden[:, :-1][reply[:, 1:]]
    return torch.nn.functional.cross_entropy(model.lm_head(rows), ids[:, 1:][reply[:, 1:]])


# The mean loss of a batch, a scalar that has a gradient.
Objective = Callable[["Qwen3ForCausalLM", list[Example]], torch.Tensor]


def next_token(model: Qwen3ForCausalLM, batch: list[Example]) -> torch.Tensor:
    """The objective of autoregressive models."""
    return reply_loss(model, *collate(batch, model.config.pad_token_id))


def make_optimizers(model: Qwen3ForCausalLM, spec: ModelSpec) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for everything else."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=spec.muon_rate, weight_decay=spec.weight_decay),
        torch.optim.AdamW(others, lr=spec.adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def pretrain(
    model: Qwen3ForCausalLM,
    corpus: list[list[Example]],
    spec: ModelSpec,
    seed: int,
    progress: bool,
    name: str,
    objective: Objective = next_token,
) -> int:
    """Train ``model`` in place, one pass over each phase of ``corpus``; returns the number of tokens seen."""
    todo = [batch for phase in corpus for batch in batches(phase, spec.batch_size, seed)]
    optimizers = make_optimizers(model, spec)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / len(todo), spec.warmup))
        for optimizer in optimizers
    ]
    tokens = sum(len(example.ids) for batch in todo for example in batch)
    model.train()
    with Progress(f"pre-training {name}", tokens, "tokens", shown=progress) as bar:
        for batch in todo:
            loss = objective(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad()
            bar.update(advance=sum(len(example.ids) for example in batch), note=f"loss {loss.item():.3f}")
    model.eval()
    return tokens


def _rate(done: float, warmup: float) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak; ``done`` is the fraction of steps taken."""
    if done < warmup:
        return max(done, 1e-3) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
