# SPDX-License-Identifier: Apache-2.0
"""Combinations of two places that are refused before any process is started, each in one sentence.

What a place refuses of its own keys stands in its folder; what verl must agree on in :mod:`opd_ext.config.verl_keys`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from opd_ext.config import one_step_off, teachers, verl_keys
from opd_ext.config.schema import OPDConfig, load
from opd_ext.config.unread import check_unread
from opd_ext.config.verl_values import check_values
from opd_ext.context import build_context
from opd_ext.credit.credits import CreditInputs, get_credit
from opd_ext.credit.placement import OWN
from opd_ext.errors import ConfigError, one_of, positive
from opd_ext.objective.objective import DENOMINATORS
from opd_ext.objective.reduction import REDUCTIONS
from opd_ext.teacher.vocabulary import check_same_ids
from opd_ext.tokens.byte_spans import Foreign, Reader


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
    opd.alarms.check(config.trainer.save_freq)
    teachers.check(opd)
    opd.horizon.check()
    if opd.horizon.stop:
        _check_ungraded(opd)
    if opd.distils:
        for view in opd.views:
            with view.named():
                _check_distillation(view.opd, config, opd.backends)
        if len(opd.views) > 1:
            _check_several(opd)
    else:
        _check_absent_teacher(opd)
    if opd.policy.present:
        opd.policy.check()
        for view in opd.views:
            with view.named():
                _check_policy(view.opd)
        verl_keys.check_policy(opd, config)
    opd.validation.check(config.actor_rollout_ref.rollout.val_kwargs.n, config.trainer.test_freq)
    if opd.validation.prompt == "teacher":
        _check_instructed(opd)
    one_step_off.check(opd, config)
    check_unread(opd, config)
    verl_keys.check_lengths(opd, config)
    verl_keys.check_engine(opd, config)
    return opd


def _check_ungraded(opd: OPDConfig) -> None:
    """A rollout that is stopped has no answer, so nothing may rest on one."""
    kinds = {view.opd.context.kind for view in opd.views}
    readers = {
        "opd.policy": opd.policy.present,
        **{f"opd.context.kind={kind}": True for kind in ("feedback", "label") if kind in kinds},
        "opd.credit.annotator": opd.credit.annotates,
        "opd.stop_on_success": opd.stop_on_success is not None,
    }
    if reader := next((name for name, reads in readers.items() if reads), None):
        raise ConfigError(
            f"opd.horizon.stop=true leaves rollouts without an answer, and {reader} asks for their grade: set "
            "stop=false, which samples whole responses and trains as far as the horizon."
        )


def _check_absent_teacher(opd: OPDConfig) -> None:
    if not opd.policy.present:
        raise ConfigError("opd.divergence and opd.policy are both null: there is nothing to train; set one of them.")
    if opd.credit.placement != OWN:
        raise ConfigError(f"opd.credit.placement={opd.credit.placement} needs a divergence, whose credit it places.")
    for name in ("teacher", "context"):
        if getattr(opd, name).present:
            raise ConfigError(f"opd.{name} needs a divergence: set opd.divergence, or opd.{name}=null.")


def _check_distillation(opd: OPDConfig, config: DictConfig, backends: set[str]) -> None:
    """One teacher and what goes with it; ``backends`` are those of all teachers of the run."""
    if not opd.teacher.present or not opd.context.present:
        raise ConfigError("opd.divergence needs a teacher: set opd.teacher and opd.context.")
    if not opd.divergence.present:
        raise ConfigError("opd.divergence is null: say what is compared with this teacher.")
    for place in (opd.teacher, opd.context, opd.divergence, opd.credit):
        place.check()
    if opd.teacher.foreign:
        _check_foreign(opd, bool(config.actor_rollout_ref.rollout.multi_turn.enable))
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
    if opd.policy.replaces_divergence and (opd.credit.placement != OWN or opd.divergence.constant_advantage):
        raise ConfigError(
            "opd.policy.shaping has no distillation term: opd.credit.placement and opd.divergence.constant_advantage "
            "would change nothing."
        )
    _try_credit(opd)
    verl_keys.check_teacher(opd, config, backends)


def _check_foreign(opd: OPDConfig, several_turns: bool) -> None:
    """A teacher of another tokenizer has log-probs of the sampled text, and shares no vocabulary."""
    if several_turns:
        raise ConfigError(
            "opd.teacher.tokenizer=own reads one answer, and actor_rollout_ref.rollout.multi_turn.enable=true has "
            "turns, written in the student's control tokens: set it to false."
        )
    if not opd.divergence.sampled:
        raise ConfigError(
            "opd.teacher.tokenizer=own shares no vocabulary with the student, only the text: set "
            "opd.divergence={kind: reverse_kl, support: sampled}."
        )
    if opd.divergence.extrapolation != 1.0:
        raise ConfigError("opd.divergence.extrapolation starts from the student's own tokens: set it to 1.")
    if opd.policy.replaces_divergence:
        raise ConfigError(
            "opd.policy.shaping reads the teacher's ratio token by token, and opd.teacher.tokenizer=own has it of "
            "spans of text: choose another shaping, or a teacher of the student's tokenizer."
        )
    if opd.credit.annotates:
        raise ConfigError(
            "opd.credit.annotator marks the student's tokens, and opd.teacher.tokenizer=own reads others: set "
            "opd.credit.kind to another than spans."
        )
    if opd.context.args.get("ending") is not None:
        raise ConfigError(
            "opd.context.ending is of the student's chat template, and opd.teacher.tokenizer=own has another: set null."
        )


def _check_several(opd: OPDConfig) -> None:
    """What is one of the whole run, and would have to be one of each teacher."""
    views = opd.views
    if opd.policy.shapings and len({frozenset(view.opd.divergence.active_spans) for view in views}) > 1:
        raise ConfigError(
            "opd.policy.gate and .shaping look at the annotated spans that have a divergence: give all opd.teachers "
            "divergences for the same ones."
        )
    if opd.policy.replaces_divergence and any(view.weight != 1.0 for view in views):
        raise ConfigError("opd.policy.shaping has no distillation term: opd.teachers' weight would change nothing.")


def _check_instructed(opd: OPDConfig) -> None:
    """Validation may be asked with the teacher's words, not with what it knows of the answer."""
    if opd.teachers:
        raise ConfigError("opd.validation.prompt=teacher is of one teacher, and opd.teachers may say several things.")
    if not opd.distils or opd.context.kind == "same":
        raise ConfigError("opd.validation.prompt=teacher needs a context that says more than the student's prompt.")
    if build_context(opd.context).shows != ():
        raise ConfigError(
            f"opd.validation.prompt=teacher with opd.context.kind={opd.context.kind} would show the answer, or what is "
            "known of it, to the model under test: it is for contexts that say the same for all problems (instruction)."
        )


def _try_credit(opd: OPDConfig) -> None:
    """Call the credit once on what this configuration will have, rather than find out in a worker."""
    absent = set()
    if opd.divergence.sampled:
        absent.add("divergence")
    if opd.teacher.backend == "server":
        absent |= {"teacher_entropy"} | (set() if opd.divergence.sampled else {"teacher_log_prob"})
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
    if not opd.divergence.sampled or opd.teacher.backend == "server":
        raise ConfigError(
            "opd.policy.shaping multiplies advantages by the teacher's ratio on the sampled token: set opd.divergence "
            "with support=sampled, and teacher.backend=engine or vllm."
        )
    if opd.credit.kind != "uniform" or opd.credit.reads_old_log_probs:
        raise ConfigError("opd.policy.shaping has no distillation term to give credit to: set opd.credit.kind=uniform.")


def check_inputs(config: DictConfig) -> None:
    """Refuse a run whose model or data files do not exist on this machine (remote paths are left to verl).

    Raises:
        ConfigError: naming the missing path and how to get it.
    """
    level = str(config.opd.get("world")).partition("tinymath_")[2]
    hint = f" Make it with `opd data {' '.join(('tinymath', level)).rstrip()}`." if config.opd.get("world_lib") else ""
    paths = [("actor_rollout_ref.model.path", config.actor_rollout_ref.model.path)]
    paths += external_models(load(config.opd)).items()
    for key in ("train_files", "val_files"):
        files = config.data[key]
        paths += [(f"data.{key}", file) for file in ([files] if isinstance(files, str) else files or ())]
    for key, path in paths:
        if not isinstance(path, str):
            continue  # what is wrong with it is said where files are opened
        local = "://" not in path and (key.startswith("data.") or path.startswith(("/", "~", ".")))
        if local and not Path(path).expanduser().exists():
            raise ConfigError(f"{key}={path} does not exist.{hint}")


def check_vocabularies(config: DictConfig, opd: OPDConfig) -> None:
    """An external teacher scores the ids of the student: compared here if both are on this machine, else later."""
    student = config.actor_rollout_ref.model.path
    for key, teacher in external_models(opd, foreign=False).items():
        if not (Path(teacher).is_dir() and Path(student).is_dir()):
            continue
        from transformers import AutoTokenizer

        try:
            check_same_ids(AutoTokenizer.from_pretrained(student), teacher, key)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def foreign_tokenizers(opd: OPDConfig, tokenizer: Any, stops: Sequence[int]) -> dict[str, Foreign]:
    """Of teachers that have a tokenizer of their own, by their path; each has been found to keep the student's text.

    Args:
        tokenizer, stops: of the student, and the ids that end its responses.

    Raises:
        ConfigError: one of them does not, or the student's does not say which bytes its tokens are.
    """
    from transformers import AutoTokenizer

    found: dict[str, Foreign] = {}
    for key, path in external_models(opd, foreign=True).items():
        reader = Reader(tokenizer, "The student")
        found[path] = Foreign(reader, Reader(AutoTokenizer.from_pretrained(path), f"{key}={path}"), tuple(stops))
        found[path].check()
    return found


def external_models(opd: OPDConfig, foreign: bool | None = None) -> dict[str, str]:
    """Teachers that are other models, each path once, under the key that names it first.

    ``foreign``: only those that have a tokenizer of their own, or only those that have not.
    """
    found: dict[str, str] = {}
    for view in opd.views:
        if foreign is not None and view.opd.teacher.foreign is not foreign:
            continue
        if view.opd.teacher.path and view.opd.teacher.path not in found.values():
            found[f"{view.key}.path"] = view.opd.teacher.path
    return found
