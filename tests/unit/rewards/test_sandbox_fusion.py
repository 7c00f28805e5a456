# SPDX-License-Identifier: Apache-2.0
"""The SandboxFusion backend, through verl's client, against a server that speaks its protocol and runs the programs."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opd_ext.rewards.code import check_machine, compute_score
from tests.unit.rewards.programs import HONEST, WRONG, call, stdin


class Server(BaseHTTPRequestHandler):
    """``POST /run_code`` as in SandboxFusion's API: a program and its input; status, output and exit status."""

    asked: list[dict] = []

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(request)
        ran = {"status": "Finished", "execution_time": 0.1, "return_code": 0, "stdout": "", "stderr": ""}
        try:
            done = subprocess.run(
                [sys.executable, "-c", request["code"]], input=request["stdin"], capture_output=True, text=True,
                timeout=request["run_timeout"],
            )  # fmt: skip
            ran |= {"return_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        except subprocess.TimeoutExpired:
            ran |= {"status": "TimeLimitExceeded", "return_code": None}
        good = ran["return_code"] == 0
        answer = {"status": "Success" if good else "Failed", "message": "", "compile_result": None, "run_result": ran}
        if self.path != "/run_code":
            answer = {"status": "SandboxError", "message": "no more containers", "run_result": None}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


STYLES = [
    "input",
    "stdin.buffer.readline",
    "exit() at the end",
    "class Solution",
    "tuples in a list",
    "a forgotten import",
]
CASES = ["3 for [3]", "-1000001 for -1000000", "a syntax error", "nothing"]


@pytest.mark.parametrize("case", [*STYLES, *CASES])
def test_the_server_says_what_a_program_does_and_the_grader_whether_it_is_right(case, url):
    response, reference = HONEST[case] if case in HONEST else WRONG[case]
    result = compute_score("code", response, reference, sandbox_fusion_url=f"{url}/run_code")
    assert result["score"] == float(case in HONEST)


def test_the_server_is_not_told_what_is_expected(url):
    Server.asked.clear()
    reference = stdin("7\n", "123456\n", time_limit=3)
    compute_score(
        "code", "```python\nprint(input())\n```", reference, sandbox_fusion_url=f"{url}/run_code", memory_gib=2
    )
    (asked,) = Server.asked
    assert "123456" not in json.dumps(asked) and asked["stdin"] == "7\n"
    assert (asked["run_timeout"], asked["memory_limit_MB"], asked["language"]) == (3, 2048, "python")


def test_feedback_is_the_same_as_of_a_sandbox_here(url):
    options = {"sandbox_fusion_url": f"{url}/run_code"}
    program = "```python\ndef f(x):\n    return 1 // x\n```"
    assert compute_score("code", program, call("0", "1", public=1), **options)["feedback"] == (
        "Runtime Error\nZeroDivisionError: integer division or modulo by zero\nLine 2 in f (Solution.py)\n\n"
        "Last Executed Input\n0"
    )
    slow = compute_score("code", "```python\nwhile 1: pass\n```", stdin("", "", time_limit=1, public=1), **options)
    assert slow["timed_out"] == 1.0 and slow["feedback"].startswith("Time Limit Exceeded")


def test_a_server_that_cannot_run_programs_is_no_wrong_answer(url):
    for address, complaint in (
        (f"{url}/broken", "no more containers"),
        ("http://127.0.0.1:9/run_code", "does not run"),
    ):
        with pytest.raises(ConnectionError, match=complaint):
            compute_score("code", *HONEST["input"], sandbox_fusion_url=address)


def test_the_machine_check_names_the_server():
    assert check_machine(sandbox_fusion_url="http://judge:8080/run_code", memory_gib=4) == (
        "SandboxFusion, http://judge:8080/run_code"
    )
