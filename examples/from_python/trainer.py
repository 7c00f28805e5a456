# SPDX-License-Identifier: Apache-2.0
"""`chunked_divergence` as the loss of a `transformers.Trainer`.

    python examples/from_python/trainer.py

The trainer keeps its optimiser, schedule, gradient accumulation, logging and checkpoints; the loss is ours. It is right
on one device and under data parallelism (`torchrun`, `accelerate launch`). Where the LM head is cut into shards (FSDP,
DeepSpeed ZeRO-3), its weight is incomplete outside the model's forward pass: `opd train` is made for that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from plain_loop import INSTRUCTION, prompts, sample, small_models
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Trainer, TrainingArguments

from opd_ext.objective.head import chunked_divergence

IGNORED = -100  # the label of a token that is not trained, as everywhere in transformers


def collate(pairs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Right-padded tensors [B, T] of the student's sequences, and [B, T_T] of the teacher's under ``teacher_*``.

    Args:
        pairs: ``prompt`` [P_i] and ``response`` [R_i], int64. Both sides get the same response tokens.
    """
    batch = {}
    responses = [pair["response"] for pair in pairs]
    for side, seen in (("", torch.empty(0, dtype=torch.long)), ("teacher_", INSTRUCTION)):
        before = [torch.cat([seen, pair["prompt"]]) for pair in pairs]
        ids = [torch.cat(parts) for parts in zip(before, responses, strict=True)]
        labels = [torch.cat([torch.full_like(b, IGNORED), r]) for b, r in zip(before, responses, strict=True)]
        batch[f"{side}input_ids"] = pad_sequence(ids, batch_first=True)
        batch[f"{side}attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        batch[f"{side}labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return batch


class SampleThenCollate:
    """A collator that answers the prompts with the student as it is now, which makes the training on-policy.

    The trainer counts the tokens of a batch before it asks for the loss, so `compute_loss` would be too late to sample.
    A batch is collated when the one before it begins, so a response is at most one optimiser step old. This needs
    ``dataloader_num_workers=0``: a worker process would sample from a copy that never learns.
    """

    def __init__(self, student: PreTrainedModel):
        self.student = student

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        responses = sample(self.student, [row["prompt"] for row in rows])
        return collate([{**row, "response": response} for row, response in zip(rows, responses, strict=True)])


class DistillationTrainer(Trainer):
    """A trainer that minimises the mean divergence from a teacher over all trained tokens.

    Args:
        teacher: a causal LM of the same vocabulary; moved to the trainer's device, never trained, never saved.
        kind, kind_args: a registered divergence and its options.
        chunk_size: upper bound on the rows whose logits exist at once.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        kind: str = "reverse_kl",
        chunk_size: int = 1024,
        kind_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.kind, self.chunk_size, self.kind_args = kind, chunk_size, kind_args or {}
        self.model_accepts_loss_kwargs = True  # have the tokens of a step counted, whatever the model's own loss takes
        self._states: Tensor | None = None
        # `output_hidden_states=True` needs no hook, but keeps the states of every layer, in float32 under autocast.
        self.model.get_decoder().register_forward_hook(self._keep_states)

    def _keep_states(self, trunk: torch.nn.Module, args: Any, output: Any) -> None:
        self._states = output.last_hidden_state

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        *,
        num_items_in_batch: Tensor | int,
    ) -> Tensor | tuple[Tensor, Any]:
        # The model is called whole, because data parallelism hooks into its forward pass. But its head sees one row per
        # sequence: without `logits_to_keep` it would form [B, T, V].
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=1, use_cache=False
        )
        hidden, self._states = self._predicting_rows(self._states, inputs["labels"]), None
        teacher_hidden = self._teacher_states(inputs)
        # The loss of an optimiser step is the mean over all its tokens, however they are split. So each token weighs
        # 1 / `num_items_in_batch`: the number of labels in all micro-batches of the step, on all devices. The trainer
        # adds the micro-batches up and does not divide by their number.
        weights = torch.ones(len(hidden), device=hidden.device) / num_items_in_batch
        loss, _ = chunked_divergence(
            hidden,
            self.accelerator.unwrap_model(model).get_output_embeddings().weight,
            teacher_hidden,
            self.teacher.get_output_embeddings().weight,
            weights,
            self.kind,
            self.chunk_size,
            **self.kind_args,
        )
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # data parallelism takes the mean of gradients; this undoes it
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher_states(self, inputs: dict[str, Tensor]) -> Tensor:
        trunk = self.teacher.get_decoder()
        ids, mask = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
        hidden = trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return self._predicting_rows(hidden, inputs["teacher_labels"])

    @staticmethod
    def _predicting_rows(hidden: Tensor, labels: Tensor) -> Tensor:
        """Row t predicts token t + 1: the rows before trained tokens, sequence by sequence, [B, T, H] -> [N, H]."""
        return hidden[:, :-1][labels[:, 1:] != IGNORED]


def arguments(folder: str, **changes: Any) -> TrainingArguments:
    """The example's settings. The prompts are no argument of the model's, so the trainer must not remove them."""
    example = {
        "max_steps": 40,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 5,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(output_dir=folder, remove_unused_columns=False, **(example | changes))


def main() -> None:
    student, teacher = small_models()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            student,
            arguments(folder),
            teacher=teacher,
            train_dataset=[{"prompt": prompt} for prompt in prompts(1024, seed=0)],
            data_collator=SampleThenCollate(student),
        )
        trainer.train()


if __name__ == "__main__":
    main()
