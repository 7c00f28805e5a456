# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation in a training loop of one's own: no verl, no Ray, no vLLM, only torch and transformers.

    python examples/from_python/plain_loop.py

A small student samples, a wider teacher reads an instruction before the same prompt, and the student follows the
teacher's distribution at every token it sampled. Both models are built from a configuration, so nothing is downloaded;
with models of yours, replace `small_models` by two calls of `AutoModelForCausalLM.from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from opd_ext.objective.alignment import response_rows
from opd_ext.objective.head import chunked_divergence

VOCABULARY = 67
END = 0  # ends a response
INSTRUCTION = torch.tensor([5, 7, 11])  # what the teacher sees and the student does not
NEW_TOKENS = 12


def small_models(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student and a teacher with one vocabulary and different widths; the teacher is a constant."""
    torch.manual_seed(seed)

    def build(width: int) -> PreTrainedModel:
        shape = {"vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 2 * width}
        depth = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        ids = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": END}
        return LlamaForCausalLM(LlamaConfig(**shape, **depth, **ids, initializer_range=0.05))

    student, teacher = build(width=64), build(width=96)
    with torch.no_grad():
        teacher.lm_head.weight *= 6.0  # untrained, it would be as undecided as the student and have nothing to teach
    return student, teacher.eval().requires_grad_(False)


def prompts(count: int, seed: int) -> list[Tensor]:
    """Random prompts of 2 to 6 tokens, [P_i] int64."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def sample(student: PreTrainedModel, batch: Sequence[Tensor], new_tokens: int = NEW_TOKENS) -> list[Tensor]:
    """One response per prompt, [R_i] int64, up to and including the token that ends it."""
    # Untempered and untruncated: where the divergence is to be judged is where the student itself would go.
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": new_tokens}
    ids = pad_sequence(list(batch), batch_first=True, padding_value=END, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in batch], batch_first=True, padding_side="left")
    was_training = student.training
    student.eval()
    device = student.device
    out = student.generate(input_ids=ids.to(device), attention_mask=mask.to(device), pad_token_id=END, **how)
    student.train(was_training)
    responses = out[:, ids.shape[1] :].cpu()
    ends = [(response == END).nonzero()[:1].flatten().tolist() for response in responses]
    return [response[: end[0] + 1] if end else response for response, end in zip(responses, ends, strict=True)]


def response_states(model: PreTrainedModel, before: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
    """Last hidden states [sum R_i, H] of the rows that predict the response tokens.

    Only the trunk runs: the LM head, and with it a [B, T, V] tensor, is left to `chunked_divergence`.
    """
    sequences = [torch.cat(pair) for pair in zip(before, responses, strict=True)]
    ids = pad_sequence(sequences, batch_first=True, padding_value=END).to(model.device)
    mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True).to(model.device)
    hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    rows = [response_rows(len(prompt), len(response)) for prompt, response in zip(before, responses, strict=True)]
    return torch.cat([hidden[i, where.to(model.device)] for i, where in enumerate(rows)])


def distillation_loss(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Sequence[Tensor],
    responses: Sequence[Tensor],
    kind: str = "reverse_kl",
    chunk_size: int = 1024,
    **kind_args: float,
) -> tuple[Tensor, Tensor]:
    """The mean divergence over all response tokens [], and each token's [sum R_i]."""
    student_states = response_states(student, batch, responses)
    with torch.no_grad():
        told = [torch.cat([INSTRUCTION, prompt]) for prompt in batch]
        teacher_states = response_states(teacher, told, responses)
    # A token's weight is its share of the loss. With several micro-batches per optimiser step the denominator is the
    # number of tokens in all of them; otherwise tokens of short micro-batches count more.
    weights = torch.full((len(student_states),), 1 / len(student_states), device=student_states.device)
    return chunked_divergence(
        student_states,
        student.get_output_embeddings().weight,
        teacher_states,
        teacher.get_output_embeddings().weight,
        weights,
        kind,
        chunk_size,
        **kind_args,
    )


def train(
    student: PreTrainedModel, teacher: PreTrainedModel, steps: int = 60, batch_size: int = 16, lr: float = 5e-3
) -> Iterator[float]:
    """Train the student and yield the mean divergence of each step, nats per token, on what it has just sampled."""
    optimiser = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    student.train()
    for step in range(steps):
        batch = prompts(batch_size, seed=step)
        responses = sample(student, batch)
        loss, _ = distillation_loss(student, teacher, batch, responses)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        yield loss.item()


def main() -> None:
    student, teacher = small_models()
    if torch.cuda.is_available():
        student, teacher = student.cuda(), teacher.cuda()
    for step, divergence in enumerate(train(student, teacher), start=1):
        if step == 1 or step % 10 == 0:
            print(f"step {step:3d}   reverse KL {divergence:.3f} nats per token")


if __name__ == "__main__":
    main()
