# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning data that is token ids from the start: no chat template, no tokenizer, nothing to disagree about."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from opd_ext.diffusion.masking import fill_length, training_mask
from opd_ext.tokens.tables import FLAGS, TRAINING, TableError, aligned, check_keys, read_table


@dataclasses.dataclass(frozen=True)
class Corruption:
    """How a masked-diffusion model sees a response: see :func:`opd_ext.diffusion.masking.training_mask`.

    A finished response is filled with ``end`` tokens, trained like any other, up to where a decoder would fill: to the
    end of its block, or, for a model that sees everything (``block_size`` None), to ``canvas`` response tokens.
    """

    low: float
    high: float
    seed: int
    end: int
    block_size: int | None
    canvas: int

    def fill(self, prompt: int, response: int) -> int:
        """Number of end tokens behind a finished response."""
        if self.block_size is None:
            return max(0, self.canvas - response)
        return fill_length(prompt + response, self.block_size)


class TokenDataset(Dataset):
    """Rows of a sample table as verl's SFT trainer takes them.

    Each item holds, per token of prompt and response, ``input_ids`` and ``position_ids`` (int64), ``loss_mask`` (what
    is trained) and ``response_mask`` (what could be), both int64 0/1. The end of a response is trained where the model
    ended it; one that ran into the length limit gets no end put behind it. What is longer than ``max_length`` loses
    its tail, end included, and is counted in ``cut``. ``keys`` has the content key of every row.

    Args:
        path: a table of :data:`~opd_ext.tokens.tables.TRAINING`.
        max_length: tokens of prompt and response together.
        stop_ids: tokens that end a response.
        flags: a table of :data:`~opd_ext.tokens.tables.FLAGS`. For the next token: which response tokens are
            trained. Under a ``corruption``: which are always masked.
        corruption: for masked-diffusion models; the trained tokens are then those that were masked.

    Raises:
        TableError: a row's ids are not those that its key, or its flags, were made for; a response that is said to be
            finished does not end with a stop token; or nothing of a response fits.
    """

    def __init__(
        self,
        path: Path,
        max_length: int,
        stop_ids: Sequence[int],
        flags: Path | None = None,
        corruption: Corruption | None = None,
    ):
        rows = read_table(path, TRAINING)
        check_keys(rows, path)
        self.keys = list(rows["key"])
        self._prompts = [np.asarray(ids) for ids in rows["prompt_ids"]]
        self._responses = [np.asarray(ids) for ids in rows["response_ids"]]
        self._flags = aligned(rows, read_table(flags, FLAGS), "flags", flags) if flags else None
        self._max_length, self._corruption, self._epoch = max_length, corruption, 0
        for key, prompt, response, reason in zip(
            self.keys, self._prompts, self._responses, rows["finish_reason"], strict=True
        ):
            if reason == "stop" and (not len(response) or response[-1] not in stop_ids):
                raise TableError(f"{path}: row {key[:12]} is finished but does not end with one of {list(stop_ids)}.")
            if not len(prompt) or len(prompt) >= max_length:
                raise TableError(
                    f"{path}: the prompt of row {key[:12]} has {len(prompt)} tokens, max_length is {max_length}; "
                    "raise train.max_length or drop the row."
                )
        if corruption is not None:
            self._fill(rows["finish_reason"])
        self.cut = sum(len(p) + len(r) > max_length for p, r in zip(self._prompts, self._responses, strict=True))

    def _fill(self, reasons: Sequence[str]) -> None:
        for index, reason in enumerate(reasons):
            missing = self._corruption.fill(len(self._prompts[index]), len(self._responses[index]))
            if reason == "stop" and missing:
                ends = np.full(missing, self._corruption.end, dtype=self._responses[index].dtype)
                self._responses[index] = np.concatenate([self._responses[index], ends])
                if self._flags is not None:
                    self._flags[index] = np.concatenate([self._flags[index], np.zeros(missing, dtype=bool)])

    def __len__(self) -> int:
        return len(self.keys)

    def set_epoch(self, epoch: int) -> None:
        """Draw other corruptions than in the epoch before."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        prompt, response = self._prompts[index], self._responses[index]
        ids = torch.from_numpy(np.concatenate([prompt, response])[: self._max_length]).long()
        is_response = torch.arange(len(ids)) >= len(prompt)
        flags = is_response
        if self._flags is not None:
            flags = torch.cat([torch.zeros(len(prompt), dtype=torch.bool), torch.from_numpy(self._flags[index])])
            flags = flags[: self._max_length]
        trained = is_response & flags
        if self._corruption is not None:
            chosen, c = flags if self._flags is not None else None, self._corruption
            trained = training_mask(self.keys[index], is_response, chosen, c.low, c.high, c.seed, self._epoch)
        return {
            "input_ids": ids,
            "position_ids": torch.arange(len(ids)),
            "loss_mask": trained.long(),
            "response_mask": is_response.long(),
        }
