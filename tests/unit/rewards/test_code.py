# SPDX-License-Identifier: Apache-2.0
"""Programs are graded as their authors meant them, and the machine stands where it stood.

With ``pytest -k hostile`` every attack of the table runs; they are contained by the sandbox, of which the first test
makes sure.
"""

import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from opd_ext.config.compose import compose_config
from opd_ext.doctor.machine import check_sandbox
from opd_ext.errors import ConfigError
from opd_ext.pipelines.problems import load_grader
from opd_ext.pipelines.settings import RewardConfig
from opd_ext.preflight.findings import Findings
from opd_ext.preflight.reward import check_reward
from opd_ext.rewards import code
from opd_ext.rewards.code import compute_score
from opd_ext.rewards.code.find import PACKAGES, candidates, faults, find_sandbox
from opd_ext.rewards.code.sandbox import Job, Limits, Sandbox, SandboxError
from tests.unit.rewards.programs import BLOCK, HONEST, HOSTILE, SUM, WRONG, call, stdin

KEYS = ["score", "acc", "feedback", "format_ok", "timed_out"]


def has_sandbox() -> bool:
    try:
        return bool(find_sandbox())
    except SandboxError:
        return False


walls = pytest.mark.skipif(not has_sandbox(), reason="this machine has no sandbox")


def graded(response, reference, **options):
    result = compute_score("code", response, reference, **options)
    assert list(result) == KEYS and result["score"] == result["acc"]
    assert (result["feedback"] == "") == bool(result["score"])
    return result


# ---------------------------------------------------------------------- honest and wrong


@walls
@pytest.mark.parametrize("style", HONEST)
def test_an_honest_program_is_right_in_any_style(style):
    assert graded(*HONEST[style])["feedback"] == ""


@walls
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_program_is_wrong(case):
    assert graded(*WRONG[case])["score"] == 0.0


@walls
def test_every_test_must_pass_and_each_has_an_interpreter_of_its_own():
    program = BLOCK.format("import sys\nx = int(input())\nprint(x + getattr(sys, 'seen', 0))\nsys.seen = 1")
    reference = {"inputs": ["1", "2", "3"], "outputs": ["1", "2", "3"]}
    assert graded(program, json.dumps(reference))["score"] == 1.0
    assert graded(program, json.dumps(reference | {"outputs": ["1", "2", "4"]}))["score"] == 0.0


@walls
def test_threads_grade_as_the_main_thread_does():
    cases = [*HONEST.values()][:8] + [*WRONG.values()][:4]
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda case: graded(*case)["score"], cases))
    assert scores == [1.0] * 8 + [0.0] * 4


# ---------------------------------------------------------------------- hostile


@pytest.fixture
def attack(tmp_path, monkeypatch):
    """Grade a hostile program whose right answer is 3, with files and a port that it may try to reach."""
    monkeypatch.setenv("OPD_TEST_SECRET", "42")
    kept, marker = tmp_path / "kept", tmp_path / "marker"
    kept.write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)

        def run(program, function):
            program = program.replace("{PORT}", str(server.getsockname()[1]))
            program = program.replace("{MARKER}", str(marker)).replace("{KEPT}", str(kept))
            limits = {"time_limit": 0.5}
            reference = call("1", "3", **limits) if function else stdin("1 2\n", "3\n", **limits)
            result = graded(BLOCK.format(program), reference)
            assert kept.exists() and not marker.exists()
            with pytest.raises(BlockingIOError):
                server.accept()
            return result["score"]

        yield run


@walls
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_gets_nothing_and_leaves_nothing(name, attack):
    before = _children()
    assert attack(*HOSTILE[name]) == 0.0
    assert _children() <= before, "processes are left"
    assert not _written(), "files are left"


def test_there_are_enough_attacks_and_styles():
    assert len(HOSTILE) >= 35 and len(HONEST) >= 40


@walls
def test_memory_of_the_grader_does_not_grow():
    reference = stdin("", "3", time_limit=1)
    bad = BLOCK.format("print('x' * (20 << 20))")
    for _ in range(3):  # the allocator keeps what a first few need
        graded(bad, reference)
    before = psutil.Process().memory_info().rss
    for _ in range(5):
        graded(bad, reference)
    assert psutil.Process().memory_info().rss < before + (64 << 20)


def _written() -> list[Path]:
    """What hostile programs would leave, by the names that they write: other tests use these folders meanwhile."""
    return [path for path in (Path("/dev/shm/x"), *(Path("/tmp", str(n)) for n in range(40))) if path.exists()]


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


# ---------------------------------------------------------------------- the sandbox


def _ids(sandbox):
    return f"{sandbox.name}, {'root' if sandbox.root or (sandbox.jail or {}).get('root') else 'user'}"


@walls
def test_the_sandbox_that_is_chosen_stands():
    assert faults(find_sandbox()) == ""


@pytest.mark.parametrize("sandbox", list(candidates()), ids=_ids)
def test_a_sandbox_that_stands_holds_every_kind_of_attack(sandbox, attack, monkeypatch):
    if broken := faults(sandbox):
        pytest.skip(broken)
    monkeypatch.setattr(code, "find_sandbox", lambda allow_unsafe: sandbox)
    styles = ["input", "os.devnull", "/dev/urandom", "a file in /dev/shm", "a file in /tmp"]
    styles += [] if "no /proc" in sandbox.name else ["/dev/stdin", "/dev/fd/0", "/dev/stdout", "/dev/stderr"]
    assert [style for style in styles if not graded(*HONEST[style])["score"]] == []
    for name in ("a shell by os", "the network", "files of the machine", "a daemon", "a fork bomb", "fills /dev/shm",
                 "very many files", "very many files in /dev/shm"):  # fmt: skip
        assert attack(*HOSTILE[name]) == 0.0, name


def test_without_walls_the_limits_still_hold():
    loose = Sandbox("none", walls=False)
    assert loose.run(Job("print(input())", "3")).output == "3\n"
    for program, end in (("while True: pass", "time"), ("x = bytearray(3 << 30)", "memory")):
        assert loose.run(Job(program, limits=Limits(seconds=1))).end == end
    assert loose.run(Job("import os\nos.fork()")).end == "error"


def test_a_machine_without_sandbox_is_told_what_to_change(monkeypatch):
    monkeypatch.setattr("opd_ext.rewards.code.find._found", lambda: (None, ("there is no bwrap", "unshare: EPERM")))
    with pytest.raises(SandboxError, match=r"no sandbox.*bwrap; unshare: EPERM.*sandbox_fusion_url.*allow_unsafe=true"):
        graded(*HONEST["input"])
    assert graded(*HONEST["input"], allow_unsafe=True)["score"] == 1.0


def test_a_run_that_grades_programs_is_refused_before_it_starts_where_nothing_can_hold_them(monkeypatch):
    monkeypatch.setattr("opd_ext.rewards.code.find._found", lambda: (None, ("there is no bwrap", "unshare: EPERM")))
    config, findings = compose_config(["recipe=sdpo/discover"]), Findings()
    with pytest.raises(ConfigError, match="no sandbox.*unshare: EPERM"):
        check_reward(config, [], findings)
    check_reward(config, [], findings, here=False)
    assert len(findings.notes) == 1 and findings.notes[0].endswith("unless the run has another machine.")
    allowed = "reward.custom_reward_function.reward_kwargs.allow_unsafe=true"
    check_reward(compose_config(["recipe=sdpo/discover", allowed]), [], findings)
    assert findings.facts == {"programs run in": "no sandbox, as allow_unsafe=true allows"}
    with pytest.raises(ConfigError, match="no sandbox"):
        load_grader(RewardConfig("pkg://opd_ext.rewards.code"))
    load_grader(RewardConfig("pkg://opd_ext.rewards.code", kwargs={"allow_unsafe": True}))
    assert check_sandbox().found == "none (there is no bwrap; unshare: EPERM)" and not check_sandbox().problem


def test_an_argument_that_the_grader_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="reward.kwargs=.*'unsafe'"):
        load_grader(RewardConfig("pkg://opd_ext.rewards.code", kwargs={"unsafe": True}))


def test_a_sandbox_whose_files_cannot_be_counted_is_none(monkeypatch):
    """A container without the right to look into processes: the next kind of sandbox is tried."""
    counted = [each for each in candidates() if each.command and not faults(each)]
    if not counted:
        pytest.skip("bubblewrap does not stand here")

    def refused(path, *flags):
        if str(path).endswith("/root/tmp"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *flags)

    opened = os.open
    monkeypatch.setattr("opd_ext.rewards.code.sandbox.os.open", refused)
    before = _children()
    assert faults(counted[0]) == "bubblewrap: the files of a program cannot be counted (Permission denied)"
    assert _children() <= before


def test_a_sandbox_that_does_not_start_says_so_and_nothing_about_the_program():
    broken = Sandbox("broken", command=("false",))
    with pytest.raises(SandboxError, match="broken"):
        broken.run(Job("print(3)"))


@walls
def test_a_grader_that_is_killed_takes_its_programs_along(tmp_path):
    """As Ray does with a worker."""
    script = (
        "from opd_ext.rewards.code import compute_score\n"
        f"compute_score('', {BLOCK.format('while True: pass')!r}, {stdin('', '', time_limit=30)!r})"
    )
    grader = psutil.Popen([os.sys.executable, "-c", script])
    try:
        below = _wait_for(lambda: len(found := grader.children(recursive=True)) >= 2 and found)
        grader.kill()
        grader.wait()
        _wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in below))
    finally:
        if grader.is_running():
            grader.kill()


def _wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


# ---------------------------------------------------------------------- references


@pytest.mark.parametrize(
    "reference, complaint",
    [
        (json.dumps({"inputs": [], "outputs": []}), "there are no tests"),
        (json.dumps({"inputs": ["1"], "outputs": []}), "1 inputs and not as many outputs"),
        (json.dumps({"outputs": ["1"]}), "no list of inputs"),
        (json.dumps([1]), "no list of inputs"),
        ("3", "no list of inputs"),
        ("", "no JSON"),
        (None, "no JSON"),
        (call("[1", "2"), "test 1 cannot be read"),
        (call("1", "[2"), "test 1 cannot be read"),
        (stdin(3, "2"), "test 1 cannot be read"),
        (stdin("3", "2", time_limit=-1), "time_limit"),
        (stdin("3", "2", public="all"), "public"),
    ],
)
def test_a_reference_that_tests_nothing_is_a_fault_of_the_data(reference, complaint):
    with pytest.raises(ValueError, match=complaint) as refused:
        compute_score("apps", BLOCK.format("pass"), reference)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=complaint):
        code.check_reference(reference)


@walls
def test_lists_of_lines_and_of_arguments_are_read_as_apps_writes_them():
    assert graded(*(HONEST["input"][0], json.dumps({"inputs": [["1 2", ""]], "outputs": [["3"]]})))["score"] == 1.0
    reference = json.dumps({"inputs": [[[1, 2], 2]], "outputs": [6], "fn_name": "f"})
    assert graded(HONEST["class Solution"][0], reference)["score"] == 1.0


# ---------------------------------------------------------------------- feedback


def told(program, reference, **options):
    return graded(BLOCK.format(program), reference, **options)["feedback"]


@walls
def test_an_error_is_told_with_its_frames_and_its_input():
    program = "def half(x):\n    return x // 0\n\nprint(half(int(input())))"
    assert told(program, stdin("7\n", "3\n", public=1)) == (
        "Runtime Error\nZeroDivisionError: integer division or modulo by zero\nLine 2 in half (Solution.py)\n"
        "Line 4 in <module> (Solution.py)\n\nLast Executed Input\n7"
    )


@walls
def test_a_wrong_answer_is_told_with_what_was_expected():
    assert told("print(4)", stdin("1 2\n", "3\n", public=1)) == (
        "Test Case 1: Wrong Answer\n\nInput\n1 2\n\nOutput\n4\n\nExpected\n3"
    )
    assert told("def f(a):\n    print('seen', a)\n    return [a]", call("1", "[2]", public=1)) == (
        "Test Case 1: Wrong Answer\n\nInput\n1\n\nOutput\n[1]\n\nExpected\n[2]\n\nDebug Output\nseen 1"
    )


@walls
def test_an_error_comes_before_time_and_time_before_wrong_answers_of_which_two_are_shown():
    program = "x = input()\nif x == 'error': 1 / 0\nwhile x == 'slow': pass\nprint(x)"
    reference = {"outputs": ["?"] * 4, "public": 4, "time_limit": 1}
    first = told(program, json.dumps(reference | {"inputs": ["a", "slow", "error", "b"]}))
    assert first.startswith("Runtime Error\nZeroDivisionError")
    assert told(program, json.dumps(reference | {"inputs": ["a", "slow", "b", "c"]})) == (
        "Time Limit Exceeded\n\nLast Executed Input\nslow"
    )
    both = told(program, json.dumps(reference | {"inputs": ["longest", "a", "longer", "b"]}))
    assert [line for line in both.split("\n") if line.startswith("Test")] == [
        "Test Case 2: Wrong Answer", "Test Case 4: Wrong Answer"
    ]  # fmt: skip


@walls
def test_hidden_tests_are_not_told():
    reference = {"inputs": ["1", "secret"], "outputs": ["1", "password"]}
    for public in (0, 1):
        said = told("print(int(input()))", json.dumps(reference | {"public": public}))
        assert said == "Test Case 2 of 2, which is hidden: Runtime Error"


@walls
def test_feedback_is_short_whatever_a_program_says():
    reference = json.dumps({"inputs": ["x\n" * 5000] * 4, "outputs": ["y" * 9000] * 4, "public": 4})
    said = told("print('z' * 100000)", reference)
    assert len(said) <= 2000 and "... (4992 more lines)" in said and said.count("Wrong Answer") == 2
    assert len(told("raise ValueError('x' * 10**6)", reference)) <= 2000


def test_a_response_without_code_is_asked_for_it_and_a_cut_one_to_be_shorter():
    assert "```python" in graded("I give up", SUM)["feedback"]
    assert "maximum length" in graded("```python\nprint(", SUM, extra_info={"truncated": True})["feedback"]


@walls
def test_a_syntax_error_names_its_line():
    assert "Line 2 (Solution.py)" in told("x = 1\nprint(x", stdin("", "1", public=1))


def test_packages_that_programs_may_import_are_installed_here():
    """What the guide promises, an environment that setup made must hold."""
    assert all(find_spec(name) for name in PACKAGES)
