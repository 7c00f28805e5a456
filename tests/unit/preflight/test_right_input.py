# SPDX-License-Identifier: Apache-2.0
"""What a preflight lets pass: what is right, what works but is told, and what a plan may not know yet."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from opd_ext.errors import ConfigError
from opd_ext.plan.run import read_run
from opd_ext.preflight import machine
from opd_ext.train import checked, compose_config, prepare_environment, validate

from .conftest import World, row, rows
from .wrong import ACTOR, MODEL, grader

RIGHT = {
    "as it is": (),
    "one step more than an epoch has": ("trainer.total_training_steps=9",),
    "no checkpoint and no validation": ("trainer.save_freq=-1", "trainer.test_freq=-1"),
    "epochs instead of steps": ("trainer.total_training_steps=null", "trainer.total_epochs=2"),
    "a rate of nothing": ("actor_rollout_ref.actor.optim.lr=0",),
    "ranks that share sequences": ("trainer.n_gpus_per_node=2", f"{ACTOR}.ulysses_sequence_parallel_size=2"),
    "two loggers": ("trainer.logger=[tensorboard,console]",),
    "a method alone": ("grpo",),
    "added keys that vLLM, an optimiser, a template, Ray and a grader read": (
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.max_num_seqs=8",
        "+actor_rollout_ref.actor.optim.override_optimizer_config.eps=1e-5",
        "+data.apply_chat_template_kwargs.thinking=true",
        "+ray_kwargs.ray_init.log_to_driver=false",
        "+reward.reward_kwargs.max_resp_len=64",
    ),
    "added keys that verl lists nowhere": (
        "+data.cache_dir=/tmp/cache",
        "+actor_rollout_ref.rollout.limit_images=2",
    ),
    "a method as an option": ("--method", "opsd"),
    "a method with blanks": ("method", "=", "sdpo"),
}


@pytest.mark.parametrize("words", RIGHT.values(), ids=RIGHT)
def test_right_input_starts(words, start, presets_composed_once):
    status, said, started, _ = start(*words)
    assert (status, len(started)) == (0, 1), said


@pytest.mark.parametrize("name", ["a b.parquet", "a=b.parquet", "é.parquet", "a(b).parquet", "日本.parquet"])
def test_a_path_that_a_shell_can_hold_needs_no_second_quotes(name, start, world):
    status, said, started, _ = start(f"data.train_files={world.parquet(rows(), name)}")
    assert (status, len(started)) == (0, 1), said
    assert started[0].data.train_files.endswith(name)


def test_lines_of_json_with_a_mark_in_front_are_data(start, world, presets_composed_once):
    lines = world.lines(rows())
    marked = world.file("marked.jsonl", b"\xef\xbb\xbf" + lines.read_bytes())
    for path in (lines, marked, world.file("list.json", json.dumps(rows()))):
        status, said, _, printed = start(f"data.train_files={path}", "--dry-run", "trainer.total_training_steps=2")
        assert status == 0 and "64 rows" in printed, said


# ---------------------------------------------------------------------- told, not refused


def test_epochs_that_end_a_run_before_its_steps_are_told(start, presets_composed_once):
    _, _, _, printed = start("trainer.total_training_steps=4", "trainer.total_epochs=1")
    assert "note: trainer.total_epochs=1 ends the run after 2 of 4 steps: 64 rows are 2 steps an epoch" in printed


def test_steps_decide_where_nobody_names_epochs(start, presets_composed_once):
    _, _, started, printed = start("trainer.total_training_steps=4")
    assert "note:" not in printed and started[0].trainer.total_epochs >= 2


def test_prompts_that_the_template_refuses_are_counted_with_its_words(start, world, presets_composed_once):
    """Gemma 2's template does so; verl drops such prompts without a word."""
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    refusing += "{{ messages[0]['content'] }}"
    path = world.model(lambda folder: (folder / "chat_template.jinja").write_text(refusing))
    asked = {"role": "user", "content": "1+1?"}
    systems = [row(i, prompt=[{"role": "system", "content": "Be brief."}, asked]) for i in range(24)]
    words = f"{MODEL}={path}", f"data.train_files={world.lines([*rows(40), *systems])}"
    status, _, _, printed = start(*words)
    assert status == 0
    assert "24 of 64 prompts that were rendered will be dropped, the chat template says: System role not" in printed
    status, said, _, _ = start(f"data.train_files={world.lines(2 * systems, 'all.jsonl')}", f"{MODEL}={path}")
    assert status == 2 and "the chat template refuses all of 48 prompts (System role not supported)" in said


def test_prompts_that_are_too_long_are_counted(start, world, presets_composed_once):
    long = [row(i, prompt=[{"role": "user", "content": "12+" * 400}]) for i in range(3)]
    _, _, _, printed = start(f"data.train_files={world.lines([*rows(61), *long])}")
    assert "3 of 64 prompts that were rendered will be dropped, the longest has" in printed


def test_tools_count_towards_a_prompts_length(start, world, presets_composed_once):
    template = "{{ tools }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path = world.model(lambda folder: (folder / "chat_template.jinja").write_text(template))
    tool = (
        "from verl.tools.function_tool import function_tool\n\n@function_tool()\ndef plus(a: int, b: int) -> int:\n"
        f"    '''Add two numbers. {'Both of them. ' * 40}\n\n    Args:\n        a: one.\n        b: other.\n    '''\n"
    )
    words = f"{MODEL}={path}", f"data.function_tool_path={world.file('tools.py', tool)}"
    status, said, _, _ = start(*words)
    assert status == 2 and "64 of 64 prompts are longer than data.max_prompt_length=192" in said


def test_a_thinking_switch_that_the_template_has_not_is_told(start, presets_composed_once):
    _, _, _, printed = start("data.apply_chat_template_kwargs={enable_thinking: false}")
    assert "note: The chat template has no enable_thinking" in printed


def test_a_teacher_that_ends_otherwise_is_told(start, world, presets_composed_once):
    def other_end(folder: Path) -> None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [371]}))

    words = "method=opd", f"opd.teacher.path={world.model(other_end)}"
    status, said, _, printed = start(*words)
    assert status == 0, said
    assert "note: The student ends with <|im_end|>, the teacher with <|endoftext|>" in printed


@pytest.mark.parametrize("written", ["parquet", "lines"])
def test_several_teachers_are_told_with_their_rows_and_who_has_none(start, world, presets_composed_once, written):
    """Of a field of more rows than are looked at otherwise."""
    data = getattr(world, written)(rows(2050, extra_info={"index": 0, "subject": "sums", "solution": "Count on."}))
    words = f"data.train_files={data}", "opd.teacher_key=subject"
    status, _, started, printed = start(*words, "opd.teachers={sums: {interval: 2}, idle: {weights: live}}")
    assert status == 0 and started
    assert "note: opd.teachers.idle has none of the rows" in printed and "opd.teachers.sums" not in printed


def test_data_without_reference_answers_trains_what_reads_no_grade(start, world, presets_composed_once):
    plain = world.parquet(rows(reward_model=..., data_source=...))
    status, said, started, printed = start(f"data.train_files={plain}", f"data.val_files={plain}")
    assert (status, len(started)) == (0, 1), said
    assert "data.train_files has no reward_model, so it is not graded and no accuracy is reported" in printed
    assert "data.val_files has no reward_model" in printed
    _, _, _, printed = start(f"data.train_files={plain}")
    assert "data.train_files has no reward_model" in printed and "data.val_files has no" not in printed


def test_a_grader_that_takes_its_time_is_told(start, world, presets_composed_once, monkeypatch):
    monkeypatch.setattr("opd_ext.preflight.reward.SECONDS", 0.05)
    slow = grader("import time\ndef compute_score(**kwargs):\n    time.sleep(1)\n    return 0.0")(world).split("\n")
    status, _, _, printed = start(*slow)
    assert status == 0 and "for one empty response" in printed


def test_an_asynchronous_grader_is_awaited(start, world, presets_composed_once):
    words = grader("async def compute_score(**kwargs): return {'acc': 1.0}")(world).split("\n")
    status, said, _, _ = start(*words)
    assert status == 2 and "without 'score'" in said
    words = grader("async def compute_score(**kwargs): return {'score': 1.0}")(world).split("\n")
    assert start(*words)[0] == 0


# ---------------------------------------------------------------------- the machine


def _checked(tmp_path, *words):
    with mock.patch.dict(os.environ):
        config = compose_config([f"opd.run_dir={tmp_path}", *words])
        return config, validate(config)


def test_devices_are_counted_where_the_run_starts(tmp_path):
    config, opd = _checked(tmp_path, "scale=node_8xh200")
    machine.check_devices(config, opd, count=lambda: 8)
    with pytest.raises(ConfigError, match="n_gpus_per_node=8 needs 8 GPUs and 2 are visible"):
        machine.check_devices(config, opd, count=lambda: 2)


def test_devices_of_a_served_teacher_are_counted_too(tmp_path):
    config, opd = _checked(tmp_path, "scale=node_8xh200", "teacher_server=vllm_node_8xh200")
    machine.check_devices(config, opd, count=lambda: 8)
    with pytest.raises(ConfigError, match="4 GPUs that train and 4 that serve the teacher are 8, and 7 are"):
        machine.check_devices(config, opd, count=lambda: 7)


def test_a_cpu_pretends_as_many_devices_as_the_parts_of_a_run_ask_for(tmp_path):
    """One trains, one samples, one serves the teacher: Ray is told of three, and their numbers are visible."""
    words = [f"opd.run_dir={tmp_path}", "asynchronous=separate_cpu", "teacher_server=vllm_cpu", "method=opd"]
    config = compose_config(words)
    with mock.patch.dict(os.environ):
        os.environ.pop("RAY_ADDRESS", None)
        prepare_environment(config, checked(config))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2"
    assert config.ray_kwargs.ray_init.num_gpus == 3


def test_a_cluster_may_have_what_this_machine_has_not(start, monkeypatch, presets_composed_once):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    status, said, _, _ = start("trainer.nnodes=2", "opd.device=cuda")
    assert status == 0, said


def test_a_cluster_that_was_killed_here_is_named_before_ray_tries_to_join_it(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    machine.check_cluster()
    note = tmp_path / "ray" / "ray_current_cluster"
    note.parent.mkdir()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        note.write_text(f"127.0.0.1:{listening.getsockname()[1]}")
        machine.check_cluster()
    with pytest.raises(ConfigError, match="does not answer .127.0.0.1:.*: run `ray stop`"):
        machine.check_cluster()
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    machine.check_cluster()


def test_a_plan_may_be_for_another_machine(start, presets_composed_once):
    status, said, _, printed = start(
        "scale=node_8xh200", f"{MODEL}=/elsewhere/model", "data.train_files=/elsewhere/train.parquet", "--dry-run"
    )
    assert status == 0, said
    assert "not on this machine: not looked at" in " ".join(printed.replace("│", " ").split())


def test_a_disk_without_room_for_one_checkpoint_is_refused(tmp_path):
    run = read_run(*_checked(tmp_path, "scale=node_8xh200", f"{MODEL}=Qwen/Qwen3-8B"))
    huge = dataclasses.replace(run, trained=10**15)
    findings = machine.Findings()
    with pytest.raises(ConfigError, match="A checkpoint takes .* GiB and .* has .* GiB free"):
        machine.check_room(huge, findings)
    machine.check_room(dataclasses.replace(huge, saves=0), findings)
    assert not findings.notes


def test_a_weight_beyond_the_transfer_bucket_is_refused_on_a_cpu_alone(start, world, presets_composed_once):
    """The embedding of SmolLM2-135M, 49,152 x 576 in fp32, is 108 MiB; the bucket of cpu_tiny has 64."""
    import torch
    from safetensors.torch import load_file, save_file

    def grow(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] = torch.zeros(49152, 576)
        save_file(tensors, folder / "model.safetensors")

    path = world.model(grow)
    bucket = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
    status, said, _, _ = start(f"{MODEL}={path}")
    assert (
        status == 2 and f"{bucket}=64 cannot hold model.embed_tokens.weight, which has 108 MiB: set it to 108" in said
    )
    assert start(f"{MODEL}={path}", f"{bucket}=108")[0] == 0


def test_a_run_without_home_finds_the_home_of_its_user():
    with mock.patch.dict(os.environ):
        del os.environ["HOME"]
        os.environ.pop("OPD_HOME", None)
        config = compose_config(["method=crisp"])
        assert config.opd.world == f"{Path.home()}/.cache/opd_ext/tinymath"
        assert os.environ["HOME"] == str(Path.home())


# ---------------------------------------------------------------------- the command


COMMANDS = {
    ("crips",): "opd train: method=crips does not exist. Did you mean crisp?\n",
    ("--method", "crisp", "data.train_files=nowhere.parquet"): "opd train: data.train_files=nowhere.parquet does not",
    ("crisp", "trainer.total_training_steps=ten"): "opd train: trainer.total_training_steps=ten must be a whole number",
}


@pytest.mark.parametrize("words", COMMANDS)
def test_the_command_says_one_sentence_and_ends_with_2(words, tmp_path):
    world = World(tmp_path)
    right = [f"{MODEL}={world.model()}", f"data.val_files={world.parquet(rows())}", "opd.warm_python=false"]
    command = [sys.executable, "-m", "opd_ext.cli", "train", *words, *right, f"opd.run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and COMMANDS[words] in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
