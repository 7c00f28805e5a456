# SPDX-License-Identifier: Apache-2.0
"""What a stage of a pipeline does, as far as memory, time and disk see it: it samples, trains, or reads.

Lengths are tokens. A ``model`` is whatever :func:`~opd_ext.plan.shapes.model_shape` can size: of a checkpoint that is
still to be made, the model that it is made from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_ext.plan.validation import asked_to_think, validation_sets


@dataclass(frozen=True)
class Sampling:
    """Responses that vLLM writes.

    Attributes:
        requests: how many.
        known: whether somebody has counted the prompts.
        limit, mean: of a response.
        loads: checkpoints that the engines read, one after the other.
    """

    model: str
    requests: int
    known: bool
    limit: int
    mean: float
    loads: int = 1


@dataclass(frozen=True)
class Training:
    """A fine-tuning.

    Attributes:
        train: the fields of :class:`opd_ext.pipelines.settings.TrainConfig`.
        mean: of a trained response.
        kept: models that stay.
    """

    model: str
    train: dict[str, Any]
    mean: float
    kept: int


@dataclass(frozen=True)
class Reading:
    """Passes without gradients over prompt and response.

    Attributes:
        sequences: of one pass.
        mean: of a response.
        passes: models, or checkpoints of one, that read all of them.
        ranks: processes that share sequences and weights.
        width: bytes of an element that they compute in.
        resident: models that are in memory at a time.
        logits: tokens whose logits are in memory at a time.
    """

    model: str
    sequences: int
    mean: float
    passes: int
    ranks: int
    width: int
    resident: int
    logits: int


def sampling(
    model: str,
    file: str | None,
    count: int | None,
    n: int,
    limit: int,
    template: Mapping[str, Any],
    mean: float | None,
    loads: int = 1,
) -> Sampling:
    """``n`` responses to each of the first ``count`` prompts of a file, which need not be here.

    Args:
        template: options of the chat template.
        mean: tokens of a response; None: by the file's name, the limit, and whether the model thinks.
    """
    (found,) = validation_sets([file or "unknown"], lambda _: n, limit, asked_to_think(template, model), mean)
    prompts = found.problems if count is None else min(count, found.problems)
    return Sampling(model, prompts * n, found.known or count is not None, limit, found.mean, loads)


Work = Sampling | Training | Reading
