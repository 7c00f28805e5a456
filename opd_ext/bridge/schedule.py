# SPDX-License-Identifier: Apache-2.0
"""The teachers of a run as its trainer sees them: what each is shown, when each moves, whether each is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opd_ext.bridge.teacher_inputs import Desk
from opd_ext.config.checks import foreign_tokenizers
from opd_ext.config.schema import OPDConfig
from opd_ext.context import build_context

if TYPE_CHECKING:
    from opd_ext.bridge.trainer import OPDTrainer


def desks(opd: OPDConfig, tokenizer: Any, stops: Sequence[int]) -> list[Desk]:
    """What each teacher is shown, and by which tokenizer it reads, in the order of ``opd.views``.

    Args:
        tokenizer, stops: of the student, and the ids that end its responses.
    """
    found, foreign = [], foreign_tokenizers(opd, tokenizer, stops)
    for view in opd.views:
        spans = view.opd.divergence.active_spans if opd.credit.annotates else None
        own = foreign.get(str(view.opd.teacher.path)) if view.opd.teacher.foreign else None
        reads = tokenizer if own is None else own.teacher.tokenizer
        found.append(Desk(build_context(view.opd.context, reads), spans, view.name, own))
    return found


def contexts(opd: OPDConfig) -> str:
    """What the teachers read, in a few words, for the state of a checkpoint."""
    views = [view for view in opd.views if view.opd.context.present]
    return "; ".join(f"{view.name}: {view.opd.context}" if view.name else str(view.opd.context) for view in views)


def refresh(trainer: OPDTrainer, metrics: dict, updates: int) -> None:
    """After the optimiser step, before saving and weight sync; used from the next step on (released CRISP code).

    Not if no step will use it any more. Each of several teachers moves on its own schedule; weights that some of them
    share move once.

    Args:
        metrics: gets version, age and whether it moved, of each teacher.
        updates: optimiser steps of the batch: verl skips those whose gradient is not finite, and a batch that nothing
            trains on has none.
    """
    step, opd, state = trainer.global_steps, trainer.opd, trainer.state
    used_again = opd.schedule(step + 1)[0] > 0
    before = {name: state.version(name) for name in opd.teacher_weights}
    for view in opd.views:
        if not view.opd.teacher.present:
            continue
        kind, weights = view.opd.teacher.kind, view.weights
        version = kind.version(step, 0 if weights is None else before[weights])
        share = kind.share(step, updates) if used_again else 0.0
        if share > 0 and weights is not None and state.version(weights) == before[weights]:
            trainer.actor_rollout_wg.refresh_teacher(share, weights)
            state.refreshed(weights, step)
        metrics[f"{view.place}/version"] = float(version)
        metrics[f"{view.place}/age"] = step - 1.0 - version
        metrics[f"{view.place}/refreshed"] = float(share > 0)
    moving = [
        metrics[f"{view.place}/age"] for view in opd.views if view.opd.teacher.present and view.opd.teacher.kind.moves
    ]
    if opd.teachers and moving:  # by which alarms know that a teacher has changed
        metrics["teacher/age"] = min(moving)


def guard(trainer: OPDTrainer, metrics: dict) -> None:
    """Stop on a teacher that predicts next to nothing: its weights were lost on the way.

    Raises:
        RuntimeError: its mean entropy is close to that of the uniform distribution.
    """
    limit = trainer.opd.max_teacher_entropy
    for view in trainer.opd.views:
        entropy = metrics.get(f"{view.place}/entropy" if view.name else "opd/teacher_entropy", 0.0)
        share = entropy / math.log(len(trainer.tokenizer))
        if limit is not None and share > limit:
            raise RuntimeError(
                f"The {f'teacher {view.name}' if view.name else 'teacher'}'s entropy is {share:.0%} of log V at step "
                f"{trainer.global_steps}: its weights are not those of a trained model. Check the model path or the "
                "checkpoint, or raise opd.max_teacher_entropy."
            )
