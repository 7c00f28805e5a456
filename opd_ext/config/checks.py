# SPDX-License-Identifier: Apache-2.0
"""Combinations that are refused before any process is started, each in one sentence that says what to change."""

import dataclasses
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from opd_ext.config.schema import OPDConfig, load
from opd_ext.context.contexts import build_context, context_names, get_context
from opd_ext.credit.annotate import annotator_names, get_annotator
from opd_ext.credit.credits import CreditInputs, credit_names, get_credit
from opd_ext.divergence.config import DivergenceTerm
from opd_ext.divergence.divergences import divergence_names, get_divergence
from opd_ext.errors import ConfigError, check_options, one_of, parameters, positive
from opd_ext.objective.reduction import REDUCTIONS
from opd_ext.teacher.vocabulary import check_same_ids

TEACHER_WEIGHTS = ("live", "base", "frozen", "periodic", "ema", "trust_region", "external")
SUPPORTS = ("full", "topk", "sampled")
CHOICES = {
    "opd.device": ("cpu", "cuda"),
    "opd.console": ("table", "full"),
    "opd.reduction": REDUCTIONS,
    "opd.denominator": ("trained", "distilled"),
    "opd.teacher.weights": TEACHER_WEIGHTS,
    "opd.teacher.backend": ("engine", "server"),
    "opd.divergence.gradient": ("auto", "direct", "policy"),
    "opd.credit.inactive_span": ("nonspan", "literal"),
    "opd.policy.gate": ("none", "complement", "untaught"),
    "opd.policy.anchor": ("old", "sampler"),
}


def check(config: DictConfig) -> OPDConfig:
    """Refuse what cannot work, before any process is started, and return the typed `opd` section.

    Args:
        config: the whole composed configuration.

    Raises:
        ConfigError: one sentence that names the key and the allowed values.
    """
    opd = load(config.opd)
    opd.import_external_libs()  # they may register what the next check looks up
    for key, allowed in CHOICES.items():
        _, *path = key.split(".")
        section = opd if len(path) == 1 else getattr(opd, path[0])
        if section is not None:
            one_of(key, getattr(section, path[-1]), allowed)
    positive("opd.head.chunk_size", opd.head.chunk_size)
    if opd.distils:
        _check_teacher(opd, config)
        _check_context(opd)
        _check_divergence(opd, config)
        _check_credit(opd, config)
    else:
        _check_absent_teacher(opd)
    if opd.policy is not None:
        _check_policy(opd, config)
    _check_lengths(opd, config)
    _check_engine(opd, config)
    return opd


# ---------------------------------------------------------------------- the five places


def _check_absent_teacher(opd: OPDConfig) -> None:
    if opd.policy is None:
        raise ConfigError("opd.divergence and opd.policy are both null: there is nothing to train; set one of them.")
    for name in ("teacher", "context"):
        if getattr(opd, name) is not None:
            raise ConfigError(f"opd.{name} needs a divergence: set opd.divergence, or opd.{name}=null.")


def _check_teacher(opd: OPDConfig, config: DictConfig) -> None:
    teacher = opd.teacher
    if teacher is None or opd.context is None:
        raise ConfigError("opd.divergence needs a teacher: set opd.teacher and opd.context.")
    positive("opd.teacher.interval", teacher.interval, zero=True)
    if teacher.weights in ("ema", "trust_region") and not 0 < teacher.rate <= 1:
        raise ConfigError(f"opd.teacher.rate={teacher.rate} must be in (0, 1]: the share of the student mixed in.")
    if (teacher.weights == "external") != (teacher.path is not None):
        raise ConfigError("opd.teacher.path belongs to weights=external and to no other: set both or neither.")
    model_dtypes = [config.actor_rollout_ref[part].fsdp_config.model_dtype for part in ("ref", "actor")]
    if teacher.weights == "ema" and model_dtypes[0] != model_dtypes[1]:
        raise ConfigError(
            "opd.teacher.weights=ema accumulates small changes: set actor_rollout_ref.ref.fsdp_config.model_dtype to "
            f"{model_dtypes[1]}, the student's."
        )
    if teacher.backend == "server":
        _check_server(opd, config)
    elif config.distillation.enabled:
        raise ConfigError("distillation.enabled=true starts verl's teacher servers: set opd.teacher.backend=server.")


def _check_server(opd: OPDConfig, config: DictConfig) -> None:
    """verl's servers score prompt + response once, as sampled, at temperature 1, with frozen weights."""
    temperature = config.actor_rollout_ref.rollout.temperature
    wrong = {
        f"opd.teacher.weights={opd.teacher.weights} (external)": opd.teacher.weights != "external",
        f"opd.context.kind={opd.context.kind} (same)": opd.context.kind != "same",
        f"opd.divergence.support={opd.divergence.support} (sampled)": opd.divergence.support != "sampled",
        f"actor_rollout_ref.rollout.temperature={temperature} (1.0)": temperature != 1.0,
        "opd.policy (null)": opd.policy is not None,
        "distillation.enabled=false (true)": not config.distillation.enabled,
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ConfigError(f"opd.teacher.backend=server cannot serve {found[0]}: the value it needs is in brackets.")


def _check_context(opd: OPDConfig) -> None:
    one_of("opd.context.kind", opd.context.kind, context_names())
    options = {entry.name for entry in dataclasses.fields(get_context(opd.context.kind))} - {"tokenizer"}
    check_options("opd.context", opd.context.kind, opd.context.args, options)
    try:
        build_context(opd.context)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"opd.context: {error}") from None
    if opd.context.kind == "same" and opd.teacher.weights == "live":
        raise ConfigError(
            "opd.context.kind=same with opd.teacher.weights=live compares the student with itself (loss 0); choose "
            "another context or other teacher weights."
        )
    if opd.context.kind == "label" and not opd.annotates:
        raise ConfigError("opd.context.kind=label shows what an annotator found: set opd.credit.annotator.kind.")


def _check_divergence(opd: OPDConfig, config: DictConfig) -> None:
    divergence = opd.divergence
    terms = {f".{name}": getattr(divergence, name) for name in ("key", "error") if getattr(divergence, name)}
    if terms and opd.credit.kind != "spans":
        raise ConfigError("opd.divergence.key and .error are for annotated spans: set opd.credit.kind=spans.")
    for name, term in (terms or {"": divergence}).items():
        _check_term(f"opd.divergence{name}", term)
    if any(term.support == "sampled" for term in terms.values()):
        raise ConfigError("opd.divergence.key and .error compare distributions: set their support to full or topk.")
    sampled = divergence.support == "sampled"
    if divergence.gradient == "policy" and not sampled:
        raise ConfigError(
            f"opd.divergence.gradient=policy with support={divergence.support} has zero expected gradient, because "
            "that divergence does not depend on the sampled token; set gradient=direct, or support=sampled."
        )
    if divergence.extrapolation != 1.0:
        _check_extrapolation(opd, config)
    if divergence.gradient == "direct" and sampled:
        raise ConfigError(
            "opd.divergence.gradient=direct with support=sampled loses the teacher, whose log-prob is a constant; set "
            "gradient=policy, or support=full."
        )


def _check_extrapolation(opd: OPDConfig, config: DictConfig) -> None:
    """ExOPD compares the teacher with the initial model, which is at hand where adapters leave it untouched."""
    wrong = {
        "opd.divergence.support=sampled": opd.divergence.support != "sampled",
        "opd.teacher.backend=engine": opd.teacher.backend != "engine",
        "opd.context.kind=same": opd.context.kind != "same",
        "actor_rollout_ref.model.lora_rank": config.actor_rollout_ref.model.lora_rank == 0,
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ConfigError(f"opd.divergence.extrapolation={opd.divergence.extrapolation} needs {found[0]}: set it.")


def _check_term(key: str, term: DivergenceTerm) -> None:
    one_of(f"{key}.support", term.support, SUPPORTS)
    one_of(f"{key}.kind", term.kind, [name for name in divergence_names() if not name.startswith("topk_")])
    if term.support == "sampled":
        if term.kind != "reverse_kl":
            raise ConfigError(f"{key}.kind={term.kind} has no form on the sampled token: set reverse_kl.")
        if term.clip is not None or term.temperature != 1.0:
            raise ConfigError(f"{key}.clip and .temperature are for divergences of distributions, not support=sampled.")
        return
    if term.registered not in divergence_names():
        raise ConfigError(f"{key}.support=topk is not defined for kind={term.kind}: set support=full.")
    if (term.support == "topk") != (term.k is not None):
        raise ConfigError(f"{key}.k belongs to support=topk and to no other: set both or neither.")
    one_of(f"{key}.topk_by", term.topk_by, ("student", "teacher"))
    one_of(f"{key}.tail", term.tail, ("bucket", "renorm", "none"))
    one_of(f"{key}.clip_mode", term.clip_mode, ("vocab_max", "token_scale", "none"))
    positive(f"{key}.temperature", term.temperature)
    if term.k is not None:
        positive(f"{key}.k", term.k)
    if term.clip is not None:
        positive(f"{key}.clip", term.clip)
    if (term.kind == "jsd") != (term.beta is not None) and term.kind in ("jsd", "forward_kl", "reverse_kl"):
        raise ConfigError(f"{key}.beta belongs to kind=jsd and to no other: set both or neither.")
    if term.beta is not None and not 0 < term.beta < 1:
        raise ConfigError(
            f"{key}.beta={term.beta} must lie strictly between 0 and 1; for an end choose kind=forward_kl or "
            "kind=reverse_kl."
        )
    allowed = parameters(get_divergence(term.registered), skip=2)
    check_options(key, term.kind, term.branch(None).kind_args, allowed)


def _check_credit(opd: OPDConfig, config: DictConfig) -> None:
    credit = opd.credit
    one_of("opd.credit.kind", credit.kind, credit_names())
    check_options("opd.credit", credit.kind, credit.args, parameters(get_credit(credit.kind), skip=1))
    positive("opd.credit.weight", credit.weight, zero=True)
    for name in ("importance_cap", "rollout_cap", "decay"):
        if getattr(credit, name) is not None:
            positive(f"opd.credit.{name}", getattr(credit, name))
    if credit.hold is not None:
        positive("opd.credit.hold", credit.hold, zero=True)
        if opd.policy is None:
            raise ConfigError("opd.credit.hold lets the divergence fade: set opd.policy, which is to take over.")
    if credit.rollout_cap is not None and not config.actor_rollout_ref.rollout.calculate_log_probs:
        raise ConfigError("opd.credit.rollout_cap needs actor_rollout_ref.rollout.calculate_log_probs=true.")
    if credit.importance_cap is not None and opd.divergence.support == "sampled":
        raise ConfigError("opd.credit.importance_cap with support=sampled applies that ratio twice: set it to null.")
    if credit.kind == "spans" and not opd.annotates:
        raise ConfigError("opd.credit.kind=spans needs spans: set opd.credit.annotator.kind.")
    if credit.annotator is not None:
        one_of("opd.credit.annotator.kind", credit.annotator.kind, annotator_names())
        try:
            get_annotator(credit.annotator.kind).check(credit.annotator)
        except ValueError as error:
            raise ConfigError(f"opd.credit.{error}.") from None
    _try_credit(opd)


def _try_credit(opd: OPDConfig) -> None:
    """Call the credit once on what this configuration will have, rather than find out in a worker."""
    absent = set()
    if opd.divergence.support == "sampled":
        absent.add("divergence")
    if opd.teacher.backend == "server":
        absent |= {"divergence", "teacher_entropy"}
    if not opd.annotates:
        absent.add("span_label")
    present = {name: torch.zeros(1, 1) for name in CreditInputs._fields if name not in absent}
    try:
        get_credit(opd.credit.kind)(CreditInputs(**present), **opd.credit.args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"opd.credit: {error}") from None


def _check_policy(opd: OPDConfig, config: DictConfig) -> None:
    policy, algorithm = opd.policy, config.algorithm
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if actor.policy_loss.loss_mode != policy.loss:
        raise ConfigError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode={actor.policy_loss.loss_mode} must be opd.policy.loss="
            f"{policy.loss}; leave it as the interpolation ${{opd.policy.loss}}."
        )
    if algorithm.adv_estimator == "grpo" and rollout.n < 2:
        raise ConfigError("actor_rollout_ref.rollout.n must be at least 2: a group of one has no relative advantage.")
    if policy.gate == "complement" and opd.credit.kind != "spans":
        raise ConfigError("opd.policy.gate=complement is about annotated spans: set opd.credit.kind=spans.")
    if opd.distils and algorithm.filter_groups.enable:
        raise ConfigError(
            "algorithm.filter_groups.enable=true drops groups of equal rewards, from which the teacher still teaches: "
            "set it to false."
        )
    if opd.distils and (actor.use_kl_loss or algorithm.use_kl_in_reward):
        raise ConfigError("The reference engine holds the teacher: set use_kl_loss and use_kl_in_reward to false.")
    if algorithm.adv_estimator == "gae":
        raise ConfigError("algorithm.adv_estimator=gae needs a critic, which this trainer has not: set grpo.")
    if policy.prompt_mean != (actor.loss_agg_mode == "token-sum"):
        raise ConfigError(
            "opd.policy.prompt_mean=true and actor_rollout_ref.actor.loss_agg_mode=token-sum belong together: the "
            "advantages carry the denominators; set both or neither."
        )
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
    if policy.shaping is not None:
        _check_shaping(opd)
    if policy.loss == "cispo":
        _check_cispo(config)


def _check_shaping(opd: OPDConfig) -> None:
    if not 0 < opd.policy.shaping < 1:
        raise ConfigError(f"opd.policy.shaping={opd.policy.shaping} must be in (0, 1): advantages keep their sign.")
    if not opd.distils or opd.divergence.support != "sampled" or opd.teacher.backend != "engine":
        raise ConfigError(
            "opd.policy.shaping multiplies advantages by the teacher's ratio on the sampled token: set opd.divergence "
            "with support=sampled, and teacher.backend=engine."
        )
    if opd.credit.kind != "uniform" or opd.credit.importance_cap or opd.credit.rollout_cap:
        raise ConfigError("opd.policy.shaping has no distillation term to give credit to: set opd.credit.kind=uniform.")


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


# ---------------------------------------------------------------------- lengths, engine, files


def _check_lengths(opd: OPDConfig, config: DictConfig) -> None:
    data, rollout = config.data, config.actor_rollout_ref.rollout
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
        if section[key] < opd.max_pair_length:
            raise ConfigError(
                f"actor_rollout_ref.{part}.{key}={section[key]} cannot hold one sequence of opd.max_pair_length="
                f"{opd.max_pair_length} tokens; raise the former or lower the latter."
            )


def _check_engine(opd: OPDConfig, config: DictConfig) -> None:
    if opd.warm_python and (opd.device != "cpu" or config.trainer.nnodes > 1):
        raise ConfigError("opd.warm_python=true is for a run on the CPU of one machine; set it to false.")
    actor, ref, rollout = (config.actor_rollout_ref[part] for part in ("actor", "ref", "rollout"))
    if actor.strategy != "fsdp2" or ref.strategy != "fsdp2":
        raise ConfigError("actor_rollout_ref.actor.strategy and .ref.strategy must both be fsdp2.")
    for part, section in (("actor", actor), ("ref", ref)):
        size = max(section.ulysses_sequence_parallel_size, section.fsdp_config.ulysses_sequence_parallel_size)
        if size > 1:
            raise ConfigError(
                f"actor_rollout_ref.{part}.ulysses_sequence_parallel_size={size} is not supported: teacher and student "
                "prompts differ in length, so their slices of a packed sequence do not align; set it to 1."
            )
    model = config.actor_rollout_ref.model
    if not model.use_remove_padding:
        raise ConfigError("actor_rollout_ref.model.use_remove_padding must be true: there is one packed path only.")
    if model.use_fused_kernels:
        raise ConfigError("actor_rollout_ref.model.use_fused_kernels must be false: the chunked head replaces them.")
    _check_lora(opd, model)
    if actor.ppo_epochs != 1:
        raise ConfigError(f"actor_rollout_ref.actor.ppo_epochs={actor.ppo_epochs} must be 1: rollouts train once.")
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    if actor.ppo_mini_batch_size * rollout.n % ranks:
        raise ConfigError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size x rollout.n = {actor.ppo_mini_batch_size * rollout.n} must "
            f"be divisible by the {ranks} trainer ranks."
        )
    if data_too_small := config.data.train_batch_size % actor.ppo_mini_batch_size:
        raise ConfigError(
            f"data.train_batch_size={config.data.train_batch_size} must be a multiple of "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} (remainder {data_too_small})."
        )
    if rollout.name != "vllm":
        raise ConfigError(f"actor_rollout_ref.rollout.name={rollout.name} is not supported: set it to vllm.")


def _check_lora(opd: OPDConfig, model: DictConfig) -> None:
    """Adapters train in the student alone; the model without them is a teacher that costs no memory."""
    if model.lora.rank > 0 or model.lora_adapter_path is not None:
        raise ConfigError(
            "LoRA is configured by actor_rollout_ref.model.lora_rank, without lora.rank and adapter path."
        )
    adapters = model.lora_rank > 0
    if adapters and not model.lora.merge:
        raise ConfigError("LoRA needs actor_rollout_ref.model.lora.merge=true: vLLM receives merged weights.")
    if not opd.distils:
        return
    weights = opd.teacher.weights
    if weights == "base" and not adapters:
        raise ConfigError(
            "opd.teacher.weights=base is the model without its adapter: set actor_rollout_ref.model.lora_rank, or "
            "weights=frozen."
        )
    if adapters and weights not in ("base", "live", "external"):
        raise ConfigError(
            f"opd.teacher.weights={weights} with LoRA is not supported; choose base (the initial model, which the "
            "adapter leaves untouched), live or external."
        )


def check_inputs(config: DictConfig) -> None:
    """Refuse a run whose model or data files do not exist on this machine (remote paths are left to verl).

    Raises:
        ConfigError: naming the missing path and how to get it.
    """
    hint = " Make it with `opd data tinymath`." if config.opd.get("world") else ""
    paths = [("actor_rollout_ref.model.path", config.actor_rollout_ref.model.path)]
    if config.opd.teacher is not None and config.opd.teacher.get("path"):
        paths.append(("opd.teacher.path", config.opd.teacher.path))
    for key in ("train_files", "val_files"):
        files = config.data[key]
        paths += [(f"data.{key}", file) for file in ([files] if isinstance(files, str) else files)]
    for key, path in paths:
        local = str(path).startswith(("/", "~", "."))
        if local and not Path(path).expanduser().exists():
            raise ConfigError(f"{key}={path} does not exist.{hint}")
    _check_vocabularies(config)


def _check_vocabularies(config: DictConfig) -> None:
    """An external teacher scores the ids of the student: compared here if both are on this machine, else later."""
    teacher, student = OmegaConf.select(config, "opd.teacher.path"), config.actor_rollout_ref.model.path
    if teacher is None or not (Path(teacher).is_dir() and Path(student).is_dir()):
        return
    from transformers import AutoTokenizer

    try:
        check_same_ids(AutoTokenizer.from_pretrained(student), teacher)
    except ValueError as error:
        raise ConfigError(str(error)) from None
