# SPDX-License-Identifier: Apache-2.0
"""The dual-path math grader of CRISP (arXiv 2603.05433, July 2026 revision): why an answer counts as correct.

A response is correct if its last ``Answer:`` line, put into a box, equals the reference under math-verify, or
if math-verify finds the reference in the response as a whole. The published accuracies move by tens of points
with the choice of grader, so the two narrow readings (answer line only, last box only) are reported beside
the verdict.

math-verify guards itself with ``SIGALRM``, which exists only in a main thread; verl calls graders from
executor threads, where every comparison would raise and be graded as wrong. Here math-verify runs in the main
thread of one child process per calling process: its own time limits work as published, and an answer that
gets past them (a power tower inside one C call) costs the deadline of that sample, not the run.
"""

import logging
import os
import re
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe

logger = logging.getLogger(__name__)

MAX_RESPONSE_CHARS = 100_000
"""Longer responses are graded by their end, about 30,000 tokens, where the answer stands."""

DEADLINE_SECONDS = 20.0
"""Wall-clock limit for one response, above math-verify's own 5 s per parse and per comparison."""

START_SECONDS = 120.0
"""Limit for the child's imports (sympy takes about a second; a cold network file system takes far longer)."""

MEMORY_BYTES = 4 << 30
"""Address-space limit of the child: a factorial with millions of digits fails there, not on the host."""

_ANSWER_LINE = re.compile(r"Answer\s*:\s*([^\n]+)", re.IGNORECASE)
_NO_ANSWER = (
    "No final answer was found. End with a line of the form 'Answer: ...' or put the final answer within \\boxed{...}."
)
_NOT_CHECKED = "The final answer could not be checked in time. Give it in a simpler form."


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict:
    """Grade one response; the signature is that of verl's custom reward functions.

    Args:
        data_source: ignored, as are ``extra_info`` and ``kwargs``: the grader is the same for every math set.
        solution_str: the decoded response.
        ground_truth: the reference answer in LaTeX without a box, e.g. ``\\frac{1}{2}``.

    Returns:
        ``score`` = ``acc`` (dual path), ``acc_answer_only``, ``acc_boxed_only``, ``format_ok`` (the response
        has a non-empty answer line or a box), all floats 0 or 1, and ``feedback``, which never contains the
        reference.

    Raises:
        ValueError: the reference is missing or blank.
        RuntimeError: math-verify cannot be started, e.g. because it is not installed.

    >>> graded = compute_score("math", "It is one half. Answer: 0.5", "1/2")
    >>> graded["score"], graded["acc_answer_only"], graded["format_ok"]
    (1.0, 1.0, 1.0)
    >>> graded = compute_score("math", "I think it is 0.5", "1/2")  # right, found in the response as a whole
    >>> graded["score"], graded["acc_answer_only"], graded["format_ok"]
    (1.0, 0.0, 0.0)
    """
    gold = "" if ground_truth is None else str(ground_truth).strip()
    if not gold:
        raise ValueError(f"data source {data_source!r} has a sample with an empty ground_truth; math grading needs one")
    response = (solution_str or "")[-MAX_RESPONSE_CHARS:]
    answer, box = answer_line(response), last_box(response)
    candidates = [f"\\boxed{{{text}}}" if text else "" for text in (answer, box)] + [response]
    verdicts = _grader.grade(gold, candidates)
    by_answer, by_box, by_response = verdicts or (False, False, False)

    correct = by_answer or by_response
    format_ok = bool(answer or box)
    feedback = "" if correct or (format_ok and verdicts) else _NO_ANSWER if not format_ok else _NOT_CHECKED
    return {
        "score": float(correct),
        "acc": float(correct),
        "acc_answer_only": float(by_answer),
        "acc_boxed_only": float(by_box),
        "format_ok": float(format_ok),
        "feedback": feedback,
    }


def answer_line(response: str) -> str:
    """What follows the last ``Answer:``, without trailing ``. , ; : ? " '`` and blanks; ``""`` if there is
    none.

    An exclamation mark stays: it may be a factorial.
    """
    matches = _ANSWER_LINE.findall(response)
    return matches[-1].strip().rstrip(".,;:?\"' \t\r") if matches else ""


def last_box(response: str) -> str:
    """The content of the last ``\\boxed{...}``, braces balanced; ``""`` if there is none or it stays open."""
    start = response.rfind("\\boxed{")
    if start < 0:
        return ""
    start += len("\\boxed{")
    depth = 1
    for position in range(start, len(response)):
        depth += {"{": 1, "}": -1}.get(response[position], 0)
        if depth == 0:
            return response[start:position].strip()
    return ""


class _Grader:
    """math-verify in a child process, started at first use and again whenever a sample ended it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._child: subprocess.Popen | None = None
        self._pipe: Connection | None = None

    def grade(self, gold: str, candidates: list[str]) -> list[bool] | None:
        """One verdict per candidate, or None if they exceeded the deadline or ended the child."""
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            try:
                self._pipe.send((gold, candidates))
                if self._pipe.poll(DEADLINE_SECONDS):
                    return self._pipe.recv()
                reason = f"took more than {DEADLINE_SECONDS:g} s"
            except (EOFError, OSError):
                reason = "ended the grading process"
            logger.warning(
                "A response %s in math-verify and counts as wrong; it ends in %r",
                reason,
                candidates[-1][-80:],
            )
            self._stop()
            return None

    def _start(self):
        self._pipe, child_end = Pipe()
        # The calling process may have been given its import path by Ray rather than by the environment.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "opd_ext.rewards.math_dual", str(child_end.fileno())],
            pass_fds=[child_end.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        child_end.close()
        try:
            ready = self._pipe.poll(START_SECONDS) and self._pipe.recv() == "ready"
        except EOFError:
            ready = False
        if not ready:
            self._stop()
            raise RuntimeError("math-verify could not be started: install math-verify beside opd-ext and try again")

    def _stop(self):
        self._child.kill()
        self._child.wait()
        self._pipe.close()
        self._child = self._pipe = None


def _new_grader():
    global _grader
    _grader = _Grader()


_new_grader()
# A forked process must not share its parent's pipe, nor inherit a lock that some other thread held.
os.register_at_fork(after_in_child=_new_grader)


def _serve(pipe: Connection):
    """The child: grade requests in the main thread until the parent closes the pipe or disappears."""
    import resource
    import signal

    from math_verify.grader import verify
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig, parse

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; we end with its pipe
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    def matches(gold, candidate: str) -> bool:
        prediction = parse(candidate, (ExprExtractionConfig(), LatexExtractionConfig())) if candidate else []
        return bool(prediction) and verify(gold, prediction)

    pipe.send("ready")
    while True:
        try:
            gold_text, candidates = pipe.recv()
        except EOFError:
            return
        gold = parse(f"\\boxed{{{gold_text}}}", (LatexExtractionConfig(),))
        verdicts = {candidate: matches(gold, candidate) for candidate in dict.fromkeys(candidates)}
        pipe.send([verdicts[candidate] for candidate in candidates])


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
