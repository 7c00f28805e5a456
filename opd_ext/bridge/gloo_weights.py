# SPDX-License-Identifier: Apache-2.0
"""Weights to rollout servers with devices of their own, where there is no accelerator: over gloo, tensor by tensor.

verl's transports (nccl, nixl, ...) need one. Named in ``rollout.checkpoint_engine.custom_backend_module``, which verl
imports in every process that sends or receives, before it looks the backend ``gloo`` up.
"""

import pickle
from collections.abc import AsyncGenerator, Generator
from datetime import timedelta
from typing import Any

import torch
from ray.util import get_node_ip_address
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.workers.rollout import base
from verl.workers.rollout.vllm_rollout import ServerAdapter

from opd_ext.bridge.cpu_platform import own_socket

TIMEOUT = timedelta(minutes=10)


class OwnSocketAdapter(ServerAdapter):
    """verl's way into a vLLM server, over a socket of this run's own, as :class:`CPUWorkerExtension` listens."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.zmq_handle = own_socket(self.zmq_handle)


base._ROLLOUT_REGISTRY["vllm", "async"] = f"{__name__}.{OwnSocketAdapter.__name__}"


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """The first trainer rank sends to all rollout workers; the others only gather with it.

    Args:
        bucket_size: verl's, unused: a tensor travels by itself.
        is_master: of the first trainer rank, whose address the others are told.
    """

    def __init__(self, bucket_size: int, is_master: bool = False):
        self._rank, self._group = -1, None
        self._store: Any = None
        self._is_master = is_master

    def prepare(self) -> Any:
        """Address of the store of the sender, None of others; made once."""
        if not self._is_master:
            return None
        if self._store is None:
            self._host = get_node_ip_address().strip("[]")
            self._store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return self._host, self._store.port

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """The sender is rank 0, rollout workers follow, and other trainer ranks have none (-1)."""
        size = 1 + rollout_world_size

        def told(ranks: list[int]) -> dict[str, list[Any]]:
            return {"rank": ranks, "world_size": [size] * len(ranks), "address": [metadata[0]] * len(ranks)}

        return told([0] + [-1] * (actor_wg_world_size - 1)), told(list(range(1, size)))

    def init_process_group(self, **kwargs: Any) -> None:
        """Join the group of sender and receivers, as :meth:`build_topology` says; it stays until the process ends."""
        self._rank = kwargs["rank"]
        if self._rank < 0 or self._group is not None:
            return
        if self._store is None:
            self._store = TCPStore(*kwargs["address"], is_master=False, wait_for_workers=False, timeout=TIMEOUT)
        self._group = ProcessGroupGloo(PrefixStore("weights", self._store), self._rank, kwargs["world_size"], TIMEOUT)

    def finalize(self) -> None:
        """Nothing is held between two syncs but the group."""

    async def send_weights(
        self, weights: Generator[tuple[str, torch.Tensor], None, None], global_steps: int | None = None
    ) -> None:
        """Every rank walks through ``weights``, since gathering a tensor takes all; the sender sends."""
        for name, tensor in weights:
            if self._rank == 0:
                whole = tensor.detach().cpu().contiguous()
                self._share_head((name, whole.dtype, tuple(whole.shape)))
                self._share(whole.view(-1).view(torch.uint8))
        if self._rank == 0:
            self._share_head(None)

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Yields: names and whole tensors, in the order in which they are sent."""
        while (head := self._share_head(None)) is not None:
            name, dtype, shape = head
            tensor = torch.empty(shape, dtype=dtype)
            self._share(tensor.view(-1).view(torch.uint8))
            yield name, tensor

    def _share_head(self, head: Any) -> Any:
        """The sender's ``head``, on every rank."""
        content = torch.frombuffer(bytearray(pickle.dumps(head)), dtype=torch.uint8)
        length = torch.tensor([len(content)])
        self._share(length)
        if self._rank != 0:
            content = torch.empty(int(length), dtype=torch.uint8)
        self._share(content)
        return pickle.loads(content.numpy().tobytes())

    def _share(self, tensor: torch.Tensor) -> None:
        self._group.broadcast(tensor, 0).wait()
