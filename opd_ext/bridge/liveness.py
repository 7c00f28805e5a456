# SPDX-License-Identifier: Apache-2.0
"""While a trainer waits it asks whether those whom it waits for are alive.

verl's replay buffer polls until enough rollouts have arrived, and TransferQueue waits for an answer without a limit. A
process that dies in the middle (killed for memory, lost with its node) tells nobody, and a run would wait for ever.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from transfer_queue import interface

from opd_ext.bridge.interrupt import watched
from opd_ext.errors import RunError

LOOK_SECONDS = 5.0
"""Between two looks at the actors. A look costs one message each, answered between two other tasks."""


class Liveness:
    """Looks after actors by name, without ever waiting for one: a busy actor answers late, a dead one at once."""

    def __init__(self, actors: Mapping[str, Any]):
        self._actors = dict(actors)
        self._asked: dict[Any, str] = {}

    def look(self) -> None:
        """Read what was answered, and ask again.

        Raises:
            RunError: an actor is dead; one sentence, Ray's own words behind it.
        """
        waiting = set(self._asked.values())
        for name, actor in self._actors.items():
            if name not in waiting:
                self._asked[actor.__ray_ready__.remote()] = name
        if not self._asked:  # there is nobody, which Ray would not wait for
            return
        answered, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
        for answer in answered:
            name = self._asked.pop(answer)
            try:
                ray.get(answer)
            except ActorUnavailableError:  # Ray is trying to reach it again
                continue
            except RayActorError as error:
                raise RunError(f"{name} is dead, so that the run cannot go on: {error}") from error


class Silence:
    """Notices that nothing arrives any more."""

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic):
        """Args:
        limit: seconds, ``opd.rollout.silence_seconds``.
        """
        self._limit, self._clock = limit, clock
        self._seen: Any = None
        self._since = clock()

    def look(self, state: Any, waiting: int) -> None:
        """Compare with the last look.

        Args:
            state: anything that changes whenever something arrives.
            waiting: prompts whose rollouts have not all arrived.

        Raises:
            RunError: it has not changed for too long.
        """
        now = self._clock()
        if state != self._seen:
            self._seen, self._since = state, now
        elif now - self._since > self._limit:
            raise RunError(
                f"no rollout has arrived for {self._limit:g} s and those of {waiting} prompts are still out: a tool, "
                "an agent loop or the rollout server hangs. If one response may take that long, raise "
                "opd.rollout.silence_seconds."
            )


def processes(loops: Any, graders: Any, replicas: Any, ranks: Any, teachers: Any = None) -> dict[str, Any]:
    """The actors without which a run cannot go on, by a name for people.

    Args:
        loops: verl's agent loop manager.
        graders: the reward workers, None if the trainer grades.
        replicas: of the rollout engine; each holds its servers.
        ranks: the worker group that trains.
        teachers: verl's manager of its own teacher servers, None without any.
    """
    of_teachers = [] if teachers is None else teachers.teacher_model_managers.values()
    groups = {
        "agent loop worker": loops.agent_loop_workers,
        "reward worker": graders or (),
        "vLLM server": [server for replica in replicas for server in replica.servers],
        "verl's teacher server": [
            server for manager in of_teachers for replica in manager.rollout_replicas for server in replica.servers
        ],
        "trainer rank": ranks.workers,
        "queue": _queue(),
    }
    return {f"{name} {i}": actor for name, group in groups.items() for i, actor in enumerate(group)}


def _queue() -> list[Any]:
    """TransferQueue's controller and the storage that this process has started."""
    storage = interface._TQ_STORAGE or {}
    units = [actor for group in storage.values() if isinstance(group, Mapping) for actor in group.values()]
    return [actor for actor in (interface._TQ_CONTROLLER, *units) if hasattr(actor, "__ray_ready__")]


def guarded(actors: Liveness) -> AbstractContextManager[None]:
    """Within the block a dead actor interrupts whatever the main thread waits for; see :func:`watched`."""
    return watched(actors.look, LOOK_SECONDS, "liveness")


@contextmanager
def impatient(buffer: Any, limit: float) -> Iterator[None]:
    """While verl's replay buffer waits, silence ends the run.

    Args:
        buffer: a ``ReplayBuffer``. Its wait between two polls is where we look.
        limit: seconds, ``opd.rollout.silence_seconds``.
    """
    wait, silence = buffer._wait_for_next_poll, Silence(limit)

    def poll(partition: str, last: float) -> float:
        silence.look(_state(buffer, partition), len(buffer.pending_keys[partition] | buffer.running_keys[partition]))
        return wait(partition, last)

    buffer._wait_for_next_poll = poll
    try:
        yield
    finally:
        del buffer._wait_for_next_poll


def _state(buffer: Any, partition: str) -> tuple[int, ...]:
    """Changes whenever a prompt starts or ends, or a row arrives."""
    sets = (buffer.pending_keys, buffer.running_keys, buffer.finished_keys, buffer.failure_keys, buffer.partitions)
    return tuple(len(one[partition]) for one in sets)
