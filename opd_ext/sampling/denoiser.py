# SPDX-License-Identifier: Apache-2.0
"""A masked-diffusion model working through shards: ``python -m opd_ext.sampling.denoiser SPEC REPLICA REPLICAS``.

What :mod:`~opd_ext.bridge.sampler` is for vLLM, for models that vLLM cannot run.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from opd_ext.diffusion.denoise import Denoising, Generation, denoise
from opd_ext.sampling.jobs import Job, sample_seed
from opd_ext.sampling.worker import Response, SamplingRequest, work


@dataclasses.dataclass
class Reading:
    """How a masked-diffusion model reads and is read; the fields that are None are in its own config."""

    mask_token_id: int | None
    attention: str | None
    block_size: int | None

    @classmethod
    def of(cls, config: Any, mask_token_id: int | None, attention: str | None, block_size: int | None) -> "Reading":
        """What is given, and for the rest what the model's ``config`` says.

        Raises:
            ValueError: neither names it.
        """
        found = cls(
            mask_token_id if mask_token_id is not None else getattr(config, "mask_token_id", None),
            attention or getattr(config, "diffusion_attention", None),
            block_size or getattr(config, "diffusion_block_size", None),
        )
        for name, value in dataclasses.asdict(found).items():
            if value is None and not (name == "block_size" and found.attention == "full"):
                raise ValueError(f"The diffusion model's config does not say its {name}; set diffusion.{name}.")
        return found

    @property
    def overrides(self) -> dict[str, Any]:
        """For verl's ``model.override_config``, where the training engine looks."""
        settings = {
            "mask_token_id": self.mask_token_id,
            "diffusion_attention": self.attention,
            "diffusion_block_size": self.block_size,
        }
        return {name: value for name, value in settings.items() if value is not None}


class Denoiser:
    """A model of transformers."""

    def __init__(self, model: str, settings: dict[str, Any]):
        self._settings, self._model = settings, None
        disable_progress_bar()

    def load(self, model: str) -> None:
        """Take the weights of a checkpoint."""
        if model == self._model:
            return
        device = self._settings["device"]
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._network = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="sdpa", trust_remote_code=self._settings["trust_remote_code"]
        )
        self._network.to(device).eval()
        self._model = model

    def generate(self, job: Job, requests: list[SamplingRequest], report: Callable[[int, int], None]) -> list[Response]:
        """See :class:`opd_ext.sampling.worker.Generator`; top-k and top-p have no meaning here."""
        decoding = Denoising(
            stop_ids=job.stop_ids,
            max_tokens=job.max_tokens,
            temperature=job.temperature,
            threshold=self._settings["threshold"],
            mask_token_id=self._settings["mask_token_id"],
            attention=self._settings["attention"],
            block_size=self._settings["block_size"] or 1,
        )
        generators = [torch.Generator().manual_seed(sample_seed(job.seed, uid, n)) for uid, n, _ in requests]
        done = tokens = 0

        def finished(index: int, generation: Generation) -> None:
            nonlocal done, tokens
            done, tokens = done + 1, tokens + len(generation.ids)
            report(done, tokens)

        size = self._settings["batch_size"]
        prompts = [ids for _, _, ids in requests]
        return [
            (found.ids, found.finish_reason)
            for found in denoise(self._network, prompts, decoding, generators, size, finished)
        ]


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Denoiser)
