# SPDX-License-Identifier: Apache-2.0
"""Student and teacher engines in real FSDP2 processes over gloo, without Ray and without vLLM.

The parent describes updates (:class:`Update`) and gets back what they did; verl's own training worker builds the
engines in the children. verl is imported there only: it resolves its platform at import, from the environment.
"""

import dataclasses
import functools
import os
import socket
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import torch

from opd_ext.objective.metrics import means
from opd_ext.objective.objective import Objective
from opd_ext.teacher import copy_shards, ema_shards
from opd_ext.teacher.kinds import External, Frozen, Live, Teacher, TrustRegion

VOCABULARY = 67  # odd, so that two ranks hold shards of different size
LEARNING_RATE = 1e-2
DEADLINE_S = 300  # for all updates of one spawn: some 15 s of imports and a few seconds of work
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


# ---------------------------------------------------------------------- processes


def run_ranks(world_size: int, folder: Path, job: Callable[["Rank"], dict], sequence_parallel: int = 1) -> list[dict]:
    """``job(rank)`` in ``world_size`` fresh processes of one process group; what each of them returned.

    Args:
        folder: holds the models of :func:`save_models`; results are exchanged through it.
        job: picklable; receives a :class:`Rank`.
        sequence_parallel: ranks that share a sequence.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    settings |= {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    with mock.patch.dict(os.environ, settings):
        group = torch.multiprocessing.spawn(_enter, (folder, job, sequence_parallel), nprocs=world_size, join=False)
    end = time.monotonic() + DEADLINE_S
    try:
        while not group.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() > end:
                raise TimeoutError(f"{world_size} ranks did not finish within {DEADLINE_S} s: one of them hangs.")
    finally:
        for process in group.processes:
            process.kill()
    return [torch.load(folder / f"world_{world_size}_rank_{rank}.pt") for rank in range(world_size)]


def _enter(rank: int, folder: Path, job: Callable[["Rank"], dict], sequence_parallel: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK="0")
    torch.set_num_threads(1)
    from opd_ext import plugin

    plugin.register()
    from opd_ext.bridge.cpu_platform import init_process_group

    init_process_group()
    place = Rank(folder, sequence_parallel)
    torch.save(job(place), folder / f"world_{place.world_size}_rank_{rank}.pt")
    torch.distributed.destroy_process_group()


class Rank:
    """One rank's engines. Every method is collective: all ranks call it with the same arguments."""

    def __init__(self, folder: Path, sequence_parallel: int = 1):
        self.folder, self.sequence_parallel = folder, sequence_parallel
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.worker, self.served = cache(self._build_worker), cache(self._served)

    def configs(self, spec: EngineSpec) -> tuple:
        """Model, engine, optimiser and checkpoint config in the manner of the `cpu_tiny` scale."""
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

        return (
            HFModelConfig(
                path=str(self.folder / spec.model),
                override_config={"attn_implementation": "sdpa"},
                enable_gradient_checkpointing=spec.gradient_checkpointing,
                use_remove_padding=True,
                lora_rank=spec.lora_rank,
                lora_alpha=2 * spec.lora_rank,
                target_modules="all-linear",
                lora={"merge": spec.lora_rank > 0},
            ),
            FSDPEngineConfig(
                strategy="fsdp2",
                forward_only=spec.forward_only,
                model_dtype="fp32",
                mixed_precision={"param_dtype": spec.param_dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
                use_torch_compile=False,
                ulysses_sequence_parallel_size=self.sequence_parallel,
            ),
            FSDPOptimizerConfig(lr=LEARNING_RATE, total_training_steps=1),
            CheckpointConfig(),
        )

    def _build_worker(self, spec: EngineSpec):
        from verl.workers.config import TrainingWorkerConfig

        from opd_ext.bridge.worker import OPDTrainingWorker

        torch.manual_seed(0)  # a fresh adapter is drawn: on any number of ranks the same one
        names = ("model_config", "engine_config", "optimizer_config", "checkpoint_config")
        configs = dict(zip(names, self.configs(spec), strict=True))
        worker = OPDTrainingWorker(TrainingWorkerConfig(model_type="language_model", **configs))
        worker.reset()
        return worker

    def local_shards(self, spec: EngineSpec) -> dict[str, torch.Tensor]:
        """This rank's weights of an engine, by the function that the teacher's refresh uses."""
        from opd_ext.bridge.adapters import local_parts
        from opd_ext.bridge.worker import _distinct_tensors

        return local_parts(_distinct_tensors(self.worker(spec).engine.module))

    def _prepared(self, update: Update):
        """The student's worker, configured for ``update``, and this rank's contiguous share of the batch."""
        student = self.worker(update.student)
        student.engine.tutors = self._tutors(update)
        engines = [student.engine, *(tutor.engine(student.engine) for tutor in student.engine.tutors)]
        for engine in engines:
            engine.engine_config.use_dynamic_bsz = update.rows is None
            # Of verl's budgets each rank has its own, and here micro-batches are to be the same on any number of them.
            engine.engine_config.max_token_len_per_gpu = update.budget // self.sequence_parallel
            engine.engine_config.infer_max_token_len_per_gpu = update.teacher_budget // self.sequence_parallel
            engine.engine_config.micro_batch_size_per_gpu = update.rows
            engine.engine_config.infer_micro_batch_size_per_gpu = update.rows
        share = len(update.samples) * self.sequence_parallel // self.world_size
        place = self.rank // self.sequence_parallel
        samples = update.samples[place * share : (place + 1) * share]
        flags = {"old_policy": update.old_policy, "policy": update.policy}
        counts = {
            "global_batch_size": len(update.samples),
            "opd_distillation_weight": update.distillation_weight,
            "opd_gate": update.gate,
        }
        batch = to_batch(samples, **flags, **counts, temperature=update.rollout_temperature)
        if update.likeliest:
            batch = self._told(update, batch)
            student.engine.tutors = tuple(dataclasses.replace(t, served=True) for t in student.engine.tutors)
        return student, self._with_old_log_probs(update, student.engine, batch)

    @torch.no_grad()
    def _told(self, update: Update, batch):
        """``batch`` with what verl's servers leave there: of every token but the first ids and log-probs, in the row
        in front of it, and a last row of zeros."""
        engine = self.worker(EngineSpec(update.teacher, True, update.param_dtype)).engine
        ids, log_probs = [], []
        with engine.eval_mode():
            for row in batch["input_ids"].unbind():
                found = engine.model_logits(row.tolist()).float().log_softmax(-1).topk(update.likeliest)
                found.indices[-1], found.values[-1] = 0, 0.0
                ids.append(found.indices.int())
                log_probs.append(found.values)
        batch = batch.exclude("teacher_input_ids", "lesson")
        batch["teacher_ids"] = torch.nested.as_nested_tensor(ids, layout=torch.jagged)
        batch["teacher_logprobs"] = torch.nested.as_nested_tensor(log_probs, layout=torch.jagged)
        return batch

    def _tutors(self, update: Update) -> tuple:
        """The one teacher of an update, or those of ``several``, of whom every second one has a pass of its own."""
        from opd_ext.bridge.teachers import Tutor

        student = self.worker(update.student).engine

        def tutor(
            model: str | None, objective: Objective, name: str = "", weight: float = 1.0, place: int = 0
        ) -> Tutor:
            objective = dataclasses.replace(objective, denominator=update.denominator)
            if model is None:
                return Tutor(update.kind or Live(), None, objective, name, weight)
            kind = Frozen() if update.trust is None else TrustRegion(update.trust)
            kind = External(model) if name in ("t1", "t3") else update.kind or kind
            own = self.worker(EngineSpec(model, True, update.param_dtype)).engine
            if update.served:
                own = self.served(student, model) if update.served is True else update.served
            return Tutor(kind, own, objective, name, weight, foreign=place in update.foreign)

        if not update.several:
            return (tutor(update.teacher, update.objective),)
        return tuple(tutor(m, o, f"t{i}", weight, i) for i, (m, o, weight) in enumerate(update.several))

    def _served(self, student: Any, model: str, weights: Any = None) -> Any:
        """The named actors of a model, as ``student`` reaches them: small requests, so that a batch takes several."""
        from opd_ext.bridge.served_teacher import ServedTeacher
        from opd_ext.bridge.teacher_server import Replicas
        from opd_ext.teacher.config import ServingConfig

        found = [name for name in ray.util.list_named_actors() if name in (model, f"{model}, again")]
        replicas = Replicas(str(self.folder / model.split(",")[0]), [ray.get_actor(name) for name in found])
        return ServedTeacher(student, replicas, ServingConfig(tokens_per_call=40), "opd.teacher", weights)

    def _with_old_log_probs(self, update: Update, engine, batch):
        """As :class:`Update` says of ``old``, ``alone`` and ``sampler_cap``; what a pass says is kept, too."""
        from verl.workers.utils.padding import response_from_nested

        from opd_ext.bridge import old_policy

        batch = batch.exclude("teacher_input_ids", "has_teacher", "span_label") if update.alone else batch
        self.scored = None
        if update.old == "given":
            return batch
        batch = batch.exclude("old_log_probs")
        if update.old == "update":
            from verl.utils import tensordict_utils as tu

            tu.assign_non_tensor(batch, **{old_policy.CURRENT: True})
            if update.sampler_cap is not None:
                tu.assign_non_tensor(batch, **{old_policy.CAP: update.sampler_cap})
            return batch
        self.scored = self.scores(engine, batch)
        old = response_from_nested(self.scored["log_probs"], batch["response_mask"])
        batch["old_log_probs"] = old
        if update.sampler_cap is not None:  # verl's formula, of which the trainer makes this field
            ratio = (old.values() - batch["rollout_log_probs"].values()).exp().clamp(max=update.sampler_cap)
            weights = ratio * batch["response_mask"].values()
            rows = list(weights.split(old.offsets().diff().tolist()))
            batch["rollout_is_weights"] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return batch

    def scores(self, engine, batch) -> dict[str, torch.Tensor]:
        """``log_probs`` and ``entropy`` as the old-log-prob pass has them, jagged like ``input_ids``."""
        from verl.utils import tensordict_utils as tu

        batch = batch.clone(recurse=False)
        config = engine.engine_config
        budget = {
            "use_dynamic_bsz": config.use_dynamic_bsz,
            "max_token_len_per_gpu": config.infer_max_token_len_per_gpu,
        }
        tu.assign_non_tensor(batch, calculate_entropy=True, micro_batch_size_per_gpu=2, **budget)
        with engine.eval_mode():
            return dict(engine.infer_batch(batch)["model_output"])

    def gradients(self, update: Update) -> dict:
        """Loss, mean metrics and whole gradients, as ``train_batch`` has them just before the optimiser step."""
        from verl.utils import tensordict_utils as tu

        student, batch = self._prepared(update)
        engine, config = student.engine, student.engine.engine_config
        tu.assign_non_tensor(
            batch,
            use_remove_padding=True,
            use_dynamic_bsz=config.use_dynamic_bsz,
            max_token_len_per_gpu=config.max_token_len_per_gpu,
            micro_batch_size_per_gpu=config.micro_batch_size_per_gpu,
            use_fused_kernels=False,
        )
        with engine.train_mode():
            engine.optimizer_zero_grad()
            output = engine.forward_backward_batch(batch, loss_function=_policy_loss(update) if update.policy else None)
            trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
            grads = {name: p.grad.full_tensor() for name, p in trained.items()}
        loss = torch.tensor(sum(output["loss"]), dtype=torch.float64)
        torch.distributed.all_reduce(loss)
        ours = {name: metric for name, metric in output["metrics"].items() if not name.startswith("actor/")}
        sums = {name: metric.aggregate() for name, metric in ours.items()}
        totals = torch.tensor(list(sums.values()), dtype=torch.float64)
        torch.distributed.all_reduce(totals)
        said = engine.recall() if update.old == "update" else self.scored
        return {
            "loss": loss.item() / self.world_size,
            "grads": grads,
            "said": {name: list(values.unbind()) for name, values in (said or {}).items()},
            "metrics": means(dict(zip(sums, totals.tolist(), strict=True))),
            "micro_batches": len(output["loss"]),
        }

    def train(self, update: Update) -> dict:
        """One update through verl's ``train_mini_batch``: reduced metrics and whole weights after it.

        The weights are put back, so that the next call starts from the checkpoint again.
        """
        from verl.utils import tensordict_utils as tu
        from verl.utils.metric import reduce_metrics

        student, batch = self._prepared(update)
        student.loss_fn = _unused_loss
        before = {name: shard.clone() for name, shard in self.local_shards(EngineSpec(update.model)).items()}
        size = len(update.samples)
        tu.assign_non_tensor(
            batch,
            global_batch_size=size,
            mini_batch_size=size,
            epochs=1,
            seed=1,
            dataloader_kwargs={"shuffle": False},
        )
        # Of ranks that share sequences the first reports.
        output = student.train_mini_batch(batch)
        metrics = {} if output is None else reduce_metrics(tu.get(output, "metrics"))
        weights = {name: p.full_tensor().detach().clone() for name, p in student.engine.module.named_parameters()}
        copy_shards(before, self.local_shards(EngineSpec(update.model)))
        return {"metrics": {name: float(value) for name, value in metrics.items()}, "weights": weights}

    def refresh(self, student: str, teacher: str, rate: float | None) -> dict:
        """What a refresh (``rate`` None: copy) does: shards before and after, the whole teacher, the next update.

        The teacher is then put back.
        """
        role = EngineSpec(teacher, forward_only=True)
        source, target = self.local_shards(EngineSpec(student)), self.local_shards(role)
        before = {name: shard.clone() for name, shard in target.items()}
        copy_shards(source, target) if rate is None else ema_shards(source, target, rate)
        after = {name: shard.clone() for name, shard in self.local_shards(role).items()}
        whole = {name: p.full_tensor() for name, p in self.worker(role).engine.module.named_parameters()}
        following = self.gradients(Update(make_samples([4, 6]), student, teacher))
        copy_shards(before, target)
        return {"before": before, "student": source, "after": after, "whole": whole, "next": following}

    def log_probs(self, model: str, samples: list[Sample], stock: bool) -> list[torch.Tensor]:
        """Per sequence, what ``infer_batch`` says of a batch without a teacher, from verl's engine or from ours."""
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

        if stock:
            engine = FSDPEngineWithLMHead(*self.configs(EngineSpec(model)))
            engine.initialize()
        else:
            engine = self.worker(EngineSpec(model)).engine
        batch = to_batch(samples, temperature=0.7, use_dynamic_bsz=True, max_token_len_per_gpu=64)
        batch = batch.exclude("teacher_input_ids", "has_teacher", "span_label")
        with engine.eval_mode():
            return list(engine.infer_batch(batch)["model_output"]["log_probs"].unbind())


def _policy_loss(update: Update) -> Callable:
    """verl's loss as its worker builds it: PPO's clip or another, mean over tokens."""
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import ppo_loss

    loss = PolicyLossConfig(loss_mode=update.policy_loss)
    config = FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, clip_ratio_high=0.28, policy_loss=loss
    )
    return functools.partial(ppo_loss, config=config)


def _unused_loss(**_: Any):
    raise AssertionError("A batch with a teacher must not reach verl's loss function.")
