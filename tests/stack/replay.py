# SPDX-License-Identifier: Apache-2.0
"""Rollouts that are dumped by one run and loaded by another: what a comparison bit for bit rests on."""

from pathlib import Path

import torch


def replay(dump: Path, steps: int) -> list[str]:
    """verl's rollout replay: dump what is missing in ``dump``, load what is there."""
    return [
        "skip.rollout_tq.enable=true",
        f"skip.rollout_tq.dump_dir={dump}",
        f"skip.rollout_tq.steps=[{','.join(map(str, range(1, steps + 1)))}]",
        "trainer.experiment_name=replay",
        f"trainer.total_training_steps={steps}",
    ]


def in_prompt_order(dump: Path) -> None:
    """verl dumps in order of arrival and hands the groups out in the order of the file; put them in prompt order."""
    from verl.utils.tensordict_utils import index_select_tensor_dict

    for file in dump.rglob("tq_batch.pt"):
        payload = torch.load(file, weights_only=False)
        order = sorted(range(len(payload["keys"])), key=payload["keys"].__getitem__)
        payload["keys"], payload["tags"] = ([payload[name][i] for i in order] for name in ("keys", "tags"))
        payload["tensordict"] = index_select_tensor_dict(payload["tensordict"], order)
        torch.save(payload, file)
