# SPDX-License-Identifier: Apache-2.0
"""The model that verl's engine will build of a config, built once without memory: what a worker would find out late."""

from typing import Any

import torch
from verl.utils.model import get_hf_auto_model_class


def fault(config: Any, attention: str) -> str | None:
    """Why the engine cannot train this architecture, in words that go on from its name; None: nothing is known.

    Args:
        config: of transformers; one whose code comes with its folder is not looked at.
        attention: ``attn_implementation`` of the run.
    """
    if getattr(config, "auto_map", None):
        return None
    if not config.architectures:
        return "names no architectures in its config.json, by which verl chooses the class"
    try:
        module = _build(config, attention)
    except ValueError as error:
        if "does not support" not in str(error):
            return None
        return (
            f"has no {attention} in transformers: set actor_rollout_ref.model.override_config.attn_implementation=eager"
        )
    except Exception:  # what lacks a library or a device here may build on the node
        return None
    head = getattr(module, "get_output_embeddings", lambda: None)()
    if head is None:
        return f"is {config.architectures[0]}, which verl builds without an lm_head, as {type(module).__name__}"
    if getattr(head, "bias", None) is not None:
        return "has a bias in its lm_head, which the chunked head does not add"
    layers = getattr(module, "_no_split_modules", None) or ()
    if not any(type(part).__name__ in layers for part in module.modules()):
        return "names no layers that FSDP could wrap"
    return None


def _build(config: Any, attention: str) -> torch.nn.Module:
    """verl's choice of a class, on the meta device."""
    kind = get_hf_auto_model_class(config)
    with torch.device("meta"):
        try:
            module: torch.nn.Module = kind.from_config(config, attn_implementation=attention)
        except ImportError:  # flash-attn is on the node alone; what it would find is not known, the rest is
            module = kind.from_config(config, attn_implementation="eager")
    return module
