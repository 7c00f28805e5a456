# SPDX-License-Identifier: Apache-2.0
"""How responses are drawn, and by which engines."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Decoding:
    """How responses are drawn; nothing is left to a model's own generation defaults."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = -1  # -1: all
    top_p: float = 1.0  # 1: all

    def __str__(self) -> str:
        return f"{self.temperature:g} / {self.top_k if self.top_k > 0 else '-'} / {self.top_p:g}"


@dataclass
class SamplingConfig(Decoding):
    """A pass over prompts."""

    n: int = 1  # responses per prompt
    max_tokens: int = 1024  # of a response


@dataclass
class VLLMConfig:
    """The engines that sample. Only ``dtype``, ``shard`` and what ``args`` changes about numbers can change samples."""

    replicas: int = 1  # engines that share the requests
    tensor_parallel_size: int = 1  # devices of each engine
    dtype: str = "bfloat16"  # of weights and activations
    max_model_len: int = 4096  # tokens of prompt + response
    shard: int = 512  # requests that are generated together and stored together: what an interruption can cost
    args: dict[str, Any] = field(default_factory=dict)  # any further argument of vllm.LLM
