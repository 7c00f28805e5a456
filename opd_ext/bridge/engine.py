# SPDX-License-Identifier: Apache-2.0
"""The FSDP2 engine with a teacher beside the student and the vocabulary projection inside ``lm_head``.

verl's engine materialises logits for every position of a packed batch. Here the trunk runs as always, only the rows
that predict response tokens reach ``lm_head``, and what happens there is a function that the engine puts in place:

* the teacher engine returns those rows themselves (hidden states ``[R, H]``), so its pass never touches the vocabulary;
* the student engine feeds them with the teacher's rows to the chunked head, which returns the loss.

``lm_head`` is where FSDP2 has gathered the student's weight (tied or not). The teacher's weight is gathered once per
mini-batch instead, because it does not change within one.
"""

import dataclasses
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.metric.utils import Metric
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import prepare_micro_batches

from opd_ext.objective.alignment import packed_response_rows
from opd_ext.objective.loss import BatchShape, Objective

# What `lm_head` does to its input: (hidden [1, R, H], weight [V, H]) -> tensor.
HeadFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Config entries by which some architectures change logits after `lm_head`; the head would not see that.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def _open_head(lm_head: torch.nn.Module) -> None:
    """Let ``lm_head.head_fn`` replace the projection for the duration of a forward pass."""
    if getattr(lm_head, "bias", None) is not None:
        raise ValueError("The chunked head does not support an lm_head with a bias.")
    project = lm_head.forward

    def forward(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return project(hidden) if self.head_fn is None else self.head_fn(hidden, self.weight)

    lm_head.head_fn = None
    lm_head.forward = types.MethodType(forward, lm_head)


def _hidden_rows(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden


def _packed_rows(input_ids: torch.Tensor, response_lens: torch.Tensor) -> torch.Tensor:
    """Rows of a packed batch whose logits predict the response tokens, [R] int64."""
    offsets = input_ids.offsets()
    return packed_response_rows(offsets, offsets.diff() - response_lens, response_lens)


def _restarting_positions(ids: torch.Tensor) -> torch.Tensor:
    """Position ids 0, 1, ... for every sequence of a jagged ``ids`` [B, j1] (jagged like ``ids``)."""
    positions = [torch.arange(length) for length in ids.offsets().diff().tolist()]
    return torch.nested.as_nested_tensor(positions, layout=torch.jagged)


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="nvidia")
class OPDEngine(FSDPEngineWithLMHead):
    """verl's language-model engine, able to be a teacher, a student, or what it was before.

    A batch with ``teacher_input_ids`` takes the distillation step; every other batch takes verl's own path.
    """

    teacher: "OPDEngine | None" = None  # the engine whose weights teach; None: the student's own (live teacher)
    objective: Objective | None = None

    def _build_module(self) -> torch.nn.Module:
        module = super()._build_module()
        for name in _LOGIT_TRANSFORMS:
            if getattr(module.config, name, None) not in (None, 1.0):
                raise ValueError(f"Models that transform logits after lm_head ({name}) are not supported.")
        _open_head(module.get_output_embeddings())
        return module

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Keep a forward-only module on its device unless the config asks for offload.

        verl streams every forward-only module from pinned host memory, once per pass. A sharded teacher in bf16 is
        small beside the student's fp32 weights and optimiser, and pinned memory needs an accelerator.
        """
        config = self.engine_config
        if not config.forward_only or config.offload_policy or config.param_offload:
            return super()._build_fsdp_module(module)
        try:
            self.engine_config = dataclasses.replace(config, forward_only=False)
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config = config

    # ------------------------------------------------------------------ teacher

    @property
    def _lm_head(self) -> torch.nn.Module:
        return self.module.get_output_embeddings()

    @contextmanager
    def _head(self, function: HeadFunction) -> Iterator[None]:
        self._lm_head.head_fn = function
        try:
            yield
        finally:
            self._lm_head.head_fn = None

    def _autocast(self):
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self._autocast_dtype)

    @torch.no_grad()
    def head_weight(self) -> torch.Tensor:
        """The whole vocabulary projection in the compute dtype, [V, H], gathered from all shards (collective)."""
        weight = self._lm_head.weight
        if isinstance(weight, DTensor):
            weight = weight.to(get_device_id()).full_tensor()
        return weight.detach().to(self._autocast_dtype)

    @torch.no_grad()
    def response_hidden_states(self, data: TensorDict) -> list[torch.Tensor]:
        """Trunk-only pass over the teacher's sequences, packed by their own lengths.

        Args:
            data: jagged ``teacher_input_ids`` and ``responses``, batch size B; the responses end the sequences.

        Returns:
            B tensors [R_i, H] in the compute dtype: the rows that predict the R_i response tokens of sample i.
        """
        ids = data["teacher_input_ids"]
        lengths = data["responses"].offsets().diff()
        batch = tu.get_tensordict(
            {
                "input_ids": ids,
                "position_ids": _restarting_positions(ids),
                "response_length": lengths.cpu(),
                "row": torch.arange(len(lengths)),
            },
            {
                "temperature": 1.0,
                "use_dynamic_bsz": self.engine_config.use_dynamic_bsz,
                "max_token_len_per_gpu": self.engine_config.infer_max_token_len_per_gpu,
                "micro_batch_size_per_gpu": self.engine_config.infer_micro_batch_size_per_gpu,
            },
        )
        hidden: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
        micro_batches, _ = prepare_micro_batches(batch, dp_group=self.get_data_parallel_group())
        for micro_batch in micro_batches:
            sizes = micro_batch["response_length"].tolist()
            micro_batch = micro_batch.to(get_device_id())
            rows = _packed_rows(micro_batch["input_ids"], micro_batch["response_length"])
            inputs, _ = self.prepare_model_inputs(micro_batch)
            with self._autocast(), self._head(_hidden_rows):
                out = self.module(**inputs, use_cache=False, logits_to_keep=rows).logits[0]
            for row, part in zip(micro_batch["row"].tolist(), out.split(sizes), strict=True):
                hidden[row] = part.to(self._autocast_dtype)
        return hidden

    def _ask_teacher(self, data: TensorDict) -> None:
        """Fill what the student's micro-batches need: teacher rows per sample, teacher head, global counts."""
        if self.teacher is None:
            self.module.eval()
            self._teacher_rows = self.response_hidden_states(data)
            self._teacher_head = self.head_weight()
            self.module.train()
        else:
            with self.teacher.eval_mode():
                self._teacher_rows = self.teacher.response_hidden_states(data)
                self._teacher_head = self.teacher.head_weight()
        sequences = sum(bool(mask.any()) for mask in data["loss_mask"].unbind())
        count = torch.tensor(sequences, device=get_device_id())
        torch.distributed.all_reduce(count, group=self.get_data_parallel_group())
        micro_batches = 1
        if self.objective.reduction == "official":  # the only reduction that depends on the split
            tu.assign_non_tensor(data, sp_size=1)
            micro_batches = len(prepare_micro_batches(data, dp_group=self.get_data_parallel_group())[0])
        tu.assign_non_tensor(data, num_sequences=count.item(), num_micro_batches=micro_batches)
        data["row"] = torch.arange(len(self._teacher_rows))

    # ------------------------------------------------------------------ student

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> Any:
        if forward_only or "teacher_input_ids" not in data.keys():
            return super().forward_backward_batch(data, loss_function, forward_only)
        self._ask_teacher(data)
        try:
            return super().forward_backward_batch(data, loss_function, forward_only)
        finally:
            del self._teacher_rows, self._teacher_head

    def forward_step(self, micro_batch: TensorDict, loss_function: Callable, forward_only: bool) -> Any:
        """One micro-batch: trunk, chunked head, loss. verl calls ``backward`` on the loss that is returned.

        The loss is scaled by the number of ranks because FSDP averages gradients over them.
        """
        if forward_only or "teacher_input_ids" not in micro_batch.keys():
            return super().forward_step(micro_batch, loss_function, forward_only)
        teacher_hidden = [self._teacher_rows[row] for row in micro_batch["row"].tolist()]
        micro_batch = micro_batch.to(get_device_id())
        responses, lengths = micro_batch["responses"], micro_batch["responses"].offsets().diff()
        batch = BatchShape(
            labels=responses.values(),
            mask=micro_batch["loss_mask"].values(),
            lengths=lengths,
            num_tokens=micro_batch["batch_num_tokens"],
            num_sequences=micro_batch["num_sequences"],
            num_micro_batches=micro_batch["num_micro_batches"],
            dp_size=micro_batch["dp_size"],
            rollout_log_probs=micro_batch["rollout_log_probs"].values() if "rollout_log_probs" in micro_batch else None,
        )
        terms = None

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            nonlocal terms
            terms = self.objective(batch, hidden[0], weight, torch.cat(teacher_hidden), self._teacher_head)
            return terms.loss

        inputs, _ = self.prepare_model_inputs(micro_batch)
        rows = _packed_rows(micro_batch["input_ids"], lengths)
        with self._autocast(), self._head(head):
            loss = self.module(**inputs, use_cache=False, logits_to_keep=rows).logits
        sums = {name: Metric("sum", value) for name, value in self.objective.sums(batch, terms).items()}
        return loss, {"model_output": {}, "loss": loss.detach().item(), "metrics": sums}
