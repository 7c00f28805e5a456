# SPDX-License-Identifier: Apache-2.0
"""What the config of a model says about its head and its layers, before a weight is loaded.

The loss is computed from the rows in front of ``lm_head``, and sequences lie end to end in one pass. Neither fits every
architecture: some change the logits afterwards, and some carry a state along the sequence, into the next one.
"""

from typing import Any

from opd_ext.errors import ConfigError

# Config entries by which an architecture changes logits after `lm_head`; None and 1 leave them alone.
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
    "logits_soft_cap",
)
# Parts of the names of layers whose state runs along the sequence and does not read `position_ids`.
_STATEFUL = ("linear", "mamba", "ssm", "conv", "recurrent", "lightning", "delta", "rwkv", "hybrid")
# Families whose attention builds masks or positions of its own and does not see where a sequence of a pack begins;
# measured in tests/unit/bridge/test_families.py.
_OWN_MASKS = ("afmoe", "bloom", "doge", "falcon", "gpt_oss", "opt")
# Families of text and images whose forward in verl takes positions in a grid alone, which packed text has not.
_GRID_POSITIONS = ("qwen2_vl", "qwen2_5_vl", "glm4v")


def check_architecture(config: Any, name: str) -> None:
    """Refuse a model whose logits are more than ``hidden @ weight.T``, or whose forward takes no packed text.

    Args:
        config: of transformers; of a model for text and images the text's part is read.
        name: of the model, for the sentence.

    Raises:
        ConfigError: one sentence.
    """
    if config.model_type in _GRID_POSITIONS:
        raise ConfigError(
            f"{name} ({config.model_type}) takes positions in a grid, as of images, which packed text has not: choose "
            "its text-only sibling, or a later family such as Qwen3-VL."
        )
    text = config.get_text_config()
    for entry in _LOGIT_TRANSFORMS:
        if (value := getattr(text, entry, None)) not in (None, 1):
            raise ConfigError(
                f"{name} ({text.model_type}) changes logits after its lm_head ({entry}={value}), which the chunked "
                "head would not see: choose a model without it."
            )


def stateful_layer(config: Any) -> str | None:
    """The kind of layer that would carry one sequence into the next of a pack, or None.

    Such models take every sequence in a pass of its own, which is exact and slower.
    """
    text = config.get_text_config()
    if text.model_type in _OWN_MASKS:
        return f"{text.model_type} attention"
    kinds = {*(getattr(text, "layer_types", None) or ()), *(getattr(text, "layers_block_type", None) or ())}
    return min((kind for kind in map(str, kinds) if any(part in kind for part in _STATEFUL)), default=None)


def check_offload(tied: bool, model: Any, name: str) -> None:
    """Refuse verl's activation offload beside checkpointing where the head is a unit of FSDP's own.

    verl then wraps ``lm_head`` into a reentrant checkpoint. Its recomputation, in the backward pass, comes after the
    forward pass has taken the loss out of the head, and finds logits in place of it. A tied head is no unit of its own.

    Args:
        tied: head and embedding are one matrix.
        model: verl's section ``actor_rollout_ref.model``.
        name: of the model, for the sentence.

    Raises:
        ConfigError: one sentence.
    """
    if not (model.enable_activation_offload and model.enable_gradient_checkpointing):
        return
    if not tied:
        raise ConfigError(
            "actor_rollout_ref.model.enable_activation_offload=true with enable_gradient_checkpointing=true computes "
            f"the head of {name} (not tied to the embedding) again without the loss in it: set the former to false."
        )
