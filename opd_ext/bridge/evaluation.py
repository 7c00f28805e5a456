# SPDX-License-Identifier: Apache-2.0
"""How a run validates: the rows that its protocol asks for, sampled, written down and counted apart.

The full protocol of all sets is phase ``val`` of ``metrics.jsonl``, of some sets it is ``sets``, the monitor is
``monitor``; each has its own metrics and files, so that no curve mixes them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import transfer_queue as tq
from torch.utils.data import DataLoader, Subset
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn

from opd_ext import files
from opd_ext.bridge import rollouts
from opd_ext.checkpoints import best
from opd_ext.protocol import NO_SOURCE, Protocol

if TYPE_CHECKING:
    from opd_ext.bridge.trainer import OPDTrainer

PREFIXES = ("val/", "monitor/")
"""How the names of metrics begin that are no training step's."""


def protocol(trainer: OPDTrainer) -> Protocol:
    """The protocol over the validation rows that verl has kept.

    Raises:
        ConfigError: it names a set that they do not have.
    """
    dataset: Any = trainer.val_dataset
    found = (dataset[i] for i in range(len(dataset)))
    rows = [(row.get("data_source", NO_SOURCE), rollouts.plain(row["raw_prompt"])) for row in found]
    return Protocol(trainer.opd.validation, trainer.config.actor_rollout_ref.rollout.val_kwargs.n, rows)


def validate(trainer: OPDTrainer) -> dict[str, float]:
    """What is due at this step: everything before and after training, or where nothing is trained.

    A run that has collapsed ends here, so this is after training, too.
    """
    step, plan = trainer.global_steps, trainer.protocol
    whole = step == 0 or step >= trainer.total_training_steps or bool(trainer.config.trainer.val_only)
    due = plan.due(step, whole)
    metrics = _measure(trainer, due)
    problems = sum(p.monitored for p in plan.problems) or len(plan.problems)
    if collapsed := best.collapse(best.validations(trainer.run_dir), problems, trainer.opd.stop_on_collapse):
        trainer.log.note(collapsed)
        trainer.total_training_steps = step
        if due != plan.sources:
            metrics |= _measure(trainer, plan.sources)
    return metrics


def _measure(trainer: OPDTrainer, due: Collection[str]) -> dict[str, float]:
    """Sample, write down and count: the sets that are due, and the monitor."""
    step, plan, folder = trainer.global_steps, trainer.protocol, trainer.run_dir / "generations"
    asked = plan.asked(due)
    metrics: dict[str, float] = {}
    if not asked:  # a resumed run begins between two validations, and verl wants to hear something
        metrics["val/asked"] = 0.0
        return metrics
    rows, places = _sample(trainer, asked)
    lost = trainer.account(rows, sum(asked.values()), "val" if due else "monitor")
    if monitored := [row for row in rows if plan.monitors(places[row["uid"]], row["sample"])]:
        files.write_jsonl(folder / f"monitor_{step}.jsonl", monitored)
        found = rollouts.summarise_by_source(monitored, "monitor") | ({} if due else lost)
        trainer.log.record("monitor", step, found)
        metrics |= found
    if due:
        whole = due == plan.sources
        full = rows if whole else [row for row in rows if plan.problems[places[row["uid"]]].source in due]
        files.write_jsonl(folder / f"{'val' if whole else 'sets'}_{step}.jsonl", full)
        found = rollouts.summarise_by_source(full, "val") if whole else rollouts.summarise_sources(full, "val")
        trainer.log.record("val" if whole else "sets", step, found | lost)
        metrics |= found | lost
    return metrics


def _sample(trainer: OPDTrainer, asked: dict[int, int]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows in the order of problems and samples, and which problem each ``uid`` is."""
    step, plan, dataset = trainer.global_steps, trainer.protocol, trainer.val_dataset
    places = {f"v{step:06d}p{i:05d}": i for i in asked}
    uids = iter(places)
    rows: list[dict[str, Any]] = []
    size = trainer.config.data.val_batch_size or len(asked)
    for batch_dict in DataLoader(Subset(dataset, list(asked)), batch_size=size, collate_fn=collate_fn):
        names = [next(uids) for _ in batch_dict["raw_prompt"]]
        problems = [places[name] for name in names]
        if trainer.opd.validation.prompt == "teacher":
            batch_dict["raw_prompt"] = _instructed(trainer, batch_dict)
        batch_dict["uid"] = np.array(names, dtype=object)
        batch_dict["first_draw"] = np.array([plan.problems[i].first_draw for i in problems], dtype=object)
        batch_dict["__rollout_n__"] = np.array([asked[i] for i in problems], dtype=object)  # verl samples so often
        batch = tu.get_tensordict(batch_dict)
        tu.assign_non_tensor_data(batch, "global_steps", step)
        tu.assign_non_tensor_data(batch, "validate", True)
        tags = [{"is_prompt": True, "status": "pending", "global_steps": step} for _ in names]
        tq.kv_batch_put(keys=names, partition_id="val", tags=tags)
        trainer.agent_loop_manager.generate_sequences(batch)
        done, _ = trainer.take("val", len(names))
        rows += rollouts.read_rows(done, trainer.tokenizer, trainer.opd.rollout.val_tokens, trainer.stops)
        tq.kv_clear(keys=done.keys, partition_id=done.partition_id)
    rows.sort(key=lambda row: (row["uid"], row["sample"]))
    return rows, places


def _instructed(trainer: OPDTrainer, batch: dict[str, Any]) -> np.ndarray:
    """The prompts as the teacher would read them, of a context that shows nothing of a problem."""
    asked = zip(batch["raw_prompt"], batch["extra_info"], strict=True)
    shown = [trainer.desks[0].context.messages({"raw_prompt": prompt, "extra_info": info}) for prompt, info in asked]
    prompts = np.empty(len(shown), dtype=object)  # of lists: numpy would make a table of equally long ones
    prompts[:] = shown
    return prompts
