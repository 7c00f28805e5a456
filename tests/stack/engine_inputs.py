# SPDX-License-Identifier: Apache-2.0
"""What the engines of :mod:`tests.stack.engine_harness` are given: rollouts, models, and updates to make of them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from opd_ext.objective.objective import Objective
from opd_ext.teacher.kinds import Teacher

VOCABULARY = 67  # odd, so that two ranks hold shards of different size
WHOLE = 100_000  # a token budget that no batch reaches: everything in one micro-batch


@dataclasses.dataclass(frozen=True)
class Sample:
    """One rollout: two prompts for the same response, which of its tokens train, what the sampler said of them.

    ``taught``: whether it has a teacher. ``spans``: class of each token. ``advantage``: of every token.
    """

    prompt: list[int]
    teacher_prompt: list[int]
    response: list[int]
    mask: list[int]
    rollout_log_probs: list[float]
    old_log_probs: list[float]
    spans: list[int]
    advantage: float = 0.0
    taught: bool = True
    lesson: int = 0  # which of several teachers it has
    heard: tuple[list[int], list[int], list[int]] | None = None  # spans; a foreign teacher's tokens; their spans
    told: tuple[tuple[int, list[int]], ...] = ()  # what its teacher is told in front of so many response tokens

    @property
    def read(self) -> tuple[list[int], list[int]]:
        """The response as its teacher reads it, and 1 where a token is the response's own."""
        ids, own, told = [], [], dict(self.told)
        for i, token in enumerate(self.response):
            note = told.get(i, [])
            ids, own = [*ids, *note, token], [*own, *([0] * len(note)), 1]
        return ids, own


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """Which engine: the folder of its model, and what the configuration says of it."""

    model: str
    forward_only: bool = False
    param_dtype: str = "fp32"
    gradient_checkpointing: bool = False
    lora_rank: int = 0  # of an adapter on every linear layer, which is merged into the weights that are given away


@dataclasses.dataclass(frozen=True)
class Update:
    """One call of the student's engine.

    ``budget`` and ``teacher_budget`` are tokens per micro-batch of either pass; ``rows``, if given, is a fixed
    micro-batch size in their place.
    """

    samples: list[Sample]
    model: str = "untied"
    teacher: str | None = "untied_teacher"  # a model folder; None: live
    objective: Objective = dataclasses.field(default_factory=Objective)
    budget: int = 64
    teacher_budget: int = 80
    rows: int | None = None
    param_dtype: str = "fp32"
    rollout_temperature: float = 1.0
    gradient_checkpointing: bool = False
    old_policy: bool = False  # whether the batch carries old log-probs
    policy: bool = False  # whether it carries advantages, and so has a policy term
    old: str = "given"  # old log-probs of a policy: given; pass, the engine's own in front; update, the update's own
    alone: bool = False  # verl's own update, without a teacher
    sampler_cap: float | None = None  # of weights that correct a policy for its sampler
    distillation_weight: float = 1.0
    trust: float | None = None
    denominator: str = "trained"
    gate: float = 1.0  # of the policy term on annotated spans
    lora_rank: int = 0  # of the student's adapter; 0: it trains whole
    several: tuple[tuple[str | None, Objective, float], ...] = ()  # teachers: model (None: live), loss, weight
    foreign: tuple[int, ...] = ()  # places of the teachers that have tokens of their own
    kind: Teacher | None = None  # whose weights teach, where the model's name does not say
    policy_loss: str = "vanilla"  # verl's name of the policy term
    likeliest: int = 0  # of so many tokens verl's servers have told the teacher's log-probs, and nobody is asked
    served: Any = False  # whether teachers with weights of their own are on servers; or one that is, itself

    @property
    def student(self) -> EngineSpec:
        return EngineSpec(self.model, False, self.param_dtype, self.gradient_checkpointing, self.lora_rank)


# ---------------------------------------------------------------------- inputs


def save_models(folder: Path, heads: int = 2, key_heads: int = 1, head_dim: int = 16) -> None:
    """Random Qwen3 checkpoints with a tokenizer: ``untied`` and ``tied`` students, and for each a ``_teacher``.

    A teacher is its student with every weight disturbed, so that the two agree where they read the same position.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2")
    for name in ("untied", "tied"):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=head_dim,
            max_position_embeddings=256,
            tie_word_embeddings=name == "tied",
            initializer_range=0.2,  # logits of about unit scale: at the usual 0.02 every divergence is nearly zero
            bos_token_id=None,
            eos_token_id=2,
        )
        model = Qwen3ForCausalLM(config)
        model.save_pretrained(folder / name)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        model.save_pretrained(folder / f"{name}_teacher")
        for target in (name, f"{name}_teacher"):
            tokenizer.save_pretrained(folder / target)
    # A teacher of another size, whose vocabulary is padded further than the student's.
    torch.manual_seed(1)
    wide = Qwen3Config(**config.to_dict() | {"hidden_size": 40, "vocab_size": VOCABULARY + 5})
    Qwen3ForCausalLM(wide).save_pretrained(folder / "wide")
    tokenizer.save_pretrained(folder / "wide")
    # A student whose vocabulary is padded further than the teacher's.
    Qwen3ForCausalLM(Qwen3Config(**config.to_dict() | {"vocab_size": VOCABULARY + 5})).save_pretrained(folder / "tall")
    tokenizer.save_pretrained(folder / "tall")


def heard_by_another(samples: list[Sample], seed: int = 9) -> list[Sample]:
    """The same rollouts to a teacher of other tokens: spans of one to three tokens on either side, drawn at random.

    The last fifth of every second response is in no span, as what was cut within a character.
    """
    generator = torch.Generator().manual_seed(seed)

    def count(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=generator))

    found = []
    for i, sample in enumerate(samples):
        own: list[int] = []
        theirs: list[int] = []
        readable = len(sample.response) - (len(sample.response) // 5 if i % 2 else 0)
        while len(own) < readable:
            number = own[-1] + 1 if own else 0
            own += [number] * min(count(3), readable - len(own))
            theirs += [number] * count(3)
        tokens = torch.randint(3, VOCABULARY, (len(theirs),), generator=generator).tolist()
        heard = (own + [-1] * (len(sample.response) - readable), tokens, theirs)
        found.append(dataclasses.replace(sample, heard=heard))
    return found


def make_samples(response_lens: list[int], seed: int = 0) -> list[Sample]:
    """Random rollouts; the teacher's prompt is the student's behind 1 to 13 tokens more."""
    generator, others = (torch.Generator().manual_seed(s) for s in (seed, seed + 1))

    def ids(n: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()

    samples = []
    for i, n in enumerate(response_lens):
        mask = [int(j % 4 != 2) for j in range(n)] if i % 3 == 1 else [1] * n  # masked tokens inside some responses
        rollout = (-3.0 * torch.rand(n, generator=generator)).tolist()
        old = (-6.0 * torch.rand(n, generator=others)).tolist()
        prompt = ids(3 + i % 4)
        spans = [(0, 1, 1, 0, 2)[(i + j) % 5] for j in range(n)]
        advantage = (-1.0) ** i * (0.5 + i / 4)
        teacher_prompt, response = ids(1 + 3 * (i % 5)) + prompt, ids(n)
        samples.append(Sample(prompt, teacher_prompt, response, mask, rollout, old, spans, advantage))
    return samples


def to_batch(samples: list[Sample], old_policy: bool = False, policy: bool = False, **non_tensors: Any):
    """What the trainer hands to ``update_actor``: jagged [B, j1] tensors; a placeholder where there is no teacher."""
    from verl.utils import tensordict_utils as tu

    def jagged(rows: list[list], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(row, dtype=dtype) for row in rows], layout=torch.jagged)

    optional = {}
    if any(s.heard for s in samples):
        spans = [(s.heard[0], s.heard[2]) if s.heard else (list(range(len(s.response))),) * 2 for s in samples]
        spans = [pair if s.taught else ([-1] * len(s.response), [-1]) for s, pair in zip(samples, spans, strict=True)]
        optional |= {"student_byte_span": jagged([own for own, _ in spans])}
        optional |= {"teacher_byte_span": jagged([theirs for _, theirs in spans])}
    if any(s.told for s in samples):
        optional["teacher_reads"] = jagged([s.read[1] if s.taught else [1] for s in samples])
    if old_policy or policy:
        optional["old_log_probs"] = jagged([s.old_log_probs for s in samples], torch.float32)
    if policy:
        optional["advantages"] = jagged([[s.advantage] * len(s.response) for s in samples], torch.float32)
        optional["response_mask"] = jagged([s.mask for s in samples])
    return tu.get_tensordict(
        {
            **optional,
            "input_ids": jagged([s.prompt + s.response for s in samples]),
            "position_ids": jagged([list(range(len(s.prompt + s.response))) for s in samples]),
            "prompts": jagged([s.prompt for s in samples]),
            "responses": jagged([s.response for s in samples]),
            "loss_mask": jagged([s.mask for s in samples]),
            "rollout_log_probs": jagged([s.rollout_log_probs for s in samples], torch.float32),
            "span_label": jagged([s.spans for s in samples]),
            "has_teacher": torch.tensor([s.taught for s in samples]),
            "lesson": torch.tensor([s.lesson for s in samples]),
            "teacher_input_ids": jagged(
                [s.teacher_prompt + (s.heard[1] if s.heard else s.read[0]) if s.taught else [2, 2] for s in samples]
            ),
        },
        non_tensors,
    )
