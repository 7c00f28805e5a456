# SPDX-License-Identifier: Apache-2.0
"""Programs: right if they pass every test, each run in a fresh interpreter inside a sandbox.

The sandbox has no network, no files of this machine and limits on time, memory, processes and files; what is left when
a test ends is killed with its namespace. What a test expects is compared here, and never enters the process that runs
the program, so that there is nothing to find in it. ``checks`` (HumanEval, MBPP) are the exception: they are code that
runs in that process, and a program that looks for it could pass without solving anything, so evaluate with them, and do
not train. :mod:`find` says which sandbox a machine has; a SandboxFusion server can stand in for it.
"""

import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from typing import Any

from opd_ext.rewards.code import feedback
from opd_ext.rewards.code.blocks import program_of
from opd_ext.rewards.code.compare import same_text, same_value
from opd_ext.rewards.code.find import find_sandbox
from opd_ext.rewards.code.names import names_in
from opd_ext.rewards.code.sandbox import Job, Limits, Outcome, SandboxError
from opd_ext.rewards.code.slots import cores
from opd_ext.rewards.code.truth import SECONDS, Test, Tests, read_tests

__all__ = ["SECONDS", "SandboxError", "check_machine", "check_reference", "compute_score"]

_REMOTE_THREADS = 32
_GIB = 1 << 30


def final_answer(response: str) -> None:
    """Programs are not compared as texts: none of them votes."""


def compute_score(
    data_source,
    solution_str,
    ground_truth,
    extra_info=None,
    *,
    memory_gib: float = 1.0,
    allow_unsafe: bool = False,
    sandbox_fusion_url: str | None = None,
    reward_router_address=None,
    reward_model_tokenizer=None,
) -> dict[str, float | str]:
    """Grade one response; the signature is that of verl's custom reward functions, which may call it in any thread.

    Args:
        data_source: named in errors only.
        solution_str: the response; :func:`opd_ext.rewards.code.blocks.program_of` says which block is its program.
        ground_truth: the tests, see :func:`opd_ext.rewards.code.truth.read_tests`.
        extra_info: ``truncated``, if it is there and true, words the feedback on a response without a program.
        memory_gib: GiB of memory of a test. Set it and the following with
            ``reward.custom_reward_function.reward_kwargs``.
        allow_unsafe: where this machine has no sandbox, run programs with limits only.
        sandbox_fusion_url: ``http://HOST:PORT/run_code`` of a SandboxFusion server that runs the programs instead.
        reward_router_address, reward_model_tokenizer: what verl adds beside a reward model; unused.

    Returns:
        ``score`` = ``acc`` (1.0 if every test passes, else 0.0), ``feedback`` (see
        :mod:`opd_ext.rewards.code.feedback`; empty on success), ``format_ok`` (there is a program) and ``timed_out``
        (a test ran out of time).

    Raises:
        ValueError: the reference holds no tests, or none that can be read.
        SandboxError: there is no sandbox, or it fails.
        ConnectionError: the server does not answer, or cannot run programs.
    """
    tests = read_tests(ground_truth, f"data source {data_source!r}: ")
    program = program_of(solution_str or "", tests.function)
    if program is None:
        said = feedback.CUT if (extra_info or {}).get("truncated") else feedback.NO_CODE
        return {"score": 0.0, "acc": 0.0, "feedback": said, "format_ok": 0.0, "timed_out": 0.0}
    limits = Limits(tests.seconds, int(memory_gib * _GIB))
    if sandbox_fusion_url:
        run, threads = _remote(sandbox_fusion_url), _REMOTE_THREADS
    else:
        run, threads = find_sandbox(allow_unsafe).run, cores()
    failures = _failures(program, tests, limits, run, _threads(threads))
    return {
        "score": float(not failures),
        "acc": float(not failures),
        "feedback": feedback.describe(failures, len(tests.tests)) if failures else "",
        "format_ok": 1.0,
        "timed_out": float(any(outcome.end == "time" for _, _, outcome in failures)),
    }


def check_reference(ground_truth: str) -> Tests:
    """The tests of a reference.

    Raises:
        ValueError: one sentence that says what is wrong with it.
    """
    return read_tests(ground_truth)


def check_machine(*, allow_unsafe: bool = False, sandbox_fusion_url: str | None = None, **others: Any) -> str:
    """What programs will be run in on this machine, in words; ``others`` are further arguments of the grader.

    Raises:
        SandboxError: nothing, and why.
    """
    return f"SandboxFusion, {sandbox_fusion_url}" if sandbox_fusion_url else find_sandbox(allow_unsafe).name


def _remote(url: str) -> Callable[[Job], Outcome]:
    from opd_ext.rewards.code.remote import run_remote

    return partial(run_remote, url)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="tests")


def _failures(
    program: str, tests: Tests, limits: Limits, run: Callable[[Job], Outcome], threads: ThreadPoolExecutor
) -> list[tuple[int, Test, Outcome]]:
    """Number, test and outcome of tests that fail: of all public ones, else of the first other one that is known to."""
    attempt = _Attempt(program, tests, limits, run)
    numbered = list(enumerate(tests.tests, start=1))
    shown = [test for test in numbered if test[1].public]
    failed = [result for result in threads.map(attempt, shown) if result is not None]
    return failed or _first([threads.submit(attempt, test) for test in numbered[len(shown) :]])


def _first(futures: Iterable[Future]) -> list[tuple[int, Test, Outcome]]:
    """The first failure by number; tests after it that have not begun are not run."""
    waiting = list(futures)
    try:
        for future in waiting:
            if (result := future.result()) is not None:
                return [result]
        return []
    finally:
        for future in waiting:
            future.cancel()


class _Attempt:
    """One program, tried on any of its tests; a name that it forgot to import is found once."""

    def __init__(self, program: str, tests: Tests, limits: Limits, run: Callable[[Job], Outcome]) -> None:
        self._run, function = run, None if tests.tests[0].check else tests.function
        self._job = Job(program, function=function, limits=limits, prelude=tests.prelude)
        self._known = names_in(program)
        if function and not re.search(r"\bimport\b.*\btyping\b|\btyping\s+import\b", program):
            typing = {name: source for name, source in self._known.items() if source == "typing"}
            self._job = replace(self._job, names=typing)  # signatures that problems give use them without an import

    def __call__(self, numbered: tuple[int, Test]) -> tuple[int, Test, Outcome] | None:
        """The test and its outcome if it fails; None if it passes."""
        number, test = numbered
        outcome = self._try(test)
        if outcome.missing in self._known and outcome.missing not in self._job.names:
            self._job = replace(self._job, names=self._known)
            outcome = self._try(test)
        if outcome.end == "finished":
            if test.check:
                return None if same_value(outcome.result or "", True) else (number, test, outcome)
            if test.arguments is None and same_text(outcome.output, test.expected):
                return None
            if test.arguments is not None and same_value(outcome.result or "", test.expected):
                return None
        return number, test, outcome

    def _try(self, test: Test) -> Outcome:
        if test.check:
            return self._run(replace(self._job, check=test.check))
        given = {"stdin": test.stdin} if test.arguments is None else {"arguments": test.arguments}
        return self._run(replace(self._job, **given))
