# SPDX-License-Identifier: Apache-2.0
"""The model that verl's engine will build of a config, built once without memory: what a worker would find out late."""

import json
from pathlib import Path
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


def projection(path: str) -> torch.Tensor:
    """The vocabulary projection [V, H] of a model in a folder or on the hub, in its file's dtype, alone.

    Raises:
        ValueError: its files have no such weight.
    """
    from safetensors import safe_open
    from transformers import AutoConfig
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    module = _build(AutoConfig.from_pretrained(path), "eager")
    wanted = {id(module.get_output_embeddings().weight)}
    if module.config.get_text_config().tie_word_embeddings:
        wanted.add(id(module.get_input_embeddings().weight))
    names = [name for name, weight in module.named_parameters(remove_duplicate=False) if id(weight) in wanted]
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files = json.loads(Path(index).read_text())["weight_map"] if index else {}
    for name in names:
        file = cached_file(path, files.get(name, SAFE_WEIGHTS_NAME), _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        with safe_open(file, "pt") as content:
            if name in content.keys():
                return content.get_tensor(name)
    raise ValueError(f"The files of {path} have none of {', '.join(names)} in safetensors' format.")
