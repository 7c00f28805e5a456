# SPDX-License-Identifier: Apache-2.0
"""What a configuration says of a run's size: models, shards, batches, lengths, what is computed and what is kept."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd_ext.config.assumptions import PlanConfig
from opd_ext.config.devices import SAMPLE, Pool, of_verl, wanted
from opd_ext.config.old_policy import old_log_probs, updates, whole_entropies
from opd_ext.config.schema import OPDConfig
from opd_ext.config.sequence_parallel import sequence_parallel
from opd_ext.config.teachers import adapter_weights, model_weights
from opd_ext.errors import ConfigError
from opd_ext.plan.machines import Machine, machine
from opd_ext.plan.shapes import DTYPE_BYTES, ModelShape, model_shape
from opd_ext.plan.teachers import Served, asked, models, moving, projections, prompt, servers
from opd_ext.plan.validation import Validation, asked_to_think, mean_response, validation_sets
from opd_ext.protocol import ValidationConfig


@dataclass(frozen=True)
class Sharding:
    """How an engine holds its weights.

    Attributes:
        shards: ranks that hold a copy together; fewer than there are in HSDP.
        master, compute: bytes per element of the stored weights (so of gradients and moments) and of the passes.
        offloaded: parts that wait in host memory between updates: weights, optimizer.
        streamed: all of it stays in host memory, and travels layer by layer.
    """

    shards: int
    master: int
    compute: int
    offloaded: frozenset[str] = frozenset()
    streamed: bool = False


@dataclass(frozen=True)
class Run:
    """A run as its memory, time and disk see it. Lengths are tokens; batches count over all ranks.

    Attributes:
        student, teachers: models that the trainer's ranks hold; ``teachers`` are the sets of weights of their own here.
        scorer: the largest model that a teacher's pass runs through, if there is one: student, teacher or served.
        passes: model and mean prompt of every teacher that is asked here; each is taken to have as many rows.
        heads: elements of the vocabulary projections that these passes leave beside the student's.
        beside: what else verl lays out on devices of its own: the sampler, its teacher servers, a judge.
        servers: of teachers that are asked for hidden states.
        prompts, n, updates: of a step: prompts, responses of each, optimiser steps.
        limit, mean: of training responses.
        mean_prompt: as assumed, but no longer than the settings let one be.
        pair: prompt and response at most, the student's or the teacher's.
        budget, teacher_budget, score_budget: tokens of a micro-batch in update, teacher pass, old log-probs, per rank.
        sequence_parallel: ranks that share the tokens of a sequence (Ulysses).
        offloads: what layers keep for the backward pass waits in host memory, of all but the two that are at work.
        trained: parameters that have gradients.
        trained_tensors: tensors of them.
        adapter: parameters of a LoRA adapter, 0 without one.
        dense: logits of a micro-batch stand in memory whole, because verl's own loss reads them.
        temperature_copies: copies of these logits, 2 where a temperature divides them.
        dense_entropy: the update computes entropies from them.
        scores_old: the old policy's log-probs are computed anew.
        teaches: a teacher's pass precedes an update.
        validations, validation: how often all sets are validated in full, and what that samples.
        meanwhile: how often fewer samples, or all of them, are validated between the first step and the last.
        vllm_width: bytes of an element of vLLM's weights.
        cpu_cache: bytes for keys and values of a replica on a CPU.
        moving: teachers whose weights do not stay what they were, so that a checkpoint holds them.
        teacher_adapters: those that are an adapter on the student's base and move; a checkpoint holds them, too.
    """

    device: str
    machine: Machine
    assumed: PlanConfig
    nodes: int
    gpus_per_node: int
    student: ModelShape
    teachers: tuple[ModelShape, ...]
    scorer: ModelShape | None
    passes: tuple[tuple[ModelShape, int], ...]
    heads: int
    beside: tuple[Pool, ...]
    servers: tuple[Served, ...]
    sharding: Sharding
    teacher_sharding: Sharding
    tp: int
    vllm_share: float | None
    vllm_sequences: int
    vllm_length: int
    vllm_width: int
    cpu_cache: float
    vllm_sleeps: bool
    bucket: float
    prompts: int
    n: int
    updates: int
    limit: int
    mean: float
    mean_prompt: int
    thinks: bool
    pair: int
    budget: int
    teacher_budget: int
    score_budget: int
    sequence_parallel: int
    checkpointing: bool
    offloads: bool
    trained: int
    trained_tensors: int
    adapter: int
    adapter_tensors: int
    chunk: int
    fp32_head: bool
    dense: bool
    temperature_copies: int
    dense_entropy: bool
    scores_old: bool
    teaches: bool
    moving: tuple[ModelShape, ...]
    teacher_adapters: int
    steps: int
    validations: int
    validation: tuple[Validation, ...]
    meanwhile: tuple[tuple[int, tuple[Validation, ...]], ...]
    val_limit: int
    saves: int
    kept: int | None
    run_dir: str

    @property
    def held_adapters(self) -> int:
        """Bytes of the teachers' adapters, over all ranks that hold a copy together: in float32 or wider."""
        return self.teacher_adapters * self.adapter * max(4, self.sharding.master)

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def gpus(self) -> int:
        """Of the run, all its parts together."""
        return self.ranks + wanted(self.beside) + sum(server.devices for server in self.servers)

    @property
    def gpus_there(self) -> int:
        """That the machine is said to have; 0: nobody says."""
        nodes = self.assumed.nodes or max(self.nodes, *(pool.nodes for pool in self.beside), 1)
        return nodes * (self.assumed.gpus_per_node or 0)

    @property
    def replicas(self) -> int:
        """Of vLLM."""
        return max(1, (self.sampler.total if self.sampler else self.ranks) // self.tp)

    @property
    def sampler(self) -> Pool | None:
        """Devices that vLLM has to itself; None: it is on the trainer's."""
        return next((pool for pool in self.beside if pool.does == SAMPLE), None)

    @property
    def responses(self) -> int:
        """Of a step, over all ranks."""
        return self.prompts * self.n

    @property
    def rank_responses(self) -> int:
        """Of a mini-batch, on one rank."""
        return max(1, self.responses // self.updates * self.sequence_parallel // self.ranks)

    @property
    def rank_pair(self) -> int:
        """Tokens of the longest pair that one rank has to hold."""
        return -(-self.pair // self.sequence_parallel)


def read_run(config: DictConfig, opd: OPDConfig) -> Run | None:
    """The run of a checked configuration; None where the student's size is not known here."""
    ref = config.actor_rollout_ref
    actor, rollout, model, trainer = ref.actor, ref.rollout, ref.model, config.trainer
    student = model_shape(model.path)
    if student is None:
        return None
    ranks = trainer.nnodes * trainer.n_gpus_per_node
    taught = models(opd, student)
    if taught is None:
        return None
    adapters = adapter_weights(opd, config)
    adapter, adapter_tensors = student.adapter(model.lora_rank, model.target_modules)
    steps, thinks = _steps(config), _thinks(config)
    mean = opd.plan.mean_response or mean_response(opd.rollout.train_tokens, thinks)
    limit = opd.rollout.train_tokens
    if opd.horizon.stop:  # which a response that is shorter does not reach
        horizons = [opd.horizon.tokens(step, limit) for step in range(1, steps + 1)]
        mean, limit = sum(min(mean, tokens) for tokens in horizons) / steps, max(horizons)
    # verl's own loss, without the chunked head: of steps without a teacher, and so of all where there is none.
    dense = not opd.distils or not all(opd.schedule(step)[0] > 0 for step in (1, steps))
    old = old_log_probs(config, opd, updates(config))
    kept, every = trainer.max_actor_ckpt_to_keep, trainer.save_freq
    between = _between(config, steps)
    sets = validation_sets(
        config.data.val_files,
        lambda name: opd.validation.samples(name, rollout.val_kwargs.n),
        opd.rollout.val_tokens,
        thinks,
        opd.plan.mean_val_response,
    )
    return Run(
        device=opd.device,
        machine=machine(opd.plan.gpu, opd.device),
        assumed=opd.plan,
        nodes=trainer.nnodes,
        gpus_per_node=trainer.n_gpus_per_node,
        student=student,
        teachers=tuple(taught[name] for name in model_weights(opd, config)),
        scorer=max(taught.values(), key=lambda shape: shape.parameters) if opd.distils else None,
        passes=tuple((taught[view.name], prompt(view.opd)) for view in asked(opd)),
        heads=projections(opd, taught),
        beside=tuple(of_verl(config)[1:]),
        servers=servers(opd, taught, steps),
        sharding=_sharding(actor.fsdp_config, ranks),
        teacher_sharding=_sharding(ref.ref.fsdp_config, ranks),
        tp=rollout.tensor_model_parallel_size,
        vllm_share=rollout.gpu_memory_utilization if opd.device == "cuda" else None,
        vllm_sequences=rollout.max_num_seqs,
        vllm_length=rollout.max_model_len,
        vllm_width=4 if str(rollout.dtype) in ("float32", "float") else 2,
        cpu_cache=_cpu_cache(config) if opd.device == "cpu" else 0.0,
        vllm_sleeps=opd.device == "cuda" and rollout.free_cache_engine,
        bucket=rollout.checkpoint_engine.update_weights_bucket_megabytes * 2**20,
        prompts=config.data.train_batch_size,
        n=rollout.n,
        updates=config.data.train_batch_size // actor.ppo_mini_batch_size,
        limit=limit,
        mean=min(mean, limit),
        mean_prompt=min(opd.plan.mean_prompt, config.data.max_prompt_length),
        thinks=thinks,
        pair=opd.max_pair_length,
        budget=actor.ppo_max_token_len_per_gpu,
        teacher_budget=ref.ref.log_prob_max_token_len_per_gpu,
        score_budget=rollout.log_prob_max_token_len_per_gpu,
        sequence_parallel=sequence_parallel(actor),
        checkpointing=model.enable_gradient_checkpointing,
        offloads=model.enable_activation_offload,
        trained=adapter or student.parameters,
        trained_tensors=adapter_tensors or student.tensors,
        adapter=adapter,
        adapter_tensors=adapter_tensors,
        chunk=opd.head.rows(opd.device),
        fp32_head=opd.head.fp32,
        dense=dense,
        temperature_copies=1 if rollout.temperature == 1.0 else 2,
        dense_entropy=whole_entropies(config, old),
        scores_old=old == "pass",
        teaches=opd.asks,
        moving=tuple(taught[name] for name in moving(opd, steps) if name not in adapters),
        teacher_adapters=sum(view.opd.teacher.kind.moves for view in adapters.values()),
        steps=steps,
        validations=_validations(config, steps) - len(between),
        validation=sets,
        meanwhile=_meanwhile(opd.validation, sets, between),
        val_limit=opd.rollout.val_tokens,
        saves=-(-steps // every) if every > 0 else 0,
        kept=kept,
        run_dir=opd.run_dir,
    )


def _sharding(engine: DictConfig, ranks: int) -> Sharding:
    size = engine.fsdp_size
    parts = {"weights": engine.param_offload, "optimizer": engine.optimizer_offload}
    offloaded = frozenset(name for name, moved in parts.items() if moved)
    return Sharding(
        shards=size if 0 < size < ranks else ranks,
        master=dtype_bytes(engine.model_dtype),
        compute=dtype_bytes((engine.mixed_precision or {}).get("param_dtype", "bf16")),
        offloaded=offloaded,
        streamed=engine.offload_policy,
    )


def _cpu_cache(config: DictConfig) -> float:
    variables = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars") or {}
    return float(variables.get("VLLM_CPU_KVCACHE_SPACE", 0)) * 2**30


def dtype_bytes(name: Any) -> int:
    """Bytes of an element of a dtype by any of verl's names.

    Raises:
        ConfigError: verl has no such dtype.
    """
    if str(name) not in DTYPE_BYTES:
        raise ConfigError(f"dtype {name} does not exist; choose one of: {', '.join(sorted(DTYPE_BYTES))}.")
    return DTYPE_BYTES[str(name)]


def _steps(config: DictConfig) -> int:
    if config.trainer.val_only:
        return 0
    return config.trainer.total_training_steps or config.trainer.total_epochs


def _validations(config: DictConfig, steps: int) -> int:
    """Before the first step, and at every multiple; verl adds the last step."""
    trainer = config.trainer
    if trainer.val_only:
        return 1
    every = trainer.test_freq
    return int(bool(trainer.val_before_train)) + (-(-steps // every) if every > 0 else 0)


def _thinks(config: DictConfig) -> bool:
    return asked_to_think(config.data.apply_chat_template_kwargs, config.actor_rollout_ref.model.path)


def _between(config: DictConfig, steps: int) -> list[int]:
    """The steps of validations that are neither before nor after training."""
    every = config.trainer.test_freq
    return list(range(every, steps, every)) if every > 0 and not config.trainer.val_only else []


def _meanwhile(
    protocol: ValidationConfig, sets: tuple[Validation, ...], steps: list[int]
) -> tuple[tuple[int, tuple[Validation, ...]], ...]:
    """What is sampled at those steps, and how often: sets whose turn it is, and of the others the monitor's part."""
    counted = Counter(frozenset(each.name for each in sets if protocol.is_due(each.name, step)) for step in steps)
    few, found = protocol.monitor, []
    for due, count in counted.items():
        part = [each if each.name in due else replace(each, samples=0) for each in sets]
        if few is not None:
            part = [
                each if each.samples else replace(each, samples=min(each.problems, few.problems) * few.n)
                for each in part
            ]
        found.append((count, tuple(each for each in part if each.samples)))
    return tuple(found)
