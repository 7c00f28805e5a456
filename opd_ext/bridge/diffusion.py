# SPDX-License-Identifier: Apache-2.0
"""Masked-diffusion fine-tuning as an FSDP engine, registered with verl next to the one for next-token prediction.

A batch is what verl's SFT trainer makes of clean sequences, its ``loss_mask`` set exactly where a token is hidden and
trained. verl counts that mask over all ranks, which makes the default loss the mean over the union of random and
selected positions of the global batch. The engine hides the tokens, shows the rest in both directions and returns
log-probabilities of the clean tokens in their own places: nothing is shifted.
"""

from typing import Any

import torch
from tensordict import TensorDict
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from opd_ext.diffusion.masking import attention_argument, block_diffusion_mask, corrupt, token_weights

MODEL_TYPE = "masked_diffusion"


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device="cpu")
@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device="cuda", vendor="nvidia")
class MaskedDiffusionEngine(FSDPEngineWithLMHead):
    """verl's language-model engine for models that reconstruct hidden tokens.

    The model's config says how it reads: ``mask_token_id``, ``diffusion_attention`` (``full`` or ``block``) and, for
    ``block``, ``diffusion_block_size``. For a model whose own config lacks them, put them into
    ``model.override_config``; a checkpoint then keeps them.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._read_settings(self.model_config.hf_config)
        if self.use_ulysses_sp:
            raise ValueError(
                "Masked diffusion does not run with sequence parallelism: set ulysses_sequence_parallel_size to 1."
            )
        if not self.use_remove_padding or self.pad_to_length or self.engine_config.use_fused_kernels:
            raise ValueError(
                "Masked diffusion runs on packed sequences and its own head: set model.use_remove_padding to true and "
                "pad_to_length and use_fused_kernels to false."
            )
        self._head_rows: torch.Tensor | None = None

    def _read_settings(self, config: Any) -> None:
        """Take the settings from the model's config; what cannot work is refused before a weight is loaded."""
        self._attention = getattr(config, "diffusion_attention", None)
        needed = ["mask_token_id", "diffusion_attention"] + ["diffusion_block_size"] * (self._attention == "block")
        missing = [name for name in needed if getattr(config, name, None) is None]
        if missing:
            raise ValueError(f"The model's config has no {' and no '.join(missing)}: set it in model.override_config.")
        self._mask_token_id = config.mask_token_id
        if not 0 <= self._mask_token_id < config.vocab_size:
            raise ValueError(
                f"mask_token_id is {self._mask_token_id} and the model knows {config.vocab_size} tokens: "
                "set the id with which the model was trained."
            )
        self._block_size = config.diffusion_block_size if self._attention == "block" else 1
        visible = block_diffusion_mask([1], self._attention, self._block_size)
        attention_argument(visible, config._attn_implementation, torch.float32)

    def _build_module(self) -> torch.nn.Module:
        try:
            self.model_config.model_type = "language_model"  # which class to load: verl knows no third kind
            module = super()._build_module()
        finally:
            self.model_config.model_type = MODEL_TYPE
        module.get_output_embeddings().register_forward_pre_hook(self._select_rows)
        return module

    def _select_rows(self, head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Let the vocabulary projection see the noised rows only; not every architecture has ``logits_to_keep``."""
        return (inputs[0][:, self._head_rows],)

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict, dict]:
        """The packed corrupted sequences, each followed by its clean copy where the attention is by blocks.

        Args:
            micro_batch: jagged ``input_ids``, ``position_ids`` and ``loss_mask``, each [B, j1].
        """
        inputs, outputs = super().prepare_model_inputs(micro_batch)
        ids, hidden = micro_batch["input_ids"], micro_batch["loss_mask"].values().bool()
        clean, positions = ids.values(), inputs["position_ids"][0]
        lengths = ids.offsets().diff().tolist()
        noised = corrupt(clean, hidden, self._mask_token_id)
        rows = torch.arange(len(clean), device=clean.device)
        if self._attention == "block":
            noised = _interleave(noised, clean, lengths)
            rows = _interleave(rows, rows.new_full(rows.shape, -1), lengths)
            rows = (rows >= 0).nonzero().flatten()
            positions = _interleave(positions, positions, lengths)
        visible = block_diffusion_mask(lengths, self._attention, self._block_size, clean.device)
        implementation = self.model_config.hf_config._attn_implementation
        inputs["attention_mask"] = attention_argument(visible, implementation, self._autocast_dtype)
        inputs["input_ids"], inputs["position_ids"] = noised[None], positions[None]
        # verl names what the log-probs are of after the shift that next-token prediction needs.
        outputs["input_ids_rmpad_rolled"] = clean
        self._head_rows = rows
        return inputs, outputs


def _interleave(first: torch.Tensor, second: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Of two packed batches [N] the sequences of both in turn, [2 N]."""
    pairs = zip(first.split(lengths), second.split(lengths), strict=True)
    return torch.cat([part for pair in pairs for part in pair])


def diffusion_loss(
    config: Any, model_output: dict, data: TensorDict, dp_group: Any = None, weighting: str = "mean"
) -> tuple[torch.Tensor, dict]:
    """The loss of one micro-batch, in the manner of verl's ``sft_loss`` but without its shift.

    Args:
        config: unused, as in ``sft_loss``.
        model_output: jagged ``log_probs`` [B, j1] of :class:`MaskedDiffusionEngine`.
        data: jagged ``loss_mask`` [B, j1]; ``batch_num_tokens``, its sum over the global batch; ``dp_size``; for
            ``inverse_ratio`` also ``global_batch_size``.
        weighting: ``mean`` over the hidden tokens of the global batch, or ``inverse_ratio``, see
            :func:`~opd_ext.diffusion.masking.token_weights`; its ratio is that of the union.

    Returns:
        The loss, scaled by the number of ranks because FSDP averages gradients over them, and no metrics. 0 where the
        global batch has no hidden token.
    """
    lengths = data["input_ids"].offsets().diff().tolist()
    weight = token_weights(data["loss_mask"].values().bool(), lengths, weighting)
    count = data["batch_num_tokens" if weighting == "mean" else "global_batch_size"]
    loss = -(model_output["log_probs"].values() * weight).sum() / max(count, 1)
    return loss * data["dp_size"], {}
