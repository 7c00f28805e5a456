# SPDX-License-Identifier: Apache-2.0
"""Keys of verl that must agree with `opd`, or that this trainer cannot follow; each refusal is one sentence."""

from omegaconf import DictConfig

from opd_ext.config.devices import check_replicas, check_there, pools
from opd_ext.config.schema import OPDConfig
from opd_ext.config.sequence_parallel import check_sequence_parallel, sequence_parallel
from opd_ext.config.served import check_server
from opd_ext.config.teachers import model_weights, trains_adapter
from opd_ext.errors import ConfigError, one_of, positive


def check_teacher(opd: OPDConfig, config: DictConfig, backends: set[str]) -> None:
    """The reference engine as the teacher, verl's teacher servers, the initial model beside adapters.

    Args:
        opd: as a run with this teacher alone would have it.
        backends: of all teachers of the run.
    """
    model_dtypes = [config.actor_rollout_ref[part].fsdp_config.model_dtype for part in ("ref", "actor")]
    # A teacher's adapter is kept in float32, whatever the model's dtype is.
    whole = opd.teacher.path is not None or not trains_adapter(config)
    if opd.teacher.kind.accumulates and whole and model_dtypes[0] != model_dtypes[1]:
        raise ConfigError(
            f"opd.teacher.weights={opd.teacher.weights} accumulates small changes: set "
            f"actor_rollout_ref.ref.fsdp_config.model_dtype to {model_dtypes[1]}, the student's."
        )
    if opd.teacher.backend == "server":
        check_server(opd, config)
    elif opd.teacher.backend == "vllm" and opd.teacher.kind.moves and trains_adapter(config):
        raise ConfigError(
            f"opd.teacher.backend=vllm with weights={opd.teacher.weights} beside a LoRA student would serve a "
            "whole model for an adapter on the student's own base: set backend=engine."
        )
    elif config.distillation.enabled and "server" not in backends:
        raise ConfigError("distillation.enabled=true starts verl's teacher servers: set opd.teacher.backend=server.")
    if opd.divergence.extrapolation != 1.0:
        _check_extrapolation(opd, config)
    if opd.context.kind == "feedback" and config.actor_rollout_ref.rollout.n < 2:
        _check_lonely_feedback(opd)
    if opd.credit.rollout_cap is not None and not config.actor_rollout_ref.rollout.calculate_log_probs:
        raise ConfigError("opd.credit.rollout_cap needs actor_rollout_ref.rollout.calculate_log_probs=true.")


def _check_lonely_feedback(opd: OPDConfig) -> None:
    """A group of one has no other rollout to show: without feedback no rollout ever has a teacher."""
    if not opd.context.args.get("include_feedback", True) and opd.context.args.get("exclude_own_success", True):
        raise ConfigError(
            "actor_rollout_ref.rollout.n=1 with opd.context.include_feedback=false never has anything to show a "
            "teacher: sample at least 2, or include feedback."
        )


def _check_extrapolation(opd: OPDConfig, config: DictConfig) -> None:
    """ExOPD compares the teacher with the initial model, which is at hand where adapters leave it untouched."""
    wrong = {
        "opd.divergence.support=sampled": opd.divergence.support != "sampled",
        "opd.teacher.backend=engine": opd.teacher.backend == "server",
        "opd.context.kind=same": opd.context.kind != "same",
        "actor_rollout_ref.model.lora_rank": config.actor_rollout_ref.model.lora_rank == 0,
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ConfigError(f"opd.divergence.extrapolation={opd.divergence.extrapolation} needs {found[0]}: set it.")


def check_policy(opd: OPDConfig, config: DictConfig) -> None:
    """The policy term's loss, advantages and correction."""
    policy, algorithm = opd.policy, config.algorithm
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if actor.policy_loss.loss_mode != policy.loss:
        raise ConfigError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode={actor.policy_loss.loss_mode} must be opd.policy.loss="
            f"{policy.loss}; leave it as the interpolation ${{opd.policy.loss}}."
        )
    if algorithm.adv_estimator == "grpo" and rollout.n < 2:
        raise ConfigError("actor_rollout_ref.rollout.n must be at least 2: a group of one has no relative advantage.")
    if opd.distils and algorithm.filter_groups.enable:
        raise ConfigError(
            "algorithm.filter_groups.enable=true drops groups of equal rewards, from which the teacher still teaches: "
            "set it to false."
        )
    if opd.distils and (actor.use_kl_loss or algorithm.use_kl_in_reward):
        raise ConfigError("The reference engine holds the teacher: set use_kl_loss and use_kl_in_reward to false.")
    if config.critic.enable:
        raise ConfigError("critic.enable=true: this trainer has no critic; set it to false and adv_estimator to grpo.")
    if algorithm.adv_estimator == "gae":
        raise ConfigError("algorithm.adv_estimator=gae needs a critic, which this trainer has not: set grpo.")
    if policy.prompt_mean != (actor.loss_agg_mode == "token-sum"):
        raise ConfigError(
            "opd.policy.prompt_mean=true and actor_rollout_ref.actor.loss_agg_mode=token-sum belong together: the "
            "advantages carry the denominators; set both or neither."
        )
    _check_correction(opd, config)
    if policy.loss == "cispo":
        _check_cispo(config)
    if policy.loss == "gspo":
        _check_gspo(config)


def _check_correction(opd: OPDConfig, config: DictConfig) -> None:
    """Which log-probs the ratio is anchored at, and what corrects for the sampler."""
    policy, algorithm, rollout = opd.policy, config.algorithm, config.actor_rollout_ref.rollout
    if not rollout.calculate_log_probs:
        correction = algorithm.rollout_correction and algorithm.rollout_correction.rollout_is is not None
        if policy.anchor == "sampler" or correction:
            raise ConfigError(
                "opd.policy.anchor=sampler and algorithm.rollout_correction.rollout_is need the sampler's log-probs: "
                "set actor_rollout_ref.rollout.calculate_log_probs=true."
            )
    bypass = bool(algorithm.rollout_correction and algorithm.rollout_correction.bypass_mode)
    if bypass != (policy.anchor == "sampler"):
        raise ConfigError(
            "algorithm.rollout_correction.bypass_mode=true anchors the ratio at the sampler's log-probs: set "
            "opd.policy.anchor=sampler with it, and old without."
        )
    if bypass and algorithm.rollout_correction.rollout_is is not None:
        raise ConfigError("opd.policy.anchor=sampler corrects for the sampler already: set rollout_is=null.")


def _check_cispo(config: DictConfig) -> None:
    """The guards of the paper (arXiv 2506.13585): no lower bound on the weight, no KL."""
    actor = config.actor_rollout_ref.actor
    low = actor.clip_ratio_low if actor.clip_ratio_low is not None else actor.clip_ratio
    if low < 1:
        raise ConfigError(
            f"actor_rollout_ref.actor.clip_ratio_low={low} gives CISPO a positive lower bound, which keeps pushing "
            "tokens that are unlikely already: set it to 1 or more (10 is off)."
        )
    if actor.use_kl_loss or config.algorithm.use_kl_in_reward:
        raise ConfigError("CISPO has no KL term: set actor.use_kl_loss and algorithm.use_kl_in_reward to false.")


def _check_gspo(config: DictConfig) -> None:
    """GSPO (arXiv 2507.18071) clips the ratio of a response, at 3e-4 and 4e-4; bounds of a token's would never act."""
    actor = config.actor_rollout_ref.actor
    for key in ("clip_ratio_low", "clip_ratio_high"):
        bound = actor[key] if actor[key] is not None else actor.clip_ratio
        if bound > 0.01:
            raise ConfigError(
                f"actor_rollout_ref.actor.{key}={bound} is of a token's scale, and opd.policy.loss=gspo clips the "
                "ratio of a whole response: set clip_ratio_low=3e-4 and clip_ratio_high=4e-4, the paper's."
            )


def check_lengths(opd: OPDConfig, config: DictConfig) -> None:
    """Prompt, response and pair fit into each other and into one micro-batch."""
    data, rollout = config.data, config.actor_rollout_ref.rollout
    one_of("opd.rollout.failed", opd.rollout.failed, ("stop", "zero"))
    batched, sequences = rollout.max_num_batched_tokens, rollout.max_num_seqs
    if batched is not None and batched < sequences:
        raise ConfigError(
            f"actor_rollout_ref.rollout.max_num_batched_tokens={batched} must be at least max_num_seqs={sequences}: "
            "vLLM decodes a token of each sequence at a time."
        )
    positive("opd.rollout.poll_interval", opd.rollout.poll_interval)
    positive("opd.rollout.grading_seconds", opd.rollout.grading_seconds)
    positive("opd.rollout.tool_seconds", opd.rollout.tool_seconds)
    positive("opd.rollout.silence_seconds", opd.rollout.silence_seconds)
    if not data.filter_overlong_prompts:
        raise ConfigError(
            "data.filter_overlong_prompts=false would cut prompts that are too long on the left, question and all, for "
            "the student alone: set it to true, or raise data.max_prompt_length."
        )
    if rollout.prompt_length != data.max_prompt_length:
        raise ConfigError(
            f"actor_rollout_ref.rollout.prompt_length={rollout.prompt_length} must be data.max_prompt_length="
            f"{data.max_prompt_length}: longer prompts would be cut, for the student alone; set the latter only."
        )
    for key in ("train_tokens", "val_tokens"):
        tokens = getattr(opd.rollout, key)
        positive(f"opd.rollout.{key}", tokens)
        if tokens > data.max_response_length:
            raise ConfigError(
                f"opd.rollout.{key}={tokens} exceeds data.max_response_length={data.max_response_length}; raise the "
                "latter, it bounds both phases."
            )
    longest = data.max_prompt_length + data.max_response_length
    if rollout.max_model_len is None or rollout.max_model_len < longest:
        raise ConfigError(
            f"actor_rollout_ref.rollout.max_model_len={rollout.max_model_len} is shorter than prompt + response "
            f"({data.max_prompt_length} + {data.max_response_length}); set it to at least {longest}."
        )
    shortest = data.max_prompt_length + opd.rollout.train_tokens
    if opd.max_pair_length is None or opd.max_pair_length < shortest:
        raise ConfigError(
            f"opd.max_pair_length={opd.max_pair_length} would drop full-length training rollouts; set it to at least "
            f"{shortest} (data.max_prompt_length + opd.rollout.train_tokens), better with room for the teacher's."
        )
    for part, key in (("actor", "ppo_max_token_len_per_gpu"), ("ref", "log_prob_max_token_len_per_gpu")):
        section = config.actor_rollout_ref[part]
        ranks = sequence_parallel(section)  # which share a sequence: verl's budget is of each
        if section[key] * ranks < opd.max_pair_length:
            shared = f", shared by {ranks} ranks," if ranks > 1 else ""
            raise ConfigError(
                f"actor_rollout_ref.{part}.{key}={section[key]}{shared} cannot hold one sequence of "
                f"opd.max_pair_length={opd.max_pair_length} tokens; raise the former or lower the latter."
            )


def check_engine(opd: OPDConfig, config: DictConfig) -> None:
    """Strategy, parallelism, packing and batch sizes."""
    if opd.warm_python and (opd.device != "cpu" or config.trainer.nnodes > 1):
        raise ConfigError("opd.warm_python=true is for a run on the CPU of one machine; set it to false.")
    if config.trainer.device != opd.device:
        raise ConfigError(f"trainer.device={config.trainer.device} must be opd.device={opd.device}: set the latter.")
    actor, ref, rollout = (config.actor_rollout_ref[part] for part in ("actor", "ref", "rollout"))
    if actor.strategy != "fsdp2" or ref.strategy != "fsdp2":
        raise ConfigError("actor_rollout_ref.actor.strategy and .ref.strategy must both be fsdp2.")
    _check_memory_savers(opd, config)
    model = config.actor_rollout_ref.model
    if not model.use_remove_padding:
        raise ConfigError("actor_rollout_ref.model.use_remove_padding must be true: there is one packed path only.")
    _check_lora(opd, model)
    if actor.ppo_epochs != 1:
        raise ConfigError(f"actor_rollout_ref.actor.ppo_epochs={actor.ppo_epochs} must be 1: rollouts train once.")
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    _check_shards(opd, config, ranks)
    check_sequence_parallel(opd, config, ranks)
    opd.plan.check("opd.plan")
    if opd.device == "cuda":
        check_there(opd.plan, pools(opd, config))
    check_replicas(config)
    size = sequence_parallel(actor)
    if actor.ppo_mini_batch_size * rollout.n % (ranks // size):
        groups = f"{ranks // size} groups of {size}" if size > 1 else f"{ranks}"
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size x rollout.n = {actor.ppo_mini_batch_size * rollout.n} must "
            f"be divisible by the {groups} trainer ranks."
        )
    if data_too_small := config.data.train_batch_size % actor.ppo_mini_batch_size:
        raise ConfigError(
            f"data.train_batch_size={config.data.train_batch_size} must be a multiple of "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} (remainder {data_too_small})."
        )
    if rollout.name != "vllm":
        raise ConfigError(f"actor_rollout_ref.rollout.name={rollout.name} is not supported: set it to vllm.")


def _check_memory_savers(opd: OPDConfig, config: DictConfig) -> None:
    """What verl fuses: where the loss is verl's own it works, and the chunked head has no place for it."""
    model = config.actor_rollout_ref.model
    if model.use_liger:
        raise ConfigError(
            "actor_rollout_ref.model.use_liger=true is not supported: liger-kernel replaces the model's forward pass "
            "and is not among the pinned packages; set it to false."
        )
    if model.use_fused_kernels:
        if opd.distils:
            raise ConfigError(
                "actor_rollout_ref.model.use_fused_kernels must be false: the chunked head replaces them."
            )
        if opd.head.fp32:
            raise ConfigError(
                "actor_rollout_ref.model.use_fused_kernels=true would pass by opd.head.fp32=true: set one of them to "
                "false."
            )
        if opd.selftest:
            raise ConfigError(
                "actor_rollout_ref.model.use_fused_kernels=true leaves no whole logits for the test in front of the "
                "first update: set opd.selftest=false."
            )


def _check_shards(opd: OPDConfig, config: DictConfig, ranks: int) -> None:
    """A teacher that moves is refreshed shard by shard, so both engines cut their weights alike (HSDP, too)."""
    sizes = [config.actor_rollout_ref[part].fsdp_config.fsdp_size for part in ("actor", "ref")]
    actor, ref = (size if 0 < size < ranks else ranks for size in sizes)
    if any(view.opd.teacher.path is None for view in model_weights(opd, config).values()) and actor != ref:
        raise ConfigError(
            f"actor_rollout_ref.actor.fsdp_config.fsdp_size={sizes[0]} must be actor_rollout_ref.ref.fsdp_config."
            f"fsdp_size={sizes[1]}: the teacher is refreshed shard by shard; set both alike."
        )


_HEADS = ("lm_head", "embed_tokens", "wte", "embed_out", "word_embeddings")


def _check_lora(opd: OPDConfig, model: DictConfig) -> None:
    """One adapter by verl's own keys, merged for vLLM, and not on the head, which the loss reads by itself."""
    if model.lora.rank > 0 or model.lora_adapter_path is not None:
        raise ConfigError(
            "LoRA is configured by actor_rollout_ref.model.lora_rank, without lora.rank and adapter path."
        )
    adapters = model.lora_rank > 0
    targets = [model.target_modules] if isinstance(model.target_modules, str) else list(model.target_modules or ())
    if adapters and (heads := [name for name in targets if name.rpartition(".")[2] in _HEADS]):
        raise ConfigError(
            f"actor_rollout_ref.model.target_modules={targets}: {', '.join(heads)} cannot have an adapter here, since "
            "the chunked head reads its matrix and tied embeddings would move along: take it out, or set all-linear."
        )
    if adapters and not model.lora.merge:
        raise ConfigError("LoRA needs actor_rollout_ref.model.lora.merge=true: vLLM receives merged weights.")
    for view in opd.views:
        teacher, weights = view.opd.teacher.kind, f"{view.key}.weights={view.opd.teacher.weights}"
        if teacher.needs_adapter and not adapters:
            raise ConfigError(
                f"{weights} is the model without its adapter: set actor_rollout_ref.model.lora_rank, or weights=frozen."
            )
