# SPDX-License-Identifier: Apache-2.0
"""Teacher-forced confidence of models in given responses: ``python -m opd_ext.bridge.confidence SPEC``.

verl's forward-only engine reads the same rows in the same batches for every model, so that two sweeps differ by the
weights and by nothing else: a token whose probability is near 1 changes sides on a rounding error.

The specification is JSON: fields of :class:`~opd_ext.tokens.finetuning.FineTuning` without ``model`` and ``out``, and
``models``: path of the result -> model. Each rank writes its share beside the result; rank 0 joins them.
"""

import dataclasses
import gc
import json
import sys
from pathlib import Path

import pandas as pd
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.device import get_torch_device
from verl.utils.distributed import destroy_global_process_group
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from opd_ext.bridge import engine as _engine  # noqa: F401  (registers OPDEngine in this process)
from opd_ext.bridge.finetune import join_group, sft_config
from opd_ext.tokens.dataset import TokenDataset
from opd_ext.tokens.finetuning import FineTuning
from opd_ext.tokens.tables import CONFIDENCE, TableError, read_table, write_table

ROWS = 32  # per call of the engine, and rank


def response_log_probs(data: TensorDict, log_probs: torch.Tensor) -> list[torch.Tensor]:
    """Float32 natural log-probs of the response tokens, [R_i] per row.

    verl's entry at position j of a row belongs to token j + 1, so response token t of a prompt of n stands at
    n + t - 1.

    Args:
        data: jagged ``response_mask`` [B, j1].
        log_probs: jagged [B, j1], as verl's engine returns it.
    """
    rows = zip(log_probs.unbind(), data["response_mask"].unbind(), strict=True)
    return [row[:-1][mask[1:].bool()].float().cpu() for row, mask in rows]


def _sweep(task: FineTuning, dataset: TokenDataset) -> tuple[int, int, pd.DataFrame | None]:
    """Confidence of ``task.model`` in this rank's share of the rows; collective.

    Returns:
        Data-parallel rank and size, and the rows of the share, None on a rank that only helps another to compute.
    """
    config = sft_config(task)
    engine_config = omega_conf_to_dataclass(config.engine)
    engine_config.forward_only = True
    worker = TrainingWorker(
        config=TrainingWorkerConfig(
            model_type="language_model",
            model_config=omega_conf_to_dataclass(config.model),
            engine_config=engine_config,
            optimizer_config=None,
            checkpoint_config=omega_conf_to_dataclass(config.checkpoint),
            profiler_config=None,
        )
    )
    worker.reset()
    rank, ranks = worker.engine.get_data_parallel_rank(), worker.engine.get_data_parallel_size()
    # All ranks call the engine equally often: where rows run out the last comes again, and its copies are dropped.
    share = -(-len(dataset) // ranks)
    mine = [min(rank * share + offset, len(dataset) - 1) for offset in range(share)]
    meta = {
        "use_remove_padding": True,
        "use_dynamic_bsz": True,
        "max_token_len_per_gpu": max(task.train["tokens_per_gpu"], task.train["max_length"]),
        "temperature": 1.0,
        "pad_mode": "no_padding",
        "compute_loss": False,
    }
    found = []
    for start in range(0, share, ROWS):
        rows = [dataset[index] for index in mine[start : start + ROWS]]
        data = tu.get_tensordict(SFTTensorCollator("no_padding")(rows), meta)
        output = worker.infer_batch(data)
        if worker.engine.is_mp_src_rank_with_outputs():
            found += response_log_probs(data, output["log_probs"])
    if not worker.engine.is_mp_src_rank_with_outputs():
        return rank, ranks, None
    logps = [logp.numpy() for logp in found]
    return rank, ranks, pd.DataFrame({"key": [dataset.keys[index] for index in mine], "logp": logps})


def main(spec: Path) -> None:
    """Write a table of :data:`~opd_ext.tokens.tables.CONFIDENCE` per model; those that exist are left alone."""
    content = json.loads(spec.read_text())
    models = {out: model for out, model in content.pop("models").items() if not Path(out).exists()}
    task = FineTuning(**content, model="", out="")
    join_group(task.device)
    dataset = TokenDataset(Path(task.samples), task.train["max_length"], task.stop_ids)
    if dataset.cut:
        limit = task.train["max_length"]
        raise TableError(f"{task.samples}: {dataset.cut} rows are longer than train.max_length={limit}.")
    for out, model in models.items():
        rank, ranks, table = _sweep(dataclasses.replace(task, model=model), dataset)
        # The module of an engine is in reference cycles: without this, every checkpoint stays on the device.
        gc.collect()
        get_torch_device().empty_cache()
        if table is not None:
            write_table(Path(f"{out}.rank{rank}"), table, CONFIDENCE)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            shares = [Path(f"{out}.rank{other}") for other in range(ranks)]
            joined = pd.concat([read_table(path, CONFIDENCE) for path in shares]).drop_duplicates("key")
            write_table(Path(out), joined, CONFIDENCE)
            for path in shares:
                path.unlink()
        torch.distributed.barrier()
    destroy_global_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
