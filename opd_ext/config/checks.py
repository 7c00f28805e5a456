# SPDX-License-Identifier: Apache-2.0
"""Combinations of two places that are refused before any process is started, each in one sentence.

What a place refuses of its own keys stands in its folder; what verl must agree on in :mod:`opd_ext.config.verl_keys`.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from opd_ext.config import verl_keys
from opd_ext.config.schema import OPDConfig, load
from opd_ext.config.unread import check_unread
from opd_ext.config.verl_values import check_values
from opd_ext.credit.credits import CreditInputs, get_credit
from opd_ext.errors import ConfigError, one_of, positive
from opd_ext.objective.objective import DENOMINATORS
from opd_ext.objective.reduction import REDUCTIONS
from opd_ext.teacher.vocabulary import check_same_ids


def check(config: DictConfig) -> OPDConfig:
    """Refuse what cannot work, before any process is started, and return the typed `opd` section.

    Args:
        config: the whole composed configuration.

    Raises:
        ConfigError: one sentence that names the key and the allowed values.
    """
    opd = load(config.opd)
    opd.import_external_libs()  # they may register what the next checks look up
    one_of("opd.device", opd.device, ("cpu", "cuda"))
    one_of("opd.console", opd.console, ("table", "full"))
    one_of("opd.reduction", opd.reduction, REDUCTIONS)
    one_of("opd.denominator", opd.denominator, DENOMINATORS)
    if opd.head.chunk_size is not None:
        positive("opd.head.chunk_size", opd.head.chunk_size)
    check_values(config)
    if opd.stop_on_collapse is not None and not 0 < opd.stop_on_collapse <= 1:
        raise ConfigError(f"opd.stop_on_collapse={opd.stop_on_collapse} must be in (0, 1], or null.")
    if opd.distils:
        _check_distillation(opd, config)
    else:
        _check_absent_teacher(opd)
    if opd.policy.present:
        opd.policy.check()
        _check_policy(opd)
        verl_keys.check_policy(opd, config)
    opd.validation.check(config.actor_rollout_ref.rollout.val_kwargs.n, config.trainer.test_freq)
    check_unread(opd, config)
    verl_keys.check_lengths(opd, config)
    verl_keys.check_engine(opd, config)
    return opd


def _check_absent_teacher(opd: OPDConfig) -> None:
    if not opd.policy.present:
        raise ConfigError("opd.divergence and opd.policy are both null: there is nothing to train; set one of them.")
    for name in ("teacher", "context"):
        if getattr(opd, name).present:
            raise ConfigError(f"opd.{name} needs a divergence: set opd.divergence, or opd.{name}=null.")


def _check_distillation(opd: OPDConfig, config: DictConfig) -> None:
    if not opd.teacher.present or not opd.context.present:
        raise ConfigError("opd.divergence needs a teacher: set opd.teacher and opd.context.")
    for place in (opd.teacher, opd.context, opd.divergence, opd.credit):
        place.check()
    if opd.context.kind == "same" and opd.teacher.kind.is_student:
        raise ConfigError(
            f"opd.context.kind=same with opd.teacher.weights={opd.teacher.weights} compares the student with itself "
            "(loss 0); choose another context or other teacher weights."
        )
    if opd.context.kind == "label" and not opd.credit.annotates:
        raise ConfigError("opd.context.kind=label shows what an annotator found: set opd.credit.annotator.kind.")
    if opd.divergence.terms and opd.credit.kind != "spans":
        raise ConfigError("opd.divergence.key and .error are for annotated spans: set opd.credit.kind=spans.")
    if opd.credit.importance_cap is not None and opd.divergence.sampled:
        raise ConfigError("opd.credit.importance_cap with support=sampled applies that ratio twice: set it to null.")
    if opd.credit.hold is not None and not opd.policy.present:
        raise ConfigError("opd.credit.hold lets the divergence fade: set opd.policy, which is to take over.")
    _try_credit(opd)
    verl_keys.check_teacher(opd, config)


def _try_credit(opd: OPDConfig) -> None:
    """Call the credit once on what this configuration will have, rather than find out in a worker."""
    absent = set()
    if opd.divergence.sampled:
        absent.add("divergence")
    if opd.teacher.backend == "server":
        absent |= {"divergence", "teacher_entropy"}
    if not opd.credit.annotates:
        absent.add("span_label")
    present = {name: torch.zeros(1, 1) for name in CreditInputs._fields if name not in absent}
    try:
        get_credit(opd.credit.kind)(CreditInputs(**present), **opd.credit.args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"opd.credit: {error}") from None


def _check_policy(opd: OPDConfig) -> None:
    if opd.policy.gate == "complement" and opd.credit.kind != "spans":
        raise ConfigError("opd.policy.gate=complement is about annotated spans: set opd.credit.kind=spans.")
    if not opd.policy.replaces_divergence:
        return
    if not opd.divergence.sampled or opd.teacher.backend != "engine":
        raise ConfigError(
            "opd.policy.shaping multiplies advantages by the teacher's ratio on the sampled token: set opd.divergence "
            "with support=sampled, and teacher.backend=engine."
        )
    if opd.credit.kind != "uniform" or opd.credit.reads_old_log_probs:
        raise ConfigError("opd.policy.shaping has no distillation term to give credit to: set opd.credit.kind=uniform.")


def check_inputs(config: DictConfig) -> None:
    """Refuse a run whose model or data files do not exist on this machine (remote paths are left to verl).

    Raises:
        ConfigError: naming the missing path and how to get it.
    """
    hint = " Make it with `opd data tinymath`." if config.opd.get("world_lib") else ""
    paths = [("actor_rollout_ref.model.path", config.actor_rollout_ref.model.path)]
    if config.opd.teacher is not None and config.opd.teacher.get("path"):
        paths.append(("opd.teacher.path", config.opd.teacher.path))
    for key in ("train_files", "val_files"):
        files = config.data[key]
        paths += [(f"data.{key}", file) for file in ([files] if isinstance(files, str) else files or ())]
    for key, path in paths:
        local = "://" not in str(path) and (key.startswith("data.") or str(path).startswith(("/", "~", ".")))
        if local and not Path(path).expanduser().exists():
            raise ConfigError(f"{key}={path} does not exist.{hint}")


def check_vocabularies(config: DictConfig) -> None:
    """An external teacher scores the ids of the student: compared here if both are on this machine, else later."""
    teacher, student = OmegaConf.select(config, "opd.teacher.path"), config.actor_rollout_ref.model.path
    if teacher is None or not (Path(teacher).is_dir() and Path(student).is_dir()):
        return
    from transformers import AutoTokenizer

    try:
        check_same_ids(AutoTokenizer.from_pretrained(student), teacher)
    except ValueError as error:
        raise ConfigError(str(error)) from None
