# SPDX-License-Identifier: Apache-2.0
"""Which rows of a forward pass predict the response tokens.

Row i of the logits predicts token i + 1, so response token j (from 0) of a sequence whose prompt has n tokens
is predicted by row n + j - 1. Student and teacher read different prompts before the same response; gathered
with these rows, both sides come out in the same order.
"""

from __future__ import annotations

import torch
from jaxtyping import Int, Int64
from torch import Tensor


def response_rows(prompt_len: int, response_len: int) -> Int64[Tensor, " {response_len}"]:
    """Rows of one unpadded or right-padded sequence that predict its response tokens.

    Raises:
        ValueError: for an empty prompt, which leaves nothing to predict the first token from.
    """
    if prompt_len < 1 or response_len < 0:
        raise ValueError(
            "A sequence needs a prompt of at least one token and a response of at least zero; got "
            f"{prompt_len} and {response_len}."
        )
    return torch.arange(prompt_len - 1, prompt_len + response_len - 1)


def packed_response_rows(
    cu_seqlens: Int[Tensor, " _bounds"], prompt_lens: Int[Tensor, " _B"], response_lens: Int[Tensor, " _B"]
) -> Int64[Tensor, " R"]:
    """The same rows for sequences laid end to end without padding, sample by sample.

    Args:
        cu_seqlens: start of each sequence and the total length [B + 1].
        prompt_lens, response_lens: token counts. Call it once with the student's and once with
            the teacher's ``cu_seqlens`` and ``prompt_lens``, and with the *same* ``response_lens``.

    Returns:
        Row indices, R = sum(response_lens), on the device of ``cu_seqlens``.

    Raises:
        ValueError: naming the first sample whose packed length is not prompt + response, as after one-sided
            truncation. Equal totals would not reveal it: rows would shift from one sample into the next.
    """
    device = cu_seqlens.device
    prompt_lens, response_lens = prompt_lens.to(device), response_lens.to(device)
    packed_lens = cu_seqlens.diff()
    if not packed_lens.shape == prompt_lens.shape == response_lens.shape:
        raise ValueError(
            f"cu_seqlens describes {len(packed_lens)} sequences but there are {len(prompt_lens)} prompt and "
            f"{len(response_lens)} response lengths."
        )
    bad = ((packed_lens != prompt_lens + response_lens) | (prompt_lens < 1)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"Sample {i} has {int(packed_lens[i])} packed tokens but prompt {int(prompt_lens[i])} + response "
            f"{int(response_lens[i])}; both sides must hold the whole response, "
            "after a prompt of at least one token."
        )
    first = cu_seqlens[:-1] + prompt_lens - 1
    offset = torch.cumsum(response_lens, dim=0) - response_lens
    total = int(response_lens.sum())
    within = torch.arange(total, device=device) - offset.repeat_interleave(response_lens, output_size=total)
    return first.repeat_interleave(response_lens, output_size=total).long() + within
