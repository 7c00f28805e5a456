# SPDX-License-Identifier: Apache-2.0
"""Ranks that share a sequence (Ulysses): what must agree with what, and which models' sequences can be shared."""

from typing import Any

from omegaconf import DictConfig

from opd_ext.config.architecture import stateful_layer
from opd_ext.config.schema import OPDConfig
from opd_ext.config.teachers import model_weights
from opd_ext.errors import ConfigError

KEY = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
# Families whose attention is not told the positions of its tokens, by which ranks know where a sequence begins, or is
# not taken from transformers' interface; measured in tests/unit/bridge/test_ulysses.py.
_UNTOLD = ("diffllama", "gpt_bigcode", "llama4_text", "ministral3", "nemotron", "persimmon")
_SHARED_LAYERS = {"full_attention", "sliding_attention"}


def sequence_parallel(section: DictConfig) -> int:
    """Ranks that share a sequence (Ulysses), of ``actor_rollout_ref.actor`` or ``.ref``; verl takes either key."""
    return max(section.ulysses_sequence_parallel_size, section.fsdp_config.ulysses_sequence_parallel_size)


def check_sequence_parallel(opd: OPDConfig, config: DictConfig, ranks: int) -> None:
    """Sizes divide the ``ranks`` that train, student and teacher share alike, by an attention that can.

    Raises:
        ConfigError: one sentence.
    """
    ref = config.actor_rollout_ref
    sizes = {part: sequence_parallel(ref[part]) for part in ("actor", "ref")}
    for part, size in sizes.items():
        if size < 1 or ranks % size:
            raise ConfigError(
                f"actor_rollout_ref.{part}.ulysses_sequence_parallel_size={size} must divide the {ranks} ranks that "
                "train: choose a divisor, 1 for none."
            )
    if model_weights(opd, config) and sizes["actor"] != sizes["ref"]:
        raise ConfigError(
            f"actor_rollout_ref.ref.ulysses_sequence_parallel_size={sizes['ref']} must be {KEY}={sizes['actor']}: the "
            "same ranks share the student's sequences and the teacher's; set the latter only."
        )
    name = str((ref.model.override_config or {}).get("attn_implementation", "flash_attention_2"))
    if max(sizes.values()) > 1 and not (name.startswith("flash_attention") or name == "sdpa"):
        raise ConfigError(
            f"actor_rollout_ref.model.override_config.attn_implementation={name} cannot be shared by ranks: set "
            f"flash_attention_2 or sdpa, or {KEY}=1."
        )


def check_shared(config: Any, name: str, ranks: int) -> None:
    """Refuse a model whose sequences ``ranks`` cannot share.

    Args:
        config: of transformers.
        name: of the model, for the sentence.

    Raises:
        ConfigError: one sentence.
    """
    if ranks == 1:
        return
    text = config.get_text_config()
    kinds = {*map(str, getattr(text, "layer_types", None) or ())} - _SHARED_LAYERS
    kind = stateful_layer(config) or min(kinds, default=None)
    if kind is None and text.model_type in _UNTOLD:
        kind = f"{text.model_type} attention"
    if kind is not None or hasattr(config, "vision_config"):
        what = f"has {kind} layers, which" if kind is not None else "reads images, and its layers"
        raise ConfigError(f"{name} {what} ranks cannot share: set {KEY}=1.")
    heads = text.num_attention_heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    if heads % ranks or (keys % ranks and ranks % keys):
        raise ConfigError(
            f"{name} has {heads} heads of queries and {keys} of keys, which {KEY}={ranks} ranks cannot share: choose a "
            "size that divides the former, and the latter or a multiple of it."
        )
