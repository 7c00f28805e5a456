# SPDX-License-Identifier: Apache-2.0
"""Real runs: Ray, a vLLM server and FSDP2 on the CPU, started as a user starts them.

The world of these tests is tinymath with a model that had a fraction of its pre-training: enough for a student and an
instructed teacher to differ. Runs are session fixtures, because starting the stack takes most of their time.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900  # of one run; a run takes one to two minutes on two cores

# Small batches and short responses: these tests are about mechanism.
SMALL = [
    "data.train_batch_size=8",
    "data.max_response_length=64",
    "data.val_max_samples=16",
    "actor_rollout_ref.actor.optim.lr=3e-4",
    "trainer.test_freq=-1",
    "trainer.val_before_train=false",
    "trainer.save_freq=1",
    "trainer.max_actor_ckpt_to_keep=null",
]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """``$OPD_HOME`` with a tinymath world whose base model trained on 9,000 chats (about a minute)."""
    from opd_ext.data.tinymath.pretrain import SPECS, make_corpus, make_model, pretrain
    from opd_ext.data.tinymath.splits import draw_splits, write_splits
    from opd_ext.data.tinymath.tokenizer import make_tokenizer

    home = tmp_path_factory.mktemp("home")
    folder = home / "tinymath"
    folder.mkdir()
    write_splits(draw_splits(0), folder)
    spec, tokenizer = dataclasses.replace(SPECS["base"], textbook_chats=3000, chats=6000), make_tokenizer()
    model = make_model(spec, tokenizer, 0)
    pretrain(model, make_corpus(tokenizer, spec, 0, set()), spec, 0, False, "base")
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return home


def command(run_dir: Path, *overrides: str) -> list[str]:
    """The command line of a run in ``run_dir``."""
    return [sys.executable, "-m", "opd_ext.train", *SMALL, f"opd.run_dir={run_dir}", *overrides]


def environment(world: Path) -> dict[str, str]:
    """This environment with the tests' world."""
    return {**os.environ, "OPD_HOME": str(world), "RAY_DEDUP_LOGS": "0"}


def train(world: Path, run_dir: Path, *overrides: str) -> str:
    """Run to the end and return what it printed; a failed run fails the test with the end of its output."""
    done = subprocess.run(
        command(run_dir, *overrides),
        env=environment(world),
        cwd=run_dir.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


def metrics(run_dir: Path, phase: str = "train") -> list[dict]:
    """The lines of ``metrics.jsonl`` of one phase, in order."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["phase"] == phase]


def shards(run_dir: Path, step: int, part: str) -> list[dict]:
    """Per rank, name -> local tensor of the checkpoint's ``teacher`` or ``actor`` weights."""
    import torch
    from torch.distributed.tensor import DTensor

    folder = run_dir / "checkpoints" / f"global_step_{step}" / part
    pattern = "world_size_*_rank_*.pt" if part == "teacher" else "model_world_size_*_rank_*.pt"
    ranks = [torch.load(file, weights_only=False, map_location="cpu") for file in sorted(folder.glob(pattern))]
    assert ranks, f"no {part} shards in {folder}"
    return [{k: v.to_local() if isinstance(v, DTensor) else v for k, v in rank.items()} for rank in ranks]
