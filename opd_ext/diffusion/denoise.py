# SPDX-License-Identifier: Apache-2.0
"""Generation with a masked-diffusion model, which vLLM does not do.

Blocks are filled from left to right; within a block the most confident positions are decided first, many at a time
where the model is sure (LLaDA-2.0, arXiv 2512.15745, section on inference). Rows join and leave a batch on their own:
what is computed for a row depends on the row alone, up to the rounding of batched kernels.

There is no cache: every step reads the sequence up to its current block again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from opd_ext.diffusion.masking import ATTENTIONS, attention_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Generation(NamedTuple):
    """A response: its token ids, the end token included, and ``stop`` or ``length`` as vLLM names the reasons."""

    ids: list[int]
    finish_reason: str


@dataclass(frozen=True)
class Denoising:
    """How to denoise; the defaults are LLaDA-2.0's.

    Attributes:
        mask_token_id: what stands for a token that is not decided yet.
        stop_ids: tokens that end a response.
        max_tokens: tokens of a response.
        attention: ``block`` or ``full``, as the model was trained, see
            :func:`~opd_ext.diffusion.masking.block_diffusion_mask`.
        block_size: tokens of a block, counted from the beginning of the prompt.
        threshold: every position is decided whose token has a higher probability, and at least the best one.
        temperature: 0 takes the most probable token; otherwise tokens are drawn, and their probability under this
            temperature is what is compared.

    Raises:
        ValueError: a value is out of its range.
    """

    mask_token_id: int
    stop_ids: Collection[int]
    max_tokens: int
    attention: str = "block"
    block_size: int = 32
    threshold: float = 0.95
    temperature: float = 0.0

    def __post_init__(self):
        if self.attention not in ATTENTIONS:
            raise ValueError(f"The attention is {self.attention!r}: choose one of {', '.join(ATTENTIONS)}.")
        for name in ("max_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: choose a positive number of tokens.")
        if self.temperature < 0:
            raise ValueError(f"The temperature is {self.temperature}: choose 0 or a positive number.")


@torch.inference_mode()
def denoise(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Denoising,
    generators: Sequence[torch.Generator] | None = None,
    batch_size: int = 32,
    finished: Callable[[int, Generation], None] = lambda index, generation: None,
) -> list[Generation]:
    """One response per prompt.

    Args:
        model: a decoder of transformers, loaded with ``sdpa`` or ``eager`` attention.
        prompts: token ids, none empty.
        decoding: how.
        generators: one CPU generator per prompt; needed at a positive temperature only.
        batch_size: prompts that are worked on at the same time.
        finished: called with the index of a prompt and its response as soon as that is complete.

    Returns:
        The responses in the order of ``prompts``.

    Raises:
        ValueError: a positive temperature without a generator for every prompt, an empty prompt, or a model whose
            attention takes no mask.
    """
    if decoding.temperature > 0 and (generators is None or len(generators) != len(prompts)):
        raise ValueError("Sampling at a positive temperature needs one generator per prompt.")
    if not all(map(len, prompts)):
        raise ValueError("A prompt is empty: give at least one token.")
    # Neighbours in length share a batch, which keeps the padding short.
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    done: dict[int, Generation] = {}
    active: list[_Row] = []
    while waiting or active:
        while waiting and len(active) < batch_size:
            index = waiting.pop()
            active.append(_Row(index, prompts[index], decoding, generators[index] if generators else None))
        for row, logits in zip(active, _block_logits(model, active, decoding), strict=True):
            row.decide(logits)
        for row in [row for row in active if row.response is not None]:
            active.remove(row)
            done[row.index] = row.response
            finished(row.index, row.response)
    return [done[index] for index in range(len(prompts))]


def _block_logits(model: PreTrainedModel, rows: list[_Row], decoding: Denoising) -> list[Tensor]:
    """One pass over the windows of all rows, padded on the right: float32 logits [open positions, V] of each row."""
    ends = torch.tensor([row.end for row in rows])
    width = int(ends.max())
    ids = torch.full((len(rows), width), decoding.mask_token_id)
    for row, line in zip(rows, ids, strict=True):
        line[: row.end] = row.ids[: row.end]
    position = torch.arange(width)
    visible = (position < ends[:, None])[:, None].expand(-1, width, -1)
    if decoding.attention == "block":
        block = position // decoding.block_size
        visible = visible & (block[:, None] >= block)
    visible = visible | torch.eye(width, dtype=torch.bool)  # an attention over nothing would be NaN
    hidden = model.get_decoder()(
        input_ids=ids.to(model.device),
        attention_mask=attention_argument(
            visible.to(model.device), model.config._attn_implementation, model.get_input_embeddings().weight.dtype
        ),
        position_ids=position.expand(len(rows), -1).to(model.device),
        use_cache=False,
    )[0]
    wanted = [row.open_positions() for row in rows]
    # The head runs on undecided positions only: the vocabulary is the largest axis of all.
    picked = torch.cat([line[positions.to(line.device)] for line, positions in zip(hidden, wanted, strict=True)])
    logits = model.get_output_embeddings()(picked).float().cpu()
    logits[:, decoding.mask_token_id] = -torch.inf  # deciding for "undecided" would never end
    return list(logits.split([len(positions) for positions in wanted]))


class _Row:
    """One prompt and what is decided of its response; blocks are counted from the beginning of the prompt."""

    def __init__(self, index: int, prompt: Sequence[int], decoding: Denoising, generator: torch.Generator | None):
        self.index, self.decoding, self.generator = index, decoding, generator
        self.start, self.limit = len(prompt), len(prompt) + decoding.max_tokens
        # With `block` the last block is whole, as in training; with `full` the canvas is what was asked for.
        whole = -(-self.limit // decoding.block_size) * decoding.block_size
        canvas = whole if decoding.attention == "block" else self.limit
        self.ids = torch.full((canvas,), decoding.mask_token_id)
        self.ids[: self.start] = torch.tensor(list(prompt))
        self.open = torch.arange(canvas) >= self.start
        self.block = self.start // decoding.block_size
        self.response: Generation | None = None

    @property
    def end(self) -> int:
        """How much of the row is looked at: up to the current block, or everything."""
        return self._block_end() if self.decoding.attention == "block" else len(self.ids)

    def _block_end(self) -> int:
        return min((self.block + 1) * self.decoding.block_size, len(self.ids))

    def open_positions(self) -> Tensor:
        """Undecided positions of the current block, [K] int64, K > 0."""
        first = self.block * self.decoding.block_size
        return first + self.open[first : self._block_end()].nonzero().flatten()

    def decide(self, logits: Tensor) -> None:
        """Fill in what the model is sure of.

        Args:
            logits: [K, V] of the open positions.
        """
        positions = self.open_positions()
        tokens, confidence = self._choose(logits)
        sure = confidence > self.decoding.threshold
        sure[confidence.argmax()] = True
        self.ids[positions[sure]] = tokens[sure]
        self.open[positions[sure]] = False
        self._end_if_complete()
        while self.response is None and not len(self.open_positions()):
            self.block += 1

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A token per open position and its probability, [K] each."""
        temperature = self.decoding.temperature
        if temperature == 0:
            confidence, tokens = logits.softmax(-1).max(-1)
            return tokens, confidence
        probabilities = (logits.double() / temperature).softmax(-1)
        cumulative = probabilities.cumsum(-1)
        uniform = torch.rand(len(logits), 1, generator=self.generator, dtype=torch.float64)
        tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        return tokens.squeeze(-1), probabilities.gather(-1, tokens).squeeze(-1)

    def _end_if_complete(self) -> None:
        """Decided tokens never change, so a response is complete once nothing before its first end token is open."""
        still_open = self.open[self.start : self.limit].nonzero()
        decided = int(still_open[0]) if len(still_open) else self.limit - self.start
        ids = self.ids[self.start : self.start + decided].tolist()
        stops = [place for place, token in enumerate(ids) if token in self.decoding.stop_ids]
        if stops:
            self.response = Generation(ids[: stops[0] + 1], "stop")
        elif not len(still_open):
            self.response = Generation(ids, "length")
