# SPDX-License-Identifier: Apache-2.0
"""A wait for rollouts ends where they cannot arrive any more."""

import asyncio
import os
import signal
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from unittest.mock import AsyncMock, patch

import pytest
import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from transfer_queue import interface

os.environ["VERL_PLATFORM"] = "cpu"  # before verl settles its platform in this process

from opd_ext.bridge import liveness
from opd_ext.bridge.agent_loop import OPDAgentLoopWorker
from opd_ext.bridge.failures import FAILURE
from opd_ext.bridge.liveness import Liveness, Silence, guarded, processes
from opd_ext.errors import RunError


class Answers:
    """Ray as one process sees it: what was asked, and what has come back so far."""

    def __init__(self):
        self.asked: list[str] = []
        self.back: dict[str, Exception | None] = {}

    def actor(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(__ray_ready__=SimpleNamespace(remote=lambda: self.asked.append(name) or name))

    def wait(self, pending, num_returns, timeout):
        assert timeout == 0, "nobody waits for an actor"
        return [one for one in pending if one in self.back], [one for one in pending if one not in self.back]

    def get(self, name):
        if error := self.back[name]:
            raise error


@pytest.fixture
def answers(monkeypatch):
    found = Answers()
    monkeypatch.setattr(liveness, "ray", SimpleNamespace(wait=found.wait, get=found.get))
    return found


def test_a_dead_actor_is_named_and_a_busy_one_is_left_alone(answers):
    watch = Liveness({name: answers.actor(name) for name in ("loop 0", "grader 0")})
    watch.look()
    assert answers.asked == ["loop 0", "grader 0"]
    answers.back = {"loop 0": None}  # the grader is busy
    watch.look()
    assert answers.asked == ["loop 0", "grader 0"], "whoever has not answered is not asked twice"
    watch.look()
    assert answers.asked == ["loop 0", "grader 0", "loop 0"], "and who has, is asked again"
    answers.back = {"loop 0": ActorUnavailableError("no answer yet", bytes(16))}
    watch.look()
    watch.look()
    answers.back = {"loop 0": RayActorError(error_msg="its worker died unexpectedly")}
    with pytest.raises(RunError, match="^loop 0 is dead, so that the run cannot go on: .*died unexpectedly"):
        watch.look()


def test_silence_counts_from_the_last_rollout_that_arrived():
    times = iter([0, 0, 59, 60, 119, 121])
    silence = Silence(60, clock=lambda: next(times))
    for state in ((8, 0), (8, 0), (7, 1), (7, 1)):  # at 0, 59, 60 and 119 s
        silence.look(state, 8)
    with pytest.raises(RunError, match="for 60 s and those of 7 prompts.*opd.rollout.silence_seconds"):
        silence.look((7, 1), 7)


def test_every_process_that_a_run_waits_for_is_watched(monkeypatch):
    queue, unit = (SimpleNamespace(__ray_ready__=None) for _ in range(2))
    monkeypatch.setattr(interface, "_TQ_CONTROLLER", queue)
    monkeypatch.setattr(interface, "_TQ_STORAGE", {"SimpleStorage": {"TransferQueueStorageUnit#0": unit}})
    loops = SimpleNamespace(agent_loop_workers=["a", "b"])
    replicas = [SimpleNamespace(servers=["s"]), SimpleNamespace(servers=["t", "u"])]
    found = processes(loops, ["g"], replicas, SimpleNamespace(workers=["w"]))
    assert found == {
        **{"agent loop worker 0": "a", "agent loop worker 1": "b", "reward worker 0": "g", "trainer rank 0": "w"},
        **{"vLLM server 0": "s", "vLLM server 1": "t", "vLLM server 2": "u", "queue 0": queue, "queue 1": unit},
    }
    assert len(processes(loops, None, replicas, SimpleNamespace(workers=["w"]))) == 8, "the trainer itself grades"
    managers = {"maths": SimpleNamespace(rollout_replicas=replicas), "code": SimpleNamespace(rollout_replicas=replicas)}
    teachers = SimpleNamespace(teacher_model_managers=managers)
    watched = processes(loops, ["g"], replicas, SimpleNamespace(workers=["w"]), teachers)
    assert {name: actor for name, actor in watched.items() if name not in found} == {
        f"verl's teacher server {i}": actor for i, actor in enumerate("stustu")
    }


def test_a_death_interrupts_a_wait_that_has_no_limit_of_its_own(answers, monkeypatch):
    """As that of TransferQueue for an answer: a lock that nobody opens, and whoever swallows the first error."""
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.02)
    before = signal.getsignal(signal.SIGUSR1)
    answers.back = {"queue 0": RayActorError(error_msg="its worker died unexpectedly")}
    never = threading.Lock()
    never.acquire()
    with pytest.raises(RunError, match="^queue 0 is dead"), guarded(Liveness({"queue 0": answers.actor("queue 0")})):
        with suppress(RunError):
            never.acquire(timeout=30)
        never.acquire(timeout=30)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_healthy_run_is_left_alone(answers, monkeypatch):
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.01)
    answers.back = {"queue 0": None}
    with guarded(Liveness({"queue 0": answers.actor("queue 0")})):
        time.sleep(0.2)
    assert 2 < len(answers.asked) < 40
    assert not [thread for thread in threading.enumerate() if thread.name == "liveness"]


@pytest.mark.parametrize("raised", [None, ray.exceptions.GetTimeoutError("of the user's own")])
def test_a_reward_function_that_hangs_fails_its_rollout_in_its_time(raised):
    worker = object.__new__(OPDAgentLoopWorker)
    worker.opd = SimpleNamespace(rollout=SimpleNamespace(grading_seconds=0.05))
    output = SimpleNamespace(extra_fields={}, reward_score=None)

    async def grade(outputs, kwargs):
        if raised:
            raise raised
        await asyncio.sleep(60)

    with patch.object(OPDAgentLoopWorker.__mro__[1], "_compute_score", AsyncMock(side_effect=grade)):
        asyncio.run(worker._compute_score([output], kwargs={"reward_model": {"ground_truth": "2"}}))
    wanted = "GetTimeoutError: of the user's own" if raised else "TimeoutError: the reward function took longer than "
    assert output.extra_fields[FAILURE].startswith(wanted) and output.reward_score == 0.0
    assert raised or output.extra_fields[FAILURE].endswith("opd.rollout.grading_seconds=0.05")
