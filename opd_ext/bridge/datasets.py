# SPDX-License-Identifier: Apache-2.0
"""What verl's data sets lack: the columns that a set without reference answers leaves out; the steps that they give."""

from collections.abc import Sized
from typing import Any

from omegaconf import DictConfig
from verl.utils.dataset.rl_dataset import RLHFDataset

_DEFAULTS = {"data_source": "data", "reward_model": {"ground_truth": None}}  # None: not graded


def complete(*datasets: Any) -> None:
    """Add ``data_source`` and ``reward_model`` where they are missing: verl reads both of every row.

    Without a reference answer a rollout is not graded, see ``OPDAgentLoopWorker._compute_score``.

    Args:
        datasets: of verl, changed in place; one of the user's own class holds what it likes.
    """
    for dataset in datasets:
        if isinstance(dataset, RLHFDataset):
            table = dataset.dataframe
            for name in sorted(_DEFAULTS.keys() - set(table.column_names)):
                table = table.add_column(name, [_DEFAULTS[name]] * len(table))
            dataset.dataframe = table


def counts(train: Sized, validation: Sized, config: DictConfig) -> tuple[str, float]:
    """How many prompts there are, and of how many, where verl's filter has dropped some. Ask before :func:`complete`.

    Args:
        config: the ``data`` section.

    Returns:
        Words for the console; the share that was dropped, of the set that lost more.
    """
    sizes, shares = [], []
    for name, dataset in (("train", train), ("val", validation)):
        there, most = len(dataset), config.get(f"{name}_max_samples", -1)
        if isinstance(dataset, RLHFDataset):
            rows = dataset.dataframe.data.num_rows  # of the table below the rows that were chosen
            there = min(rows, most) if most > 0 else rows
        dropped = there - len(dataset)
        lost = f" of {there:,} ({dropped:,} too long, or refused by the chat template)" if dropped else ""
        sizes.append(f"{len(dataset):,}{lost}")
        shares.append(dropped / there if there else 0.0)
    return f"{sizes[0]} prompts to train on, {sizes[1]} to validate", max(shares)


def settle_steps(config: DictConfig, dataset: Sized, steps: int) -> int:
    """How many steps the run has: ``steps``, or what ``trainer.total_epochs`` gives where that is fewer.

    verl's loop would end there without its last checkpoint and validation, and the rate would decay for steps that
    never come.

    Args:
        config: of the run; its optimiser is told.
        dataset: the prompts that are left to train on.

    Raises:
        ValueError: they do not fill one batch.
    """
    rows = len(dataset)
    per_epoch = rows // config.data.train_batch_size
    if per_epoch == 0:
        raise ValueError(
            f"{rows} prompts are left to train on, fewer than one batch of data.train_batch_size="
            f"{config.data.train_batch_size}: lower it, or add rows."
        )
    optim = config.actor_rollout_ref.actor.optim
    optim.total_training_steps = min(steps, per_epoch * config.trainer.total_epochs)
    return int(optim.total_training_steps)
