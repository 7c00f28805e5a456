# SPDX-License-Identifier: Apache-2.0
"""A bidirectional model of the miniature world: it reconstructs hidden tokens, block by block.

It comes about as LLaDA-2.0 does (arXiv 2512.15745): an autoregressive model, here ``base``, gets one more token, the
mask, and goes on training with another objective. Within a block of a reply every token then sees every other; of what
came before it sees the clean text. The parent shares its tokenizer, as T3S asks of a model that selects tokens for it.

A reply is filled with end tokens to the end of its block and these are hidden and learned like any other (LLaDA fills
its whole canvas so), because a decoder fills whole blocks and must find out by itself where a reply ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from opd_ext.diffusion.denoise import Denoising, denoise
from opd_ext.diffusion.masking import attention_argument, block_diffusion_mask, corrupt, fill_length
from opd_ext.tinymath.pretrain import DiffusionSpec, Example, render_requests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

MASK = "<|mask|>"


def add_mask_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """Give ``tokenizer`` the mask token, one id beyond all others, which keep theirs."""
    tokenizer.add_special_tokens({"mask_token": MASK})


def to_diffusion(model: Qwen3ForCausalLM, spec: DiffusionSpec, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Give an autoregressive ``model`` a row for the mask token, and a config that says how it reads from now on."""
    torch.manual_seed(seed)  # the new row is drawn
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.mask_token_id = tokenizer.mask_token_id
    model.config.diffusion_attention = "block"
    model.config.diffusion_block_size = spec.block_size


def collate_blocks(batch: list[Example], end: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``ids`` [B, T] (int64), filled with ``end`` to whole blocks, and the mask of reply tokens [B, T] (bool).

    A reply reaches to the end of its own block; what lies beyond in the batch is seen by no earlier block.
    """
    ends = [len(example.ids) + fill_length(len(example.ids), block_size) for example in batch]
    ids = torch.full((len(batch), max(ends)), end)
    reply = torch.zeros(len(batch), max(ends), dtype=torch.bool)
    for row, (example, stop) in enumerate(zip(batch, ends, strict=True)):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        reply[row, example.reply_start : stop] = True
    return ids, reply


class HiddenReplies:
    """The pre-training objective: cross entropy of reply tokens that were hidden at random.

    The ratio of hidden tokens is drawn from U(0, 1) per block (BD3-LM, arXiv 2503.09573), spread evenly over a batch,
    which takes most of the noise out of a small one (MDLM, arXiv 2406.07524). Plain mean over the hidden tokens, as in
    LLaDA-2.0's fine-tuning.
    """

    def __init__(self, spec: DiffusionSpec, seed: int):
        self._block_size = spec.block_size
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: Qwen3ForCausalLM, batch: list[Example]) -> torch.Tensor:
        ids, reply = collate_blocks(batch, model.config.eos_token_id, self._block_size)
        hidden = self.draw(reply)
        return hidden_loss(model, ids, reply, hidden)

    def draw(self, reply: torch.Tensor) -> torch.Tensor:
        """Which reply tokens are hidden, [B, T] bool."""
        blocks = (len(reply), reply.shape[1] // self._block_size)
        shifts = torch.rand(blocks[1], generator=self._generator)
        order = torch.rand(blocks, generator=self._generator).argsort(0)
        ratio = (shifts + order / len(reply)) % 1
        uniform = torch.rand(reply.shape, generator=self._generator)
        return (uniform < ratio.repeat_interleave(self._block_size, 1)) & reply


def hidden_loss(model: Qwen3ForCausalLM, ids: torch.Tensor, reply: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the ``hidden`` tokens; the head runs on their rows only. Scalar.

    Args:
        ids: [B, T] int64, T whole blocks.
        reply: [B, T] bool.
        hidden: [B, T] bool, within ``reply`` and not empty.
    """
    logits = hidden_logits(model, ids, reply, hidden)
    return torch.nn.functional.cross_entropy(logits, ids[hidden])


def hidden_logits(
    model: Qwen3ForCausalLM, ids: torch.Tensor, reply: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Logits [N, V] of the N hidden tokens; the arguments are those of :func:`hidden_loss`.

    Of the noised copy only the blocks with reply tokens are computed, of the clean one not the last: nobody sees more.
    """
    (rows, width), size = ids.shape, model.config.diffusion_block_size
    first = int(reply.int().argmax(1).min()) // size * size
    kept = torch.cat([torch.arange(first, width), torch.arange(width, 2 * width - size)])
    visible = block_diffusion_mask([width], "block", size)[kept][:, kept]
    noised = corrupt(ids, hidden, model.config.mask_token_id)
    states = model.model(
        input_ids=torch.cat([noised, ids], 1)[:, kept],
        attention_mask=attention_argument(visible, model.config._attn_implementation, torch.float32),
        position_ids=(kept % width).expand(rows, -1),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(states[:, : width - first][hidden[:, first:]])


def sample_denoised(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], max_tokens: int
) -> list[list[int]]:
    """One response per user message at temperature 0: token ids, with the end of turn where it was reached."""
    decoding = Denoising(
        mask_token_id=model.config.mask_token_id,
        stop_ids=(tokenizer.eos_token_id,),
        max_tokens=max_tokens,
        attention=model.config.diffusion_attention,
        block_size=model.config.diffusion_block_size,
    )
    shown = tokenizer(render_requests(tokenizer, prompts)).input_ids
    return [response.ids for response in denoise(model, shown, decoding)]
