# SPDX-License-Identifier: Apache-2.0
"""A process of a run is killed while rollouts are awaited: the run ends, and its last line says who died."""

import shlex
import subprocess
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import ray

from tests.stack.conftest import alone, command, finish, metrics

# Holds every rollout of step 2, so that the others of its step are still out when somebody dies.
GRADER = """
import time
from pathlib import Path
from opd_ext.tinymath.grader import compute_score as grade

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    calls = Path("{folder}/calls")
    with calls.open("a") as file:
        file.write(".")
    if len(calls.read_text()) > 40:  # those of step 1, and the first look at the grader
        Path("{folder}/waiting").touch()
        time.sleep({seconds})
    return grade(data_source, solution_str, ground_truth, extra_info, **kwargs)
"""
ENDS_IN_S = 60  # a look every 5 s, and what Ray and verl need to take everything down on two busy cores
HEAD_IN_S = 100  # a head may be silent for 40 s
RAY = Path(ray.__file__).parent / "core/src/ray"


def processes(root: int, title: str) -> list[psutil.Process]:
    """Those below ``root`` whose title begins so."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


@pytest.mark.parametrize(
    "title, name, extra",
    [
        pytest.param("ray::OPDAgentLoopWorker", "agent loop worker 0 is dead", [], marks=pytest.mark.slow),
        pytest.param("ray::RewardLoopWorker", "RewardLoopWorker reward_loop_worker_", [], marks=pytest.mark.slow),
        pytest.param("ray::vLLMHttpServer", "vLLMHttpServer ", [], marks=pytest.mark.slow),
        # Forked from a warm Python, the engine has no title of its own.
        pytest.param("VLLM::EngineCore", "EngineDeadError", ["opd.warm_python=false"], marks=pytest.mark.slow),
        pytest.param("ray::TeacherServer", "TeacherServer", ["teacher_server=vllm_cpu"], marks=pytest.mark.slow),
        pytest.param("ray::WorkerDict", "trainer rank 0 is dead", [], marks=pytest.mark.slow),
        pytest.param("ray::SimpleStorageUnit", "queue 1 is dead", [], marks=pytest.mark.slow),
        pytest.param(f"{RAY}/gcs/gcs_server", "Ray's head at ", [], marks=pytest.mark.slow),
    ],
    ids=["agent_loop", "grader", "server", "engine", "teacher", "trainer", "queue", "head"],
)
def test_a_run_whose_processes_die_ends_and_says_so(world, tmp_path, title, name, extra):
    (tmp_path / "grader.py").write_text(GRADER.format(folder=tmp_path, seconds=15))
    settings = [
        f"reward.custom_reward_function.path={tmp_path}/grader.py",
        "trainer.total_training_steps=4",
        "data.train_batch_size=8",
        "actor_rollout_ref.rollout.n=4",
        "trainer.save_freq=1",
        *extra,
    ]
    run = subprocess.Popen(
        command(tmp_path / "run", *settings),
        env=alone(world),
        cwd=tmp_path,
        stdout=(tmp_path / "console").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 400
        while not (tmp_path / "waiting").exists():
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "console").read_text()[-4000:]
            time.sleep(0.2)
        victims = processes(run.pid, title)
        assert victims, f"no process is called {title}, but {[one.cmdline() for one in processes(run.pid, '')]}"
        for victim in victims:
            victim.kill()
        killed = time.monotonic()
        run.wait(HEAD_IN_S if "head" in name else ENDS_IN_S)
    finally:
        run.kill()
    said = (tmp_path / "console").read_text()
    print(f"ended {time.monotonic() - killed:.0f} s after the kill\n{said[-3000:]}")
    assert run.returncode == 1
    (last,) = [line for line in said.split("\n") if line.startswith("opd train: ")]
    assert name in last, said[-3000:]
    assert (tmp_path / "run/checkpoints/global_step_1").is_dir(), "step 1 is not lost"


@pytest.mark.slow
def test_a_grader_that_hangs_ends_the_run_after_its_time_and_is_named(world, tmp_path):
    """It hangs in step 2 for longer than the test may take; the run waits for what ``grading_seconds`` says."""
    (tmp_path / "grader.py").write_text(GRADER.format(folder=tmp_path, seconds=3600))
    settings = [f"reward.custom_reward_function.path={tmp_path}/grader.py", "opd.rollout.grading_seconds=5"]
    settings += ["trainer.total_training_steps=4", "data.train_batch_size=32", "trainer.save_freq=1"]
    words = command(tmp_path / "run", *settings)
    ended = subprocess.run(words, env=alone(world), cwd=tmp_path, capture_output=True, text=True, timeout=400)
    after = time.time() - (tmp_path / "waiting").stat().st_ctime
    said = ended.stdout + ended.stderr
    (last,) = [line for line in said.split("\n") if line.startswith("opd train: ")]
    assert ended.returncode == 1 and "opd.rollout.grading_seconds=5" in last, said[-3000:]
    assert "rollouts could not be finished or graded" in last
    assert after < ENDS_IN_S
    assert (tmp_path / "run/checkpoints/global_step_1").is_dir(), "step 1 is not lost"


# Who the teacher's server of verl is, only Ray can say: its process is called as those of the student are.
NAMES = """
import os
import ray
from pathlib import Path

(server,) = [one for one in ray.util.list_named_actors(all_namespaces=True) if "server_teacher" in one["name"]]
pid = ray.get(ray.get_actor(**server).__ray_call__.remote(lambda self: os.getpid()))
Path("{folder}/victim").write_text(str(pid))
"""


@pytest.mark.slow
def test_a_teachers_server_of_verl_that_dies_ends_the_run_and_is_named(world, tmp_path):
    """The last rollouts of step 2 are being scored or wait for it; step 1 is kept."""
    held = GRADER.format(folder=tmp_path, seconds=15)
    told = held.replace(".touch()", ".touch()\n        _tell()") + "\n\ndef _tell():\n"
    told += textwrap.indent(NAMES.format(folder=tmp_path), "    ")
    (tmp_path / "grader.py").write_text(told)
    settings = ["method=opd", "teacher_server=cpu_tiny", f"reward.custom_reward_function.path={tmp_path}/grader.py"]
    settings += ["trainer.total_training_steps=4", "data.train_batch_size=32", "trainer.save_freq=1"]
    with (tmp_path / "console").open("w") as console:
        words = command(tmp_path / "run", *settings)
        run = subprocess.Popen(words, env=alone(world), cwd=tmp_path, stdout=console, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 400
        while not (tmp_path / "victim").exists() or not (tmp_path / "victim").read_text():
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "console").read_text()[-4000:]
            time.sleep(0.2)
        psutil.Process(int((tmp_path / "victim").read_text())).kill()
        run.wait(ENDS_IN_S)
    finally:
        run.kill()
    said = (tmp_path / "console").read_text()
    (last,) = [line for line in said.split("\n") if line.startswith("opd train: ")]
    assert run.returncode == 1 and "verl's teacher server 0 is dead" in last, said[-3000:]
    assert (tmp_path / "run/checkpoints/global_step_1").is_dir(), "step 1 is not lost"


# Step 2 finds a disk without room for its checkpoint: the grader has filled it.
FILLER = """
from pathlib import Path
from opd_ext.tinymath.grader import compute_score as grade

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    disk = Path("{disk}")
    if (disk / "global_step_1").is_dir() and not (disk / "filler").exists():
        with (disk / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(1 << 20)) == 1 << 20:
                    pass
            except OSError:
                pass
    return grade(data_source, solution_str, ground_truth, extra_info, **kwargs)
"""


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_checkpoint_ends_the_run_and_the_one_before_goes_on(world, tmp_path):
    """A disk of its own, of 128 MiB, below the checkpoints; then one with room again, of the same content."""
    run, kept, disk = tmp_path / "run", tmp_path / "kept", tmp_path / "run/checkpoints"
    disk.mkdir(parents=True)
    (tmp_path / "grader.py").write_text(FILLER.format(disk=disk))
    settings = [f"reward.custom_reward_function.path={tmp_path}/grader.py", "trainer.total_training_steps=3"]
    words = command(run, *settings, "trainer.save_freq=1")
    mount = f"mount -t tmpfs -o size=128m none {disk}"
    mounted = f"{mount} && {{ {shlex.join(words)}; code=$?; cp -a {disk} {kept}; exit $code; }}"
    ended = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mounted],
        env=alone(world), cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = ended.stdout + ended.stderr
    if "unshare: " in said or "mount: " in said:
        pytest.skip("this machine lets nobody mount a file system of their own")
    assert ended.returncode == 1, said[-3000:]
    *_, last = said.split("opd train: ")
    assert f"The disk of {disk} is full, so that the checkpoint of step 2" in last, said[-3000:]
    assert "goes on from the checkpoint of step 1" in last
    assert sorted(path.name for path in kept.glob("*global_step*")) == ["global_step_1"]
    (kept / "filler").unlink()
    disk.rmdir()
    kept.rename(disk)
    (disk / "filler").touch()  # so that nobody fills the disk below the test
    finish(words, alone(world), tmp_path)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    assert (disk / "global_step_3").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "server, flag, told",
    [
        (
            "cpu_tiny",
            "+distillation.teacher_models.teacher_model.inference.engine_kwargs.vllm.no_such_flag=1",
            ("vLLMHttpServer vllm_server_teacher", "unrecognized arguments: --no-such-flag"),
        ),
        (
            "vllm_cpu",
            "opd.teacher.vllm.engine={no_such_flag: 1}",
            ("The server of opd.teacher could not be started: ", "unexpected keyword argument 'no_such_flag'"),
        ),
    ],
    ids=["verls", "ours"],
)
def test_a_teachers_server_that_never_comes_up_ends_the_run_and_says_why(world, tmp_path, server, flag, told):
    """vLLM refuses a flag that it does not have; its own words are the run's last ones."""
    settings = ["method=opd", f"teacher_server={server}", flag, "trainer.total_training_steps=2"]
    words = command(tmp_path / "run", *settings)
    ended = subprocess.run(words, env=alone(world), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1, said[-3000:]
    *_, last = said.split("opd train: ")
    assert all(word in last for word in told), last


@pytest.mark.slow
def test_an_annotators_endpoint_that_is_gone_ends_the_run_unless_told_otherwise(world, tmp_path):
    """Nobody listens at its address: one sentence with the address; what to set is said, and it trains."""
    run = tmp_path / "run"
    asked = ["method=trace", "trainer.total_training_steps=2", "opd.credit.annotator.retries=0"]
    gone = ["opd.credit.annotator.kind=server", "opd.credit.annotator.model=m"]
    gone.append("opd.credit.annotator.base_url='http://127.0.0.1:9/v1'")
    words = command(run, *asked, *gone)
    ended = subprocess.run(words, env=alone(world), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1, said[-3000:]
    *_, last = said.split("opd train: ")
    told = "annotations failed; the first: api_error, ConnectionError: http://127.0.0.1:9/v1/ cannot be reached: "
    assert told in last and "opd.credit.annotator.failed=plain" in last, last
    finish([*words, "opd.credit.annotator.failed=plain"], alone(world), tmp_path)
    assert len(lines := metrics(run)) == 2
    for line in lines:  # a response that was cut off is asked about by nobody
        assert line["annotation/api_error"] > 0 and line["annotation/api_error"] + line["annotation/skipped"] == 1
    assert told in (run / "console.log").read_text()
