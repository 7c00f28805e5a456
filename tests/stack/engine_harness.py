# SPDX-License-Identifier: Apache-2.0
"""Student and teacher engines in real FSDP2 processes over gloo, without Ray and without vLLM.

The parent describes updates (:class:`~tests.stack.engine_inputs.Update`) and gets back what they did; verl's own
training worker builds the engines in the children. verl is imported there only: it resolves its platform at import,
from the environment.
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
from opd_ext.teacher.kinds import External, Frozen, Live, TrustRegion
from tests.stack.engine_inputs import EngineSpec, Sample, Update, make_samples, to_batch

LEARNING_RATE = 1e-2
DEADLINE_S = 300  # for all updates of one spawn: some 15 s of imports and a few seconds of work


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

        wide = "fp64" if spec.param_dtype == "fp64" else "fp32"  # of what is kept and added up; fp64: see `wide_floats`
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
                model_dtype=wide,
                mixed_precision={"param_dtype": spec.param_dtype, "reduce_dtype": wide, "buffer_dtype": wide},
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

    def train(self, update: Update, back: bool = True) -> dict:
        """One update through verl's ``train_mini_batch``: reduced metrics and whole weights after it.

        With ``back`` the weights are put back, so that the next call starts from the checkpoint again.
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
        if back:
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
