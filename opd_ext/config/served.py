# SPDX-License-Identifier: Apache-2.0
"""A teacher on verl's own servers (``opd.teacher.backend=server``): what they can be asked, and how they are told.

They score prompt + response once, as sampled, at temperature 1, with frozen weights. An answer has, of every token, its
own log-prob, or those of the k likeliest tokens in its place. So a divergence is exact if it looks at the sampled token
alone, or at the teacher's top k: whatever its kind, and whatever becomes of the other tokens.
"""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd_ext.config.schema import OPDConfig
from opd_ext.divergence.config import DivergenceTerm
from opd_ext.errors import ConfigError

TOPK_LOSS = "forward_kl_topk"
"""Of verl's losses the one for which its servers are asked for the likeliest tokens. The loss itself is ours."""

SAMPLED_LOSS = "k3"
"""One for which they are asked for the sampled token; verl's default."""

_LOSS = "distillation.distillation_loss"
_INFERENCE = "distillation.teacher_models.teacher_model.inference"


def check_server(opd: OPDConfig, config: DictConfig) -> None:
    """Refuse what verl's servers cannot be asked.

    Args:
        opd: as a run with this teacher alone would have it.

    Raises:
        ConfigError: one sentence.
    """
    temperature = config.actor_rollout_ref.rollout.temperature
    for name, term in _terms(opd).items():
        _check_support(f"opd.divergence{name}", term)
    wrong = {
        f"opd.teacher.weights={opd.teacher.weights} (external)": opd.teacher.weights != "external",
        f"opd.context.kind={opd.context.kind} (same)": opd.context.kind != "same",
        # The student's log-prob of the sampled token is at that temperature; a divergence has one of its own.
        f"actor_rollout_ref.rollout.temperature={temperature} (1.0)": opd.divergence.sampled and temperature != 1.0,
        "opd.policy (null)": opd.policy.present,
        "distillation.enabled=false (true)": not config.distillation.enabled,
    }
    served = config.distillation.teacher_models if config.distillation.enabled else None
    path = served.teacher_model.model_path if served is not None and len(served) == 1 else opd.teacher.path
    wrong[f"opd.teacher.path={opd.teacher.path} ({path}, which the servers have)"] = path != opd.teacher.path
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ConfigError(f"opd.teacher.backend=server cannot serve {found[0]}: the value it needs is in brackets.")
    _check_asked(opd, config)


def _terms(opd: OPDConfig) -> dict[str, DivergenceTerm]:
    return {f".{name}": term for name, term in opd.divergence.terms.items()} or {"": opd.divergence}


def _check_support(key: str, term: DivergenceTerm) -> None:
    """What is compared rests on the k likeliest tokens, or on the sampled one."""
    elsewhere = "or backend=vllm, which serves every divergence"
    if term.support == "full":
        raise ConfigError(
            f"{key}.support=full needs the teacher's whole distribution, and opd.teacher.backend=server gives the "
            f"log-probs of its likeliest tokens: set support=topk with k, {elsewhere}."
        )
    if term.support != "topk":
        return
    if term.kind not in ("forward_kl", "reverse_kl", "jsd"):
        raise ConfigError(
            f"{key}.kind={term.kind} takes the teacher's logits, and opd.teacher.backend=server gives log-probs of its "
            "likeliest tokens: set kind=forward_kl, reverse_kl or jsd, or backend=vllm."
        )
    if term.topk_by != "teacher":
        raise ConfigError(
            f"{key}.topk_by={term.topk_by} asks the teacher about the student's likeliest tokens, and "
            f"opd.teacher.backend=server names its own: set topk_by=teacher, {elsewhere}."
        )
    if term.temperature != 1.0 and term.tail != "renorm":
        raise ConfigError(
            f"{key}.temperature={term.temperature:g} with tail={term.tail} needs to know what all other tokens "
            "add up to, and opd.teacher.backend=server gives log-probs of the likeliest at 1: set temperature=1, or "
            "tail=renorm."
        )


def _check_asked(opd: OPDConfig, config: DictConfig) -> None:
    """The value of k is what verl asks its servers for, and they answer with log-probs of so many tokens."""
    loss, k = config.distillation.distillation_loss, opd.served_topk
    wanted = {} if k is None else {"loss_mode": TOPK_LOSS, "topk": k}
    for name, needed in wanted.items():
        if loss[name] != needed:
            raise ConfigError(
                f"{_LOSS}.{name}={loss[name]} must be {needed}, by which verl's servers are asked for {k} likeliest "
                "tokens: leave it as the presets of teacher_server have it."
            )
    if k is None and loss.loss_mode == TOPK_LOSS:
        raise ConfigError(
            f"{_LOSS}.loss_mode={TOPK_LOSS} asks verl's servers for likeliest tokens, and opd.divergence.support="
            f"sampled reads the sampled one: set loss_mode={SAMPLED_LOSS}, or support=topk."
        )
    inference = config.distillation.teacher_models.get("teacher_model", {}).get("inference", {})
    if str(inference.get("logprobs_mode")).endswith("logits"):
        raise ConfigError(f"{_INFERENCE}.logprobs_mode={inference.logprobs_mode} gives no log-probs: take it out.")
    most = OmegaConf.select(inference, "engine_kwargs.vllm.max_logprobs") if inference else None
    if k is not None and most is not None and most < k:  # -1, all of them for vLLM, is too few for verl
        raise ConfigError(
            f"{_INFERENCE}.engine_kwargs.vllm.max_logprobs={most} is too few for the opd.divergence.k={k} log-probs "
            "that it is asked for: take it out, verl sets it."
        )


# ---------------------------------------------------------------------- presets of teacher_server


def _asked(opd: Mapping[str, Any]) -> int | None:
    """The largest k of the teacher on verl's servers, in a configuration that nobody has checked; None: no top k."""
    shared = opd.get("teacher")
    own = shared.get("backend") if isinstance(shared, Mapping) else None
    teachers = opd.get("teachers")
    divergence = opd.get("divergence")
    for said in teachers.values() if isinstance(teachers, Mapping) else ():
        if isinstance(said, Mapping) and said.get("backend", None if "weights" in said else own) == "server":
            divergence = said.get("divergence") or divergence
    if not isinstance(divergence, Mapping):
        return None
    spans = [term for name in ("key", "error") if isinstance(term := divergence.get(name), Mapping)]
    found = [term.get("k") for term in spans or [divergence] if term.get("support") == "topk"]
    return max((k for k in found if isinstance(k, int)), default=None)


OmegaConf.register_new_resolver("served_topk", lambda *, _root_: _asked(_root_.opd) or 1, replace=True)
OmegaConf.register_new_resolver(
    "served_loss", lambda *, _root_: SAMPLED_LOSS if _asked(_root_.opd) is None else TOPK_LOSS, replace=True
)
