# SPDX-License-Identifier: Apache-2.0
"""What the plan of a pipeline says: its stages by the formulas of a training run, checked by hand."""

import json
from functools import cache

import pandas as pd
import pytest
from typer.testing import CliRunner

from opd_ext.cli import app
from opd_ext.errors import ConfigError
from opd_ext.pipelines import command
from opd_ext.pipelines.sft import pipeline as sft
from opd_ext.pipelines.ssd import pipeline as ssd
from opd_ext.pipelines.t3s import pipeline as t3s
from opd_ext.plan.machines import GiB
from opd_ext.plan.stages import Place, estimate
from opd_ext.plan.work import Sampling

BUILD = {"ssd": ssd.build, "t3s": t3s.build, "sft": sft.build}
QWEN3_4B = 4_022_468_096  # parameters, as the hub says


@cache
def plan(name, *overrides):
    config = command.compose(name, overrides)
    return command.planned(config, BUILD[name](config, seen=False)[0], seen=False)


def only(plan, stage):
    (pair,) = plan.found[stage]
    return pair[1]


def test_every_stage_that_samples_trains_or_reads_has_an_estimate():
    ssd_plan, t3s_plan = plan("ssd", "recipe=ssd/qwen3_4b_instruct"), plan("t3s", "recipe=t3s/qwen3_8b")
    working = ("sample-", "train-", "evaluate-", "diagnose", "score", "confidence")
    for found, name, recipe in ((ssd_plan, "ssd", "ssd/qwen3_4b_instruct"), (t3s_plan, "t3s", "t3s/qwen3_8b")):
        stages = BUILD[name](command.compose(name, [f"recipe={recipe}"]), seen=False)[0].names
        assert list(found.found) == [stage for stage in stages if stage.startswith(working)]
    assert not ssd_plan.unknown and ssd_plan.seconds > 0


def test_the_memory_of_a_fine_tuning_is_that_of_an_estimate_by_hand():
    # GiB, of Qwen3-4B on eight ranks, 65,536 tokens each: fp32 weights, gradients and moments 7.5, layer inputs of 36
    # layers 11.25, whole bf16 logits 18.5 and their weight with its gradient 2.9, gathered weights 1.7, context 1.5.
    assert only(plan("ssd", "recipe=ssd/qwen3_4b_instruct"), "train-control").bytes / GiB == pytest.approx(
        43.4, rel=0.15
    )
    # Of Qwen3-8B, T3S's recipe: 46 to 56, by how many copies of the whole logits are alive at a time.
    pilot = only(plan("t3s", "recipe=t3s/qwen3_8b"), "train-pilot").bytes / GiB
    assert 46 * 0.95 < pilot < 56 * 1.05


def test_models_on_disk_are_counted_to_the_byte():
    found = plan("ssd", "recipe=ssd/qwen3_4b_instruct", "train.steps=100", "train.save_every=30")
    training = only(found, "train-control")
    assert training.disk == 4 * QWEN3_4B  # fp32, the last step's alone
    pilot = only(plan("t3s", "recipe=t3s/qwen3_8b"), "train-pilot")
    assert pilot.disk == 10 * only(plan("t3s", "recipe=t3s/qwen3_8b"), "train-t3s").disk  # every fifth of 50 steps


def test_sampling_counts_responses_of_all_temperatures_and_checkpoints(tmp_path):
    prompts = tmp_path / "prompts.parquet"
    pd.DataFrame({"prompt": range(30)}).to_parquet(prompts)
    found = plan("t3s", "recipe=t3s/qwen3_8b", f"prompts.file={prompts}", "bottleneck.n=4", "train.save_every=25")
    work = dict(found.found)["score"][0][0]
    assert (work.requests, work.known, work.loads) == (30 * 4 * 3, True, 3)  # the base, and steps 25 and 50
    evaluated = plan("ssd", "recipe=ssd/qwen3_4b_instruct", f"evaluate.file={prompts}", "evaluate.temperatures=[0.6,1]")
    (report, _), *_ = evaluated.found["evaluate-base"]
    assert report.requests == 30 * 10 * 2


def sampled(replicas=8, shard=64, requests=8 * 512):
    vllm = {"tensor_parallel_size": 1, "replicas": replicas, "args": {}, "dtype": "bfloat16", "shard": shard}
    work = Sampling("Qwen/Qwen3-4B", requests, True, 4096, 1000.0)
    assumed = command.compose("ssd", ["recipe=ssd/qwen3_4b_instruct"]).plan
    return estimate(work, Place("cuda", assumed, vllm | {"max_model_len": 8192}))


def test_engines_share_shards_and_wait_for_the_longest_of_each():
    assert sampled(replicas=1).seconds / sampled(replicas=8).seconds == pytest.approx(8, rel=0.1)
    assert sampled(shard=512).seconds < 0.6 * sampled(shard=32).seconds
    idle = sampled(shard=2048)
    assert [sentence.rpartition("set ")[2] for sentence in idle.advice] == ["vllm.shard=512."]
    assert not sampled(shard=512).advice


def test_a_fine_tuning_that_will_not_fit_names_settings_that_do():
    large = ("recipe=ssd/qwen3_4b_instruct", "plan.gpu=a100_40gb")
    (sentence,) = [each for each in plan("ssd", *large).advice if each.startswith("OUT OF MEMORY")]
    better = sentence.rpartition("set ")[2].rstrip(".").split(" or ")
    assert better
    for words in better:
        assert not [each for each in plan("ssd", *large, words).advice if each.startswith("OUT OF MEMORY")]


ONE_CARD = {"gpu_1": ("Qwen/Qwen3-1.7B", "h100"), "gpu_1_24gb": ("Qwen/Qwen3-0.6B", "rtx4090")}


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("scale", ONE_CARD)
def test_a_pipeline_on_one_card_fits_it(name, scale):
    model, card = ONE_CARD[scale]
    words = {"ssd": ("preset=qwen3_4b_instruct",), "t3s": ("teacher=Qwen/Qwen3-4B",), "sft": ("teacher=Qwen/Qwen3-4B",)}
    given = (f"scale={scale}", f"model={model}", "prompts.file=/nowhere/a.parquet", "evaluate.file=/nowhere/b.parquet")
    found = plan(name, *given, *words[name])
    assert (found.gpus, found.place.machine.name, found.advice, found.unknown) == (1, card, [], [])


def test_what_will_not_fit_is_told_of_sampling_and_reading_too():
    large = ("scale=gpu_1_24gb", "model=Qwen/Qwen3-0.6B", "teacher=Qwen/Qwen3-4B", "train.max_length=16384",
             "vllm.args.gpu_memory_utilization=0.95")  # fmt: skip
    told = [each for each in plan("t3s", *large).advice if each.startswith("OUT OF MEMORY in")]
    assert [each.split(":")[0][17:] for each in told] == ["sampling", "a pass over given responses"]
    share = told[0].rpartition("set ")[2].rstrip(".")
    again = plan("t3s", *large[:-1], share).advice
    assert not [each for each in again if "sampling" in each]


def test_a_model_that_nobody_knows_has_no_estimate_and_that_is_said():
    found = plan("t3s", "recipe=t3s/qwen3_8b", "traces_column=null", "teacher=somebody/something")
    assert found.unknown == ["sample-teacher"] and found.as_json()["stages"]["sample-teacher"] is None


def test_opd_plan_takes_the_words_of_a_pipeline(tmp_path):
    words = ["recipe=ssd/qwen3_4b_instruct", f"run_dir={tmp_path}"]
    by_plan = CliRunner().invoke(app, ["plan", "ssd", *words, "--gpu", "h100", "--json"])
    by_itself = CliRunner().invoke(app, ["ssd", *words, "plan.gpu=h100", "--dry-run", "--json"])
    assert by_plan.exit_code == by_itself.exit_code == 0
    assert json.loads(by_plan.stdout) == json.loads(by_itself.stdout)
    assert json.loads(by_plan.stdout)["machine"]["name"] == "h100"
    assert not list(tmp_path.iterdir())


def test_more_gpus_than_there_are_and_ranks_that_nodes_cannot_share_are_refused():
    with pytest.raises(ConfigError, match=r"train.ranks = 8 GPUs, and there are 1 node\(s\) of 4"):
        plan("ssd", "recipe=ssd/qwen3_4b_instruct", "plan.gpus_per_node=4", "vllm.replicas=4")
    with pytest.raises(ConfigError, match="train.ranks=8 must be a multiple of train.nodes=3"):
        plan("ssd", "recipe=ssd/qwen3_4b_instruct", "train.nodes=3")
