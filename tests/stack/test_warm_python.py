# SPDX-License-Identifier: Apache-2.0
"""A warm Python is used like any other: command line, environment, files, signals, exit status; and nothing is left."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from opd_ext.bridge.warm_python import PRELOADED_FOR_A_JOB, WarmPython
from tests.stack.conftest import PLATFORM

SEEN = (
    "import json, os, sys; print(json.dumps([sys.argv, os.getcwd(), os.environ.get('COLOUR'), 'vllm' in sys.modules]))"
)
SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def start(stack, *arguments, **options):
    return subprocess.Popen([stack.python, *arguments], stdout=subprocess.PIPE, text=True, **options)


def alive(pid: int) -> bool:
    """Not ended; a zombie is, whoever has still to take notice of it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.parametrize("kind", ["-c", "-m", "script"])
def test_a_program_finds_arguments_folder_and_environment_and_has_the_stack_already(stack, tmp_path, kind):
    (tmp_path / "seen.py").write_text(SEEN)
    program = {"-c": ["-c", SEEN], "-m": ["-m", "seen"], "script": [str(tmp_path / "seen.py")]}[kind]
    process = start(stack, "-u", *program, "a b", "--x", cwd=tmp_path, env={**os.environ, "COLOUR": "red"})
    argv, folder, colour, warm = json.loads(process.communicate(timeout=120)[0])
    assert argv[1:] == ["a b", "--x"] and argv[0] == ("-c" if kind == "-c" else str(tmp_path / "seen.py"))
    assert (folder, colour, warm) == (str(tmp_path), "red", True)


@pytest.mark.parametrize(("code", "status"), [("import sys; sys.exit(7)", 7), ("raise KeyError", 1), ("pass", 0)])
def test_the_exit_status_comes_back(stack, code, status):
    assert subprocess.run([stack.python, "-c", code], stderr=subprocess.DEVNULL).returncode == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_the_process_and_nothing_stays(stack, number):
    process = start(stack, "-c", SLEEP)
    pid = int(process.stdout.readline())
    assert pid != process.pid
    process.send_signal(number)
    assert process.wait(20) == -number and gone(pid)


def test_killing_the_group_of_a_process_leaves_the_server_alone(stack):
    """Ray does that to what a worker leaves behind."""
    process = start(stack, "-c", SLEEP)
    os.killpg(os.getpgid(int(process.stdout.readline())), signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    assert subprocess.run([stack.python, "-c", "import sys; sys.exit('vllm' not in sys.modules)"]).returncode == 0


def test_a_process_that_dies_of_a_signal_looks_like_it(stack):
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([stack.python, "-c", code]).returncode == -signal.SIGKILL


def test_pipes_and_open_files_arrive(stack, tmp_path):
    extra, other = os.pipe()
    code = f"import os, sys; os.write({other}, sys.stdin.read().upper().encode())"
    subprocess.run([stack.python, "-c", code], input="words", text=True, pass_fds=[other], check=True)
    os.close(other)
    assert os.read(extra, 100) == b"WORDS" and os.read(extra, 1) == b""  # nobody else holds the writing end
    os.close(extra)


def test_other_platforms_and_flags_start_cold_and_say_the_same(stack):
    warm = "import sys; print('vllm' in sys.modules)"
    for arguments, env in (
        (["-c", warm], {**os.environ, "VERL_PLATFORM": "cuda"}),
        (["-O", "-c", warm], os.environ),
        (["-c", warm], {**os.environ, "HF_HUB_OFFLINE": "1"}),
    ):
        process = start(stack, *arguments, env=dict(env))
        assert process.communicate(timeout=60)[0].strip() == "False"


def test_modules_beside_the_program_come_first(stack, tmp_path):
    """As in any Python, even where the server has imported others of that name."""
    (tmp_path / "peft.py").write_text("WHOSE = 'mine'")
    process = start(stack, "-c", "import peft; print(peft.WHOSE)", cwd=tmp_path)
    assert process.communicate(timeout=60)[0].strip() == "mine"


def test_two_processes_do_not_draw_the_same_numbers(stack):
    code = "import random, numpy; print(random.random(), numpy.random.random())"
    one, two = (subprocess.run([stack.python, "-c", code], capture_output=True, text=True).stdout for _ in range(2))
    assert one.split()[0] != two.split()[0] and one.split()[1] != two.split()[1]


def test_threads_are_as_the_environment_says(stack):
    code = "import torch; print(torch.get_num_threads())"
    env = {**os.environ, "OMP_NUM_THREADS": "3"}
    assert subprocess.run([stack.python, "-c", code], capture_output=True, text=True, env=env).stdout.strip() == "3"


def test_multiprocessing_spawns_from_it(stack):
    """The module's fixture has set it as the executable; the imports alone take a cold process several seconds."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert "verl" in pool.apply(_modules)


def _modules():
    return list(sys.modules)


def test_nothing_outlives_the_owner():
    """The owner is killed: its server, the processes forked there and its folder go."""
    code = (
        "import subprocess, sys, time\n"
        "from opd_ext.bridge.warm_python import WarmPython\n"
        "python = WarmPython(dict(__import__('os').environ))\n"
        f"process = subprocess.Popen([python.path, '-c', {SLEEP!r}], stdout=subprocess.PIPE, text=True)\n"
        "print(python.path, python._server.pid, process.pid, process.stdout.readline().strip(), flush=True)\n"
        "time.sleep(600)"
    )
    env = {**os.environ, **PLATFORM}
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    path, *pids = owner.stdout.readline().split()
    assert all(alive(int(pid)) for pid in pids)
    owner.kill()
    owner.wait()
    assert all(gone(int(pid)) for pid in pids)
    assert not os.path.exists(path)


def test_without_a_server_it_is_a_plain_python(tmp_path):
    with WarmPython({**os.environ, **PLATFORM}) as python:
        kept = tmp_path / "python"
        kept.write_text(open(python.path).read())
        kept.chmod(0o755)
    done = subprocess.run([kept, "-c", "import sys; print(len(sys.argv))", "x"], capture_output=True, text=True)
    assert done.stdout.strip() == "2"


def test_what_is_preloaded_starts_no_thread_that_a_fork_would_lose(stack):
    """Forked processes are single: a lock that another thread held at the fork would stay held for ever.

    pyarrow's allocator and OpenBLAS have threads of their own and hand over at forks by themselves.
    """
    code = (
        "import importlib, json, os\n"
        f"for name in {PRELOADED_FOR_A_JOB!r}: importlib.import_module(name)\n"
        "print(json.dumps([open(f'/proc/self/task/{t}/comm').read().strip() for t in os.listdir('/proc/self/task')]))"
    )
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert set(json.loads(found.stdout.splitlines()[-1])[1:]) <= {"jemalloc_bg_thd"}
