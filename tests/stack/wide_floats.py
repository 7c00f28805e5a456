# SPDX-License-Identifier: Apache-2.0
"""Engines in float64, so that two orders of the same sum differ by 1e-16 of it and what is left is a fault.

Weights, passes, gradients and what travels between ranks take the dtype of the configuration, in FSDP2, in verl and in
ours. Two places know no float64; they learn it here, in the process that asks for it. Autocast is of half precision
alone and leaves float64 as it is, with a warning.
"""

import torch


def allow_float64() -> None:
    """Let an engine's configuration say ``fp64``, and let Qwen3's norm compute in the dtype of its input.

    * verl's ``PrecisionType`` knows the names of fp32, bf16 and fp16 alone.
    * transformers' norm computes in float32 whatever comes in. A sum that another order of adding up has moved by
      1e-16 may round to the next float32 there, which is 1e-7 off: as rare as it is large.

    float32 stay what depends on no sum: cosines and sines of positions, log-probs and advantages in the batch, counts.
    """
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from verl.utils.torch_dtypes import PrecisionType

    known = PrecisionType.to_dtype
    PrecisionType.to_dtype = staticmethod(lambda name: torch.float64 if name in WIDE else known(name))
    Qwen3RMSNorm.forward = _norm


WIDE = ("fp64", torch.float64)


def _norm(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """As transformers has it, without the two casts."""
    return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
