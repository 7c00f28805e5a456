# SPDX-License-Identifier: Apache-2.0
"""Which tokens end a response: the same answer for sampling, training, metrics and annotators."""

from typing import Any

from transformers import AutoConfig, GenerationConfig

from opd_ext.errors import ConfigError


def stop_ids(model: str, tokenizer: Any) -> list[int]:
    """Tokens that end a response: the tokenizer's end and what the model's generation config adds to it.

    Args:
        model: folder or hub id.
        tokenizer: the model's.

    Raises:
        ConfigError: nobody names one.
    """
    named = named_ends(model, tokenizer)
    found = {*named["tokenizer"], *named["generation_config"]}
    if not found:
        raise ConfigError(f"{model} names no token that ends a response; set eos_token_id in its generation config.")
    return sorted(found)


def named_ends(model: str, tokenizer: Any = None) -> dict[str, list[int]]:
    """The ids that ``tokenizer`` (if given), ``config`` and ``generation_config`` of a model name as ends."""
    found = {} if tokenizer is None else {"tokenizer": _ids(tokenizer.eos_token_id)}
    for name, kind in (("config", AutoConfig), ("generation_config", GenerationConfig)):
        try:
            content = kind.from_pretrained(model)
        except (OSError, ValueError):  # a checkpoint without it, or one that is elsewhere
            found[name] = []
            continue
        text = content.get_text_config() if name == "config" else content
        found[name] = _ids(getattr(text, "eos_token_id", None))
    return found


def _ids(given: int | list[int] | None) -> list[int]:
    return [given] if isinstance(given, int) else list(given or ())
