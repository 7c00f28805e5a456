# SPDX-License-Identifier: Apache-2.0
"""A thread that looks after others while the main thread waits, and can end that wait whatever it is for."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from opd_ext.errors import RunError


@contextmanager
def watched(
    look: Callable[[], None], every: float, name: str, disguise: type[BaseException] | None = None
) -> Iterator[None]:
    """Within the block the error that ``look`` raises interrupts whatever the main thread waits for.

    Args:
        look: called every ``every`` seconds in a thread called ``name``, until it has raised.
        disguise: what interrupts in its place where the waiting code lets nothing else through.

    Raises:
        RunError: of ``look``; only the main thread can be interrupted, so in another one nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over, found = threading.Event(), list[RunError]()

    def watch() -> None:
        while not over.wait(every):
            try:
                if not found:
                    look()
            except RunError as error:
                found.append(error)
            if found:  # again and again: what is interrupted may swallow it
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def interrupt(*_: Any) -> None:
        if found and not over.is_set():
            raise found[0] if disguise is None else disguise

    # Not SIGINT, which a shell has its background processes ignore.
    before = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=watch, name=name, daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        if found and disguise is not None and isinstance(error, disguise):
            raise found[0] from None
        raise
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
