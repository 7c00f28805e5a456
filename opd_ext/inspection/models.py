# SPDX-License-Identifier: Apache-2.0
"""A model of this process, without Ray, FSDP or vLLM: hidden states in front of the vocabulary projection."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opd_ext.config.architecture import check_architecture
from opd_ext.errors import ConfigError, present
from opd_ext.teacher.kinds import TeacherOutput

TOKENS = 8192  # of a padded batch, at most, unless one sequence is longer

Sequences = Sequence[tuple[Sequence[int] | None, int]]
"""Per rollout the ids of prompt and response, and the length of the response; None where there is no teacher."""


class LocalModel:
    """A causal language model that answers as the trainer's engines do (:class:`opd_ext.teacher.kinds.Engine`).

    Args:
        mixture: folders or hub ids of models of one architecture, each with its share of the weights.
        device: ``cpu`` or ``cuda``; on a CPU it computes in float32.
        initial: the model that it was before its adapter, where a teacher asks for it.
    """

    def __init__(
        self,
        mixture: Mapping[str, float],
        device: str,
        initial: "LocalModel | None" = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.device, self.initial = device, initial
        self.model = _mixed(mixture, device, trust_remote_code)
        lm_head = self.model.get_output_embeddings()
        if getattr(lm_head, "bias", None) is not None:
            raise ConfigError(f"{next(iter(mixture))} has an lm_head with a bias, which the loss does not support.")
        self.head: Float[Tensor, "V H"] = lm_head.weight.detach()
        lm_head.forward = lambda hidden: hidden  # the projection is the objective's business

    @torch.no_grad()
    def response_rows(self, sequences: Sequences) -> list[Float[Tensor, "_R H"]]:
        """Per rollout the hidden states that predict its response tokens; without a sequence, no row."""
        empty = self.head.new_zeros(0, self.head.shape[1])
        found = [empty] * len(sequences)
        for places in _batches([0 if ids is None else len(ids) for ids, _ in sequences]):
            rows = [torch.tensor(sequences[place][0]) for place in places]
            ids = pad_sequence(rows, batch_first=True).to(self.device)
            # Padding lies behind, where no token of a causal model sees it.
            mask = torch.arange(ids.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]
            hidden = self.model(input_ids=ids, attention_mask=mask.to(self.device), use_cache=False).logits
            for place, row, states in zip(places, rows, hidden, strict=True):
                length = sequences[place][1]
                found[place] = states[len(row) - length - 1 : len(row) - 1].clone()
        return found

    def teacher_output(self, data: Sequences, adapter: bool = True) -> TeacherOutput:
        """Its output on the teacher's sequences; without its ``adapter`` it is the initial model."""
        if not adapter:
            return present(self.initial, "This teacher is the initial model, which was not given.").teacher_output(data)
        return TeacherOutput(self.response_rows(data), self.head)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Places of sequences of similar length, as many as :data:`TOKENS` hold when padded; none of length 0."""
    batches: list[list[int]] = []
    for place in sorted((i for i, length in enumerate(lengths) if length), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[place] <= TOKENS:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def _mixed(mixture: Mapping[str, float], device: str, trust_remote_code: bool) -> Any:
    """One model, or a weighted mean of several."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = None
    for path, share in mixture.items():
        local = str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path
        try:
            check_architecture(AutoConfig.from_pretrained(local, trust_remote_code=trust_remote_code), path)
            options = {"dtype": torch.float32 if len(mixture) > 1 else dtype, "trust_remote_code": trust_remote_code}
            each = AutoModelForCausalLM.from_pretrained(local, **options)
        except (OSError, ValueError) as error:
            raise ConfigError(f"The model {path} cannot be loaded: {str(error).split(chr(10))[0]}") from None
        with torch.no_grad():
            if model is None:
                model = each
                for tensor in model.parameters():
                    tensor.mul_(share)
            else:
                for mine, other in zip(model.parameters(), each.parameters(), strict=True):
                    mine.add_(other, alpha=share)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
