# SPDX-License-Identifier: Apache-2.0
"""math-verify in child processes: it may be called from any thread, and an answer that never evaluates holds up no
other.

math-verify guards itself with ``SIGALRM``, which exists only in a main thread; verl calls graders from executor
threads, where every comparison would raise and be graded as wrong. So it runs in the main thread of a child, where its
own time limits work as published. An answer that gets past them (a power tower inside one C call) ends its child.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, Pipe
from queue import Empty, LifoQueue

from opd_ext.rewards.answers import LONGEST, chains, is_chosen, readings

logger = logging.getLogger(__name__)

LIMIT_SECONDS = 5
"""math-verify's own limit for one parse and for one comparison."""

HURRIED_SECONDS = 2
"""The same where only a metric waits for the answer."""

DEADLINE = 4
"""After so many limits a text has had its time, and the child is ended."""

START_SECONDS = 120.0
"""Limit for a child's imports (sympy takes about a second; a cold network file system takes far longer)."""

MEMORY_BYTES = 4 << 30
"""Address-space limit of a child: a factorial with millions of digits fails there, not on the host."""

CHILDREN = 4
"""At most so many; another one starts when all have been busy for ``PATIENCE_SECONDS``, which a slow answer makes
them."""

PATIENCE_SECONDS = 0.25

_REMEMBERED = 20_000
_SHORT = 500  # characters of a text that is remembered whatever its verdict; rollouts of a group say the same

WRONG, UNSURE, RIGHT = 0, 1, 2
"""Verdicts. ``UNSURE``: it equals the reference, but the sides of its equation differ, as in ``17 = 42``."""


class _Child:
    """One process that grades, and the pipe to it."""

    def __init__(self) -> None:
        self.pipe, child_end = Pipe()
        # The calling process may have been given its import path by Ray rather than by the environment.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opd_ext.rewards.verifier", str(child_end.fileno())],
            pass_fds=[child_end.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        child_end.close()
        try:
            ready = self.pipe.poll(START_SECONDS) and self.pipe.recv() == "ready"
        except EOFError:
            ready = False
        if not ready:
            self.stop()
            raise RuntimeError("math-verify could not be started: install math-verify beside opd-ext and try again")

    def ask(self, request: tuple[str, str, bool, int], seconds: float) -> int | None:
        """The verdict, or None if it took longer than ``seconds`` or ended the child."""
        try:
            self.pipe.send(request)
            if self.pipe.poll(seconds):
                return self.pipe.recv()
        except (EOFError, OSError):
            pass
        self.stop()
        return None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()

    @property
    def alive(self) -> bool:
        return not self.pipe.closed and self.process.poll() is None


class Verifier:
    """Up to ``CHILDREN`` children, started when they are needed, and what they have said of short or slow texts."""

    def __init__(self) -> None:
        self._idle: LifoQueue[_Child] = LifoQueue()
        self._starting = threading.Lock()
        self._children: list[_Child] = []
        self._started = 0.0
        self._known: dict[tuple[str, str, bool], int | None] = {}

    def verdict(self, reference: str, text: str, *, whole: bool = False, limit: int | None = None) -> int | None:
        """``WRONG``, ``UNSURE`` or ``RIGHT``; None if the text could not be checked in time.

        Args:
            reference: checked already, see :func:`opd_ext.rewards.answers.check_reference`.
            text: an answer, or a response in which math-verify looks for one if ``whole``.
            limit: seconds for one parse or comparison.

        Raises:
            RuntimeError: math-verify cannot be started.
        """
        key, limit = (reference, text, whole), limit or LIMIT_SECONDS
        if key in self._known:
            return self._known[key]
        child = self._take()
        try:
            if key in self._known:  # another thread has asked meanwhile
                return self._known[key]
            verdict = child.ask((*key, limit), DEADLINE * limit)
        finally:
            if child.alive:
                self._idle.put(child)
        if verdict is None:
            logger.warning("A response could not be graded in time and counts as wrong; it ends in %r", text[-80:])
        if verdict is None or len(text) <= _SHORT:
            while len(self._known) >= _REMEMBERED:
                self._known.pop(next(iter(self._known)), None)
            self._known[key] = verdict
        return verdict

    def _take(self) -> _Child:
        while True:
            try:
                child = self._idle.get(timeout=PATIENCE_SECONDS if self._children else 0.001)
                if child.alive:
                    return child
            except Empty:
                pass
            with self._starting:
                self._children = [child for child in self._children if child.alive]
                waited = time.monotonic() - self._started > PATIENCE_SECONDS or not self._children
                if self._idle.empty() and waited and len(self._children) < CHILDREN:
                    self._children.append(_Child())
                    self._started = time.monotonic()
                    return self._children[-1]


@cache
def verifier_of_this_process() -> Verifier:
    """The children of this process, none of which is started yet."""
    return Verifier()


# A forked process must not share its parent's pipes, nor inherit a lock that some other thread held.
os.register_at_fork(after_in_child=verifier_of_this_process.cache_clear)


# ---------------------------------------------------------------------- the child


def _judge() -> Callable[[str, str, bool, int], int]:
    """The judgement of one text; imports math-verify, which a caller's process need not have."""
    from math_verify.grader import verify
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig, parse

    latex, both = (LatexExtractionConfig(),), (ExprExtractionConfig(), LatexExtractionConfig())

    def read(text: str, config: tuple, limit: int) -> list:
        try:
            return parse(text, config, parsing_timeout=limit, raise_on_error=True)
        except Exception:  # math-verify's time limit is none of these
            return []

    def same(gold: list, given: list, limit: int) -> bool:
        def equal(a: object, b: object) -> bool:
            try:
                return verify(a, b, timeout_seconds=limit, raise_on_error=True) and not _apart(a, b)
            except Exception:
                return False

        return any(equal(a, b) for a in gold for b in given)

    def consistent(reference: str, text: str, limit: int) -> bool:
        found = chains(text)
        if all(len(chain) == 1 for chain in found) or "=" in reference or is_chosen(reference, text):
            return True
        wanted, *numbers = [
            [_number(read(f"${part}$", latex, limit)) for part in chain] for chain in ([reference], *found)
        ]
        if wanted[0] is None and len(found) == 1:  # no number is asked for, so a side that is one says something else
            return not any(number is not None for number in numbers[0])
        return all(map(_near, ((wanted if len(found) == 1 else []) + chain for chain in numbers)))

    def judge(reference: str, text: str, whole: bool, limit: int) -> int:
        gold = read(f"\\boxed{{{reference}}}", latex, limit)
        if whole:
            return RIGHT if same(gold, read(text, both, limit), limit) else WRONG
        right, short = same(gold, read(f"\\boxed{{{text}}}", both, limit), limit), len(text) <= LONGEST
        right = right or any(
            same(read(f"${a}$", latex, limit), read(f"${b}$", latex, limit), limit)
            for a, b in (readings(reference, text) if short else ())
        )
        return WRONG if not right else RIGHT if short and consistent(reference, text, limit) else UNSURE

    return judge


def _near(numbers: list[float | None]) -> bool:
    first, *others = [number for number in numbers if number is not None] or [0.0]
    return all(abs(number - first) <= 0.02 * abs(first) for number in others)


def _number(parsed: list) -> float | None:
    try:
        return float(parsed[0].doit()) if parsed[0].is_number else None
    except Exception:
        return None


def _apart(a: object, b: object) -> bool:
    """Whether two numbers differ although their difference is nearly zero: both are tiny.

    math-verify compares the difference with zero and floats after six decimals, so that 1/2004! equals 1/2006!
    (its issue 14) and 0.0000001 equals 0.0000002. Exact numbers must agree in 9 digits, floats in two.
    """
    from sympy import Basic, Float

    if not (isinstance(a, Basic) and isinstance(b, Basic) and a.is_number and b.is_number):
        return False
    try:
        a, b = a.doit(), b.doit()
        rounded = a.has(Float) or b.has(Float)
        left, right = a.evalf(20), b.evalf(20)
        size = max(abs(left), abs(right))
        return bool(size < 1e-3 and abs(left - right) > size * (5e-3 if rounded else 1e-9))
    except (TypeError, ValueError, ArithmeticError, AttributeError, RecursionError):
        return False


def _serve(pipe: Connection) -> None:
    """Grade requests in the main thread until the parent closes the pipe or disappears."""
    import resource
    import signal

    judge = _judge()
    from math_verify.errors import TimeoutException

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business; we end with its pipe
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    pipe.send("ready")
    # The parsers print and log whole expressions, megabytes of some responses.
    logging.disable(logging.CRITICAL)
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            verdict = judge(*request)
        except TimeoutException:
            verdict = None
        except Exception:
            verdict = WRONG
        pipe.send(verdict)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
