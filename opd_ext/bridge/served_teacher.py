# SPDX-License-Identifier: Apache-2.0
"""The other end of :mod:`opd_ext.bridge.teacher_server`: a trainer rank asks, and has a teacher like any other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, RayError
from tensordict import TensorDict
from torch import Tensor
from verl.utils.device import get_device_id

from opd_ext.bridge.empty_model import projection
from opd_ext.bridge.failures import in_words
from opd_ext.bridge.teacher_server import Replicas, packed, unpacked
from opd_ext.errors import RunError
from opd_ext.objective.shares import dealt, exchange
from opd_ext.teacher.config import ServingConfig
from opd_ext.teacher.kinds import TeacherOutput

if TYPE_CHECKING:
    from opd_ext.bridge.engine import OPDEngine

BUCKET = 256 * 2**20
"""Bytes of weights that travel together when a teacher has moved."""


class ServedTeacher:
    """A teacher of a student's rank, on servers (:class:`opd_ext.teacher.kinds.Engine`).

    Args:
        student: this rank's engine.
        replicas: who serves it; of a teacher that does not move, its projection is read where they found the model.
        serving: how they are asked.
        key: under which the teacher's settings stand, for messages.
        weights: the engine that holds the weights of a teacher that moves, and the projection.
    """

    def __init__(
        self,
        student: OPDEngine,
        replicas: Replicas,
        serving: ServingConfig,
        key: str,
        weights: OPDEngine | None,
    ) -> None:
        self.student, self.replicas, self.serving, self.key = student, replicas.actors, serving, key
        self.weights, self.version = weights, 0
        self._seconds, self._bytes, self._rows = 0.0, 0, 0
        self._asked = torch.distributed.get_rank()  # so that ranks do not all begin with the same replica
        self._projection = None if weights is not None else projection(replicas.path)

    # ------------------------------------------------------------------ passes

    @torch.no_grad()
    def teacher_output(self, data: TensorDict, adapter: bool = True) -> TeacherOutput:
        """Its hidden states on the teacher's sequences, as the engine beside the student would compute them.

        Ranks that share sequences cut the samples between them, and the rows reach the ranks that they are dealt to.
        """
        head = self._head()
        group, ranks = self.student.ulysses_parallel_group, self.student.ulysses_sequence_parallel_size
        flags = data["has_teacher"].bool().tolist()
        lengths = torch.where(data["has_teacher"].bool(), data["responses"].offsets().diff(), 1).tolist()
        mine = list(range(len(flags)))
        if group is not None:
            mine = mine[torch.distributed.get_rank(group) :: ranks]
        ids = data["teacher_input_ids"].unbind()
        asked = [i for i in mine if flags[i]]
        said = dict(zip(asked, self._said([ids[i] for i in asked], [lengths[i] for i in asked], head), strict=True))
        nothing = head.new_zeros(1, head.shape[1])
        rows = [said.get(i, nothing) for i in mine]
        if group is None:
            return TeacherOutput(rows, head)
        held = torch.cat(rows) if rows else head.new_zeros(0, head.shape[1])
        source = torch.arange(len(lengths)).remainder(ranks).repeat_interleave(torch.tensor(lengths))
        own = exchange(held, source, dealt(lengths, ranks), group)
        return TeacherOutput(list(own.split(self.student.own_rows(lengths))), head)

    def _head(self) -> Tensor:
        if self.weights is not None:
            return self.weights.head_weight()
        return self._projection.to(device=get_device_id(), dtype=self.student.compute_dtype)

    def _said(self, sequences: Sequence[Tensor], counts: Sequence[int], like: Tensor) -> Iterator[Tensor]:
        """The rows [R_i, H] of each sequence; few requests are under way at once, the next follows an answer."""
        calls = list(self._calls([len(ids) for ids in sequences]))
        waiting: list[tuple[list[int], Any]] = []
        while calls or waiting:
            while calls and len(waiting) < self.serving.calls:
                places = calls.pop(0)
                replica = self.replicas[self._asked % len(self.replicas)]
                self._asked += 1
                ids = [sequences[i].cpu().numpy().astype(np.int32) for i in places]
                waiting.append((places, replica.hidden.remote(ids, [counts[i] for i in places], self.version)))
            places, answer = waiting.pop(0)
            began = time.monotonic()
            (said,) = self._answered(answer)
            self._seconds += time.monotonic() - began
            rows = unpacked(*said).to(device=like.device, dtype=like.dtype)
            self._bytes, self._rows = self._bytes + said[0].nbytes, self._rows + len(rows)
            yield from rows.split([counts[i] for i in places])

    def _calls(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Sequences that one request holds, in order; one that is longer than a request is one by itself."""
        places: list[int] = []
        tokens = 0
        for i, length in enumerate(lengths):
            if places and tokens + length > self.serving.tokens_per_call:
                yield places
                places, tokens = [], 0
            places.append(i)
            tokens += length
        if places:
            yield places

    def _answered(self, *answers: Any) -> list[Any]:
        """What servers answer.

        Raises:
            RunError: one does not, or is dead.
        """
        try:
            return ray.get(list(answers), timeout=self.serving.seconds)
        except GetTimeoutError as error:
            raise RunError(
                f"The server of {self.key} has not answered within {self.key}.vllm.seconds="
                f"{self.serving.seconds:g}: it hangs, or has too much to do. Give it more replicas or more time, or "
                "ask for less at once (tokens_per_call)."
            ) from error
        except RayError as error:
            raise RunError(f"The server of {self.key} has failed: {in_words(error)}") from error

    def traffic(self) -> tuple[float, int, int]:
        """Since the last call: seconds waited for answers, bytes of hidden states that came, rows of them."""
        found = self._seconds, self._bytes, self._rows
        self._seconds, self._bytes, self._rows = 0.0, 0, 0
        return found

    # ------------------------------------------------------------------ weights

    def push(self) -> None:
        """Send the weights that have moved to all replicas, which have them when this returns (collective).

        Gathering a tensor takes all ranks; the first sends, one bucket while the next is gathered.
        """
        if self.weights is None:
            return
        self.version += 1
        first, unserved = torch.distributed.get_rank() == 0, self._own_projection(self.weights.module)
        bucket: dict[str, Any] = {}
        size, loading = 0, []
        if first:
            self._all("begin_reload")
        for name, tensor in self.weights.get_per_tensor_param()[0]:
            if not first or name == unserved:
                continue
            content = packed(tensor.to(self.weights.compute_dtype) if tensor.is_floating_point() else tensor)
            if bucket and size + content[0].nbytes > BUCKET:
                self._answered(*loading)
                loading, bucket, size = self._load(bucket), {}, 0
            bucket[name], size = content, size + content[0].nbytes
        if first:
            self._answered(*loading)
            self._answered(*self._load(bucket))
            self._all("finish_reload", self.version)

    @staticmethod
    def _own_projection(module: torch.nn.Module) -> str | None:
        """The name of a projection that is no embedding as well: servers have none."""
        head = module.get_output_embeddings().weight
        if head is module.get_input_embeddings().weight:
            return None
        return next(name for name, weight in module.named_parameters() if weight is head)

    def _load(self, bucket: dict[str, Any]) -> list[Any]:
        shared = ray.put(bucket)  # once, however many replicas read it
        return [replica.reload_bucket.remote(shared) for replica in self.replicas]

    def _all(self, method: str, *args: Any) -> None:
        self._answered(*(getattr(replica, method).remote(*args) for replica in self.replicas))
