# SPDX-License-Identifier: Apache-2.0
"""Masked-diffusion language models: which positions are hidden, what may look at what, and the loss.

A response is corrupted by replacing a random share of its tokens with the mask token; the model sees the rest from
both sides and reconstructs what is hidden (LLaDA, arXiv 2502.09992). T3S enlarges the random mask by a fixed set of
selected positions, so that these are always reconstructed (arXiv 2601.10348).

Every random draw is a function of a row's content, a seed and the epoch. A resumed run, another number of ranks or
another order of rows therefore sees the same corruption.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

ATTENTIONS = ("full", "block")
WEIGHTINGS = ("mean", "inverse_ratio")

# ---------------------------------------------------------------------- corruption


def row_generator(key: str, seed: int, epoch: int = 0) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments; ``key`` identifies the content of a row."""
    digest = hashlib.sha256(f"{seed}\n{epoch}\n{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw_mask(uniform: Tensor, ratio: float) -> Tensor:
    """Positions to hide, bool like ``uniform``, whose entries are draws from [0, 1): those below ``ratio``."""
    return uniform < ratio


def union_mask(drawn: Tensor, selected: Tensor) -> Tensor:
    """Positions hidden at random or always (bool, any one shape): M' of T3S for masked-diffusion models."""
    return drawn.bool() | selected.bool()


def effective_ratio(mask: Tensor, response_mask: Tensor) -> Tensor:
    """Share of response positions that are hidden, float32 [...], from two masks [..., T]; 0 without a response.

    Of a union with the drawn ratio r and |U| selected among T tokens, its expectation is r + (1 - r) |U| / T.
    """
    response = response_mask.bool()
    return (mask.bool() & response).sum(-1) / response.sum(-1).clamp(min=1)


def corrupt(ids: Tensor, mask: Tensor, mask_token_id: int) -> Tensor:
    """``ids`` (int64) with ``mask_token_id`` wherever ``mask`` (bool, same shape) is set."""
    return ids.masked_fill(mask.bool(), mask_token_id)


def training_mask(
    key: str, response_mask: Tensor, selected: Tensor | None, low: float, high: float, seed: int, epoch: int
) -> Tensor:
    """The positions of one row that are hidden and trained in one epoch.

    The row's mask ratio is drawn from U(low, high): (0.3, 0.8) in LLaDA-2.0's fine-tuning recipe, (0, 1) in LLaDA's.

    Args:
        key: identifies the content of the row.
        response_mask: [L] bool, false on the prompt, which is never hidden.
        selected: [L] bool, positions that are always hidden (those on the prompt are ignored); None: none.
        low: smallest mask ratio, in [0, high].
        high: largest mask ratio, in [low, 1].
        seed: of all rows.
        epoch: of all rows; another epoch hides other positions.

    Returns:
        [L] bool. Possibly empty where ``low`` is small.

    Raises:
        ValueError: the bounds are not ordered within [0, 1], or the masks differ in length.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"The mask ratio is drawn between {low} and {high}: choose 0 <= low <= high <= 1.")
    if selected is not None and selected.shape != response_mask.shape:
        raise ValueError(
            f"The selected positions cover {len(selected)} tokens and the row has {len(response_mask)}: "
            "select them on the very token ids that are trained."
        )
    response = response_mask.bool()
    generator = row_generator(key, seed, epoch)
    ratio, *_ = (low + (high - low) * torch.rand(1, generator=generator, dtype=torch.float64)).tolist()
    # One draw per response token, so that a longer prompt in front leaves the corruption as it was.
    uniform = torch.rand(int(response.sum()), generator=generator, dtype=torch.float64)
    mask = torch.zeros(response.shape, dtype=torch.bool)
    mask[response] = draw_mask(uniform, ratio)
    return mask if selected is None else union_mask(mask, selected.bool() & response)


def fill_length(length: int, block_size: int) -> int:
    """How many end tokens bring a sequence of ``length`` tokens to the end of its block.

    A decoder always denoises whole blocks. Trained on a last block that stops with the response, a model could read
    the length of the response off the number of mask tokens, which generation does not tell it.
    """
    return -length % block_size


# ---------------------------------------------------------------------- attention


def block_diffusion_mask(
    lengths: Sequence[int], attention: str, block_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Who sees whom in a packed row of sequences; no sequence ever sees another.

    * ``full``: sequences of L tokens as they are, every token sees every token of its sequence (LLaDA).
    * ``block``: sequences of 2 L tokens, L noised and then the same L clean, both with positions 0 to L - 1, in blocks
      of ``block_size`` counted from position 0. A noised block sees itself and the clean blocks before it; a clean
      block sees the clean blocks up to itself (BD3-LM, arXiv 2503.09573, section 3.2; LLaDA-2.0, arXiv 2512.15745).

    Args:
        lengths: L of each sequence, in tokens.

    Returns:
        bool [N, N] (query, key), N the sum of all L (``full``) or 2 L (``block``).

    Raises:
        ValueError: ``attention`` is neither, or ``block_size`` is not positive.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"diffusion_attention is {attention!r}: choose one of {', '.join(ATTENTIONS)}.")
    if block_size < 1:
        raise ValueError(f"diffusion_block_size is {block_size}: choose a positive number of tokens.")
    sizes = torch.tensor(lengths, device=device)
    copies = 2 if attention == "block" else 1
    sequence = torch.arange(len(sizes), device=device).repeat_interleave(copies * sizes)
    same = sequence[:, None] == sequence
    if attention == "full":
        return same
    ends = (2 * sizes).cumsum(0)
    offset = torch.arange(len(sequence), device=device) - (ends - 2 * sizes)[sequence]
    clean = offset >= sizes[sequence]
    block = (offset - clean * sizes[sequence]) // block_size
    query_block, key_block, noised_query = block[:, None], block[None], ~clean[:, None]
    own = noised_query & ~clean & (query_block == key_block)
    context = clean & torch.where(noised_query, key_block < query_block, key_block <= query_block)
    return same & (own | context)


def attention_argument(visible: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """``visible`` as the decoders of transformers take it: added to the attention scores as it is.

    A boolean mask would do for ``sdpa`` alone, and not for every architecture that comes with its own code.

    Args:
        visible: bool [B, Q, K] or [Q, K], (query, key); every query sees something.
        implementation: the model's ``config._attn_implementation``.
        dtype: of the attention scores.

    Returns:
        [B or 1, 1, Q, K]: 0 where something is visible, elsewhere the lowest number of ``dtype``.

    Raises:
        ValueError: the implementation takes no such mask, for example because it only knows causal attention.
    """
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"Masked-diffusion models need an attention that takes a mask, and {implementation!r} does not: "
            "set attn_implementation to sdpa."
        )
    visible = visible.reshape(-1, 1, *visible.shape[-2:])
    scores = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return scores.masked_fill_(~visible, torch.finfo(dtype).min)


# ---------------------------------------------------------------------- loss


def token_weights(mask: Tensor, lengths: Sequence[int], weighting: str = "mean", ratio: Tensor | None = None) -> Tensor:
    """Weight of every token's -log p before the global normalisation.

    * ``mean``: 1 on hidden tokens; divided by their number in the global batch, the mean over the union.
    * ``inverse_ratio``: 1 / (T_i ratio_i) on the hidden tokens of sequence i; divided by the number of sequences in the
      global batch, the bound of LLaDA (arXiv 2502.09992, eq. 5).

    Args:
        mask: [N] bool, hidden and trained positions of packed sequences.
        lengths: T_i of each sequence, in tokens; they sum to N.
        ratio: [B], the ratio to divide by. None: what the mask came to, T_i ratio_i being then the number of hidden
            tokens. The *drawn* ratio over-weights a sequence whose mask was enlarged by selected positions, and needs
            ``lengths`` that count response tokens only.

    Returns:
        [N] float32; all 0 in a sequence without a hidden token.

    Raises:
        ValueError: the weighting is unknown.
    """
    weight = mask.float()
    if weighting == "mean":
        return weight
    if weighting != "inverse_ratio":
        raise ValueError(f"The weighting of hidden tokens is {weighting!r}: choose one of {', '.join(WEIGHTINGS)}.")
    sizes = torch.tensor(lengths, device=mask.device)
    sequence = torch.arange(len(sizes), device=mask.device).repeat_interleave(sizes)
    hidden = weight.new_zeros(len(sizes)).index_add_(0, sequence, weight) if ratio is None else sizes * ratio
    return weight / hidden.clamp(min=torch.finfo(torch.float32).tiny)[sequence]
