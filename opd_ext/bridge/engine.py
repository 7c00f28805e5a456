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
import functools
import inspect
import math
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
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import prepare_micro_batches

from opd_ext.bridge import likeliest, old_policy, teachers, ulysses
from opd_ext.bridge.layout import (
    is_distilled,
    like_ids,
    objective_batch,
    pack_lengths,
    packed_rows,
    policy_term,
    restarting_positions,
)
from opd_ext.config.architecture import check_architecture, stateful_layer
from opd_ext.errors import present
from opd_ext.objective.lessons import taught
from opd_ext.objective.objective import Objective
from opd_ext.objective.products import fp32_linear
from opd_ext.objective.shares import Share, dealt, piece
from opd_ext.teacher.kinds import TeacherOutput

# What `lm_head` does to its input: (hidden [1, R, H], weight [V, H]) -> tensor.
HeadFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _open_head(lm_head: torch.nn.Module) -> None:
    """Let ``lm_head.head_fn`` replace the projection for the duration of a forward pass.

    With ``lm_head.fp32`` the projection itself, on which verl's own log-probs rest, computes in float32 too.
    """
    if getattr(lm_head, "bias", None) is not None:
        raise ValueError("The chunked head does not support an lm_head with a bias.")
    project = lm_head.forward

    def forward(self: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if self.head_fn is not None:
            return self.head_fn(hidden, self.weight)
        if not self.fp32:
            return project(hidden)
        return fp32_linear(hidden, self.weight)

    lm_head.head_fn, lm_head.fp32 = None, False
    lm_head.forward = types.MethodType(forward, lm_head)


def _hidden_rows(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return hidden


@contextmanager
def _unpinned() -> Iterator[None]:
    """On a CPU stream weights from memory as it is: verl pins it, for which torch asks an accelerator."""
    policy = transformer_impl.CPUOffloadPolicy
    if get_device_name() == "cpu":
        transformer_impl.CPUOffloadPolicy = lambda pin_memory: policy(pin_memory=False)
    try:
        yield
    finally:
        transformer_impl.CPUOffloadPolicy = policy


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="nvidia")
class OPDEngine(FSDPEngineWithLMHead):
    """verl's language-model engine, able to be a teacher, a student, or what it was before.

    A batch with ``has_teacher`` takes the distillation step; every other batch takes verl's own path.
    """

    tutors: tuple[teachers.Tutor, ...] = (teachers.Tutor(),)  # who teaches, and by which loss
    updates: int = 0  # optimiser steps that were made, see OPDWorker.count_updates
    alone: bool = False  # every sequence takes a pass of its own, because in a pack it would read its neighbour
    _answers: teachers.Answers | None = None  # of the teachers, on the mini-batch at hand
    kept: dict[str, torch.Tensor] | None = None  # log-probs and entropies of the last update, see `recall`

    @property
    def objective(self) -> Objective:
        """The loss; of what several teachers differ in, the first one's."""
        return self.tutors[0].objective

    def _build_module(self) -> torch.nn.Module:
        module = super()._build_module()
        check_architecture(module.config, module.config.name_or_path)
        self.alone = stateful_layer(module.config) is not None
        _open_head(module.get_output_embeddings())
        if self.use_ulysses_sp:
            ulysses.share_attention(module)
        return module

    def _build_lora_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """A LoRA's A begins at random: from the run's seed, as all else that is random in a run; rank 0's is used."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.engine_config.seed)
            return super()._build_lora_module(module)

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Keep a forward-only module on its device unless the config asks for offload.

        verl streams every forward-only module from pinned host memory, once per pass. A sharded teacher in bf16 is
        small beside the student's fp32 weights and optimiser, and pinned memory needs an accelerator.
        """
        config = self.engine_config
        if not config.forward_only or config.offload_policy or config.param_offload:
            with _unpinned():
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
    def _head(self, function: HeadFunction, rows: ulysses.Rows) -> Iterator[None]:
        """Let ``function`` see chosen rows of a pass; not every architecture would choose them itself."""
        self._lm_head.head_fn = lambda hidden, weight: function(rows(hidden), weight)
        try:
            yield
        finally:
            self._lm_head.head_fn = None

    def _rows(self, packed: torch.Tensor, lengths: list[int], inputs: dict) -> ulysses.Rows:
        """Rows ``packed`` [R] of a pass, on the host, that predict responses of ``lengths``."""
        stretch = inputs["input_ids"].shape[1]
        return ulysses.Rows.of(packed, lengths, stretch, get_device_id(), self.ulysses_parallel_group)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of its passes."""
        return self._autocast_dtype

    def _autocast(self):
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self._autocast_dtype)

    @torch.no_grad()
    def head_weight(self) -> torch.Tensor:
        """The whole vocabulary projection in the compute dtype, [V, H], gathered from all shards (collective)."""
        weight = self._lm_head.weight
        if isinstance(weight, DTensor):
            return weight.to(get_device_id()).full_tensor().detach().to(self._autocast_dtype)
        # With reshard_after_forward=false it is FSDP's own whole copy, whose memory FSDP takes back.
        return weight.detach().to(self._autocast_dtype, copy=True)

    @torch.no_grad()
    def response_hidden_states(self, data: TensorDict) -> list[torch.Tensor]:
        """Trunk-only pass over the teacher's sequences, packed by their own lengths.

        Args:
            data: jagged ``teacher_input_ids`` and ``responses``, and ``has_teacher`` [B]; where that is false the
                teacher's sequence is a placeholder of two tokens. With ``one_pass`` the budget of tokens is not asked.

        Returns:
            B tensors in the compute dtype, [R_i, H]: the rows that predict the R_i response tokens of sample i. One row
            of no meaning for a placeholder. Where ranks share sequences, those of them that are dealt to this rank.
        """
        ids, config = data["teacher_input_ids"], self.engine_config
        one_pass = tu.get_non_tensor_data(data, "one_pass", False)
        lengths = torch.where(data["has_teacher"].bool(), data["responses"].offsets().diff(), 1)
        batch = tu.get_tensordict(
            {
                "input_ids": ids,
                "position_ids": restarting_positions(ids),
                "response_length": lengths.cpu(),
                "row": torch.arange(len(lengths)),
            },
            {
                "temperature": 1.0,
                "use_dynamic_bsz": (one_pass or config.use_dynamic_bsz) and not self.alone,
                "max_token_len_per_gpu": ids.values().numel() if one_pass else config.infer_max_token_len_per_gpu,
                "micro_batch_size_per_gpu": 1 if self.alone else config.infer_micro_batch_size_per_gpu,
                "sp_size": self.ulysses_sequence_parallel_size,
            },
        )
        hidden: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
        micro_batches, _ = prepare_micro_batches(batch, dp_group=self.get_data_parallel_group())
        for micro_batch in micro_batches:
            sizes, places = micro_batch["response_length"].tolist(), micro_batch["row"].tolist()
            packed = packed_rows(micro_batch["input_ids"], micro_batch["response_length"])
            inputs, _ = self.prepare_model_inputs(micro_batch.to(get_device_id()))
            with self._autocast(), self._head(_hidden_rows, self._rows(packed, sizes, inputs)):
                out = self.module(**inputs, use_cache=False).logits[0]
            for row, part in zip(places, out.split(self.own_rows(sizes)), strict=True):
                hidden[row] = part.to(self._autocast_dtype)
        return hidden

    def own_rows(self, lengths: list[int]) -> list[int]:
        """Of responses of these lengths the rows that this rank has: all, unless ranks share sequences."""
        group, ranks = self.ulysses_parallel_group, self.ulysses_sequence_parallel_size
        return lengths if group is None else [piece(n, torch.distributed.get_rank(group), ranks) for n in lengths]

    def whole_rows(self, rows: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
        """Whole responses, [R_i, H] each, of what :meth:`response_hidden_states` returns (collective)."""
        share = self.share_of(lengths)
        return rows if share is None else list(share.gathered(torch.cat(rows)).split(lengths))

    def share_of(self, lengths: list[int]) -> Share | None:
        """Whose rows those of responses of these lengths are; None: every rank has them all."""
        group, ranks = self.ulysses_parallel_group, self.ulysses_sequence_parallel_size
        return None if group is None else Share(dealt(lengths, ranks), group).to(get_device_id())

    def model_logits(self, ids: list[int]) -> torch.Tensor:
        """What the model itself makes of one sequence, [T, V]: no function in its head, and no other rank helps."""
        row = torch.tensor([ids], device=get_device_id())
        positions = torch.arange(len(ids), device=row.device)[None]
        with self._autocast(), ulysses.alone():
            return self.module(input_ids=row, position_ids=positions, use_cache=False).logits[0]

    def teacher_output(self, data: TensorDict, adapter: bool = True) -> TeacherOutput:
        """This engine as a teacher: a student with its adapter, or as the model that it was before."""
        with self.evaluates(), nullcontext() if adapter else self.disable_adapter():
            return TeacherOutput(self.response_hidden_states(data), self.head_weight())

    @contextmanager
    def evaluates(self) -> Iterator[None]:
        """Evaluation for a moment: a student may be within its own training step, whose mode must come back."""
        if self.engine_config.forward_only:
            with self.eval_mode():
                yield
            return
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()

    def _count(self, data: TensorDict) -> None:
        """Put the reductions' denominators, over all ranks, and the place of each sample into ``data``."""
        counted = [bool(flag) or self.objective.denominator == "trained" for flag in data["has_teacher"]]
        trained = [int(mask.sum()) * used for mask, used in zip(data["loss_mask"].unbind(), counted, strict=True)]
        counts = torch.tensor([sum(trained), sum(map(bool, trained))], device=get_device_id())
        torch.distributed.all_reduce(counts, group=self.get_data_parallel_group())
        num_tokens, num_sequences = counts.tolist()
        micro_batches = 1
        if self.objective.reduction == "official":  # the only reduction that depends on the split
            tu.assign_non_tensor(data, sp_size=self.ulysses_sequence_parallel_size)
            micro_batches = len(prepare_micro_batches(data, dp_group=self.get_data_parallel_group())[0])
        tu.assign_non_tensor(data, opd_tokens=num_tokens, opd_sequences=num_sequences, opd_micro_batches=micro_batches)
        data["row"] = torch.arange(len(trained))

    # ------------------------------------------------------------------ student

    def optimizer_step(self) -> float:
        norm = super().optimizer_step()
        self.updates += math.isfinite(norm)
        return norm

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable, forward_only: bool = False) -> Any:
        if self.alone:
            tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=1)
        if forward_only:
            return super().forward_backward_batch(data, loss_function, forward_only)
        if old_policy.is_current(data):
            tu.assign_non_tensor(data, return_model_output=True)
        if not is_distilled(data):
            return self._keep(super().forward_backward_batch(data, loss_function))
        self._count(data)
        if likeliest.IDS in data.keys():
            likeliest.check_ids(data[likeliest.IDS].values(), self._lm_head.weight.shape[0])
        # Otherwise the teacher's servers have answered already.
        self._answers = teachers.ask(self, data) if "teacher_input_ids" in data.keys() else None
        try:
            return self._keep(super().forward_backward_batch(data, loss_function))
        finally:
            self._answers = None

    def _keep(self, output: dict) -> dict:
        """Keep an update's log-probs and entropies where somebody will ask for them: jagged like ``input_ids``."""
        found = output["model_output"]
        there = old_policy.ENTROPY in found
        self.kept = {"log_probs": found["log_probs"], "entropy": found[old_policy.ENTROPY]} if there else None
        return output

    def recall(self) -> dict[str, torch.Tensor]:
        """``log_probs`` and ``entropy`` of the policy in front of its last update, once, in the order of its rows."""
        kept, self.kept = self.kept, None
        return present(kept, "The last update has kept no log-probs: it was not told that they are the old ones.")

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict, dict]:
        """verl's, and the lengths of the packed sequences where attention would look for them in every layer."""
        inputs, args = super().prepare_model_inputs(micro_batch)
        packed = inputs["attention_mask"] is None and not args.get("pad_size") and not self.use_ulysses_sp
        if packed and not self.alone and inputs["position_ids"].dim() == 2 and self._reads_lengths:
            inputs |= pack_lengths(micro_batch["input_ids"])
        return inputs, args

    @functools.cached_property
    def _reads_lengths(self) -> bool:
        """Whether attention is flash attention of transformers, and the model's forward passes on what it is given."""
        module = getattr(self.module, "module", self.module)
        passes_on = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())
        return passes_on and str(module.config._attn_implementation).startswith("flash_attention")

    def prepare_model_outputs(
        self, output: Any, output_args: dict, micro_batch: TensorDict, logits_processor_func: Any
    ):
        """verl's, and entropies for metrics where the update stands for the pass that would bring them."""
        found = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        if old_policy.is_current(micro_batch):
            values = old_policy.entropies(output.logits[0].detach(), output_args["temperature_rmpad"])
            values = self._gather_and_unpad_packed(values, output_args["pad_size"])
            offsets = micro_batch["input_ids"].offsets()
            found[old_policy.ENTROPY] = torch.nested.nested_tensor_from_jagged(values, offsets)
        return found

    def forward_step(self, micro_batch: TensorDict, loss_function: Callable, forward_only: bool) -> Any:
        """One micro-batch: trunk, chunked head, loss. verl calls ``backward`` on the loss that is returned.

        The loss is scaled by the number of ranks because FSDP averages gradients over them.
        """
        if forward_only and is_distilled(micro_batch) and loss_function is None:
            return self._score(micro_batch)
        if forward_only or not is_distilled(micro_batch):
            if not forward_only and old_policy.is_current(micro_batch):
                rows = packed_rows(micro_batch["input_ids"], micro_batch["responses"].offsets().diff())
                loss_function = old_policy.anchored(loss_function, rows.to(get_device_id()))
            return super().forward_step(micro_batch, loss_function, forward_only)
        lessons = teachers.lessons(self, self._answers, micro_batch)
        micro_batch, inputs, chosen = self._laid_out(micro_batch)
        rows = chosen.packed
        batch = objective_batch(micro_batch, micro_batch["responses"].offsets().diff(), rows, chosen.share)
        policy_metrics: dict[str, Metric] = {}
        policy = policy_term(micro_batch, rows, loss_function, policy_metrics) if "advantages" in micro_batch else None
        terms = None

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            nonlocal terms
            terms = taught(batch, hidden[0], weight, lessons, policy)
            return terms.loss

        with self._autocast(), self._head(head, chosen):
            loss = self.module(**inputs, use_cache=False).logits
        counted = self.objective.sums(batch, terms, teachers.marks(self, micro_batch, batch.sample))
        sums = {name: Metric("sum", value) for name, value in counted.items()}
        kept = {}
        if old_policy.is_current(micro_batch):
            values = {"log_probs": terms.student_log_prob, old_policy.ENTROPY: terms.student_entropy}
            kept = {name: like_ids(v, micro_batch["input_ids"], rows) for name, v in values.items()}
        return loss, {"model_output": kept, "loss": loss.detach().item(), "metrics": sums | policy_metrics}

    def _laid_out(self, micro_batch: TensorDict) -> tuple[TensorDict, dict, ulysses.Rows]:
        """A micro-batch on the device, the model's inputs, and the rows that predict its responses."""
        # While lengths are on the host, reading them waits for no device.
        lengths = micro_batch["responses"].offsets().diff()
        packed = packed_rows(micro_batch["input_ids"], lengths)
        micro_batch = micro_batch.to(get_device_id())
        inputs, _ = self.prepare_model_inputs(micro_batch)
        return micro_batch, inputs, self._rows(packed, lengths.tolist(), inputs)

    def _score(self, micro_batch: TensorDict) -> Any:
        """Log-probs and entropies of responses through the chunked head, by which the update that reads them goes."""
        micro_batch, inputs, rows = self._laid_out(micro_batch)
        ids, responses = micro_batch["input_ids"], micro_batch["responses"]

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.stack(self.objective.scores(hidden[0], weight, responses.values(), rows.share))

        with self._autocast(), self._head(head, rows):
            values = self.module(**inputs, use_cache=False).logits
        found = dict(zip(("log_probs", "entropy"), values, strict=True))
        kept = {name: like_ids(value, ids, rows.packed) for name, value in found.items()}
        return None, {"model_output": kept, "loss": 0.0, "metrics": {}}
