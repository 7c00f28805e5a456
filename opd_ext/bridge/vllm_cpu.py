# SPDX-License-Identifier: Apache-2.0
"""Weight sync into a vLLM server that runs on the CPU.

vLLM's CPU backend repacks linear weights after loading, so verl's in-place ``model.load_weights`` finds no loader on
the live parameters. vLLM's own ``reload_weights`` restores the loadable layout first. The class is named in the scale
config (``rollout.engine_kwargs.vllm.worker_extension_cls``), which verl passes on to vLLM unchanged.
"""

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from opd_ext.bridge.cpu_platform import own_socket


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension with the update of the rollout weights replaced by a full reload."""

    def _get_zmq_handle(self) -> str:
        return own_socket(super()._get_zmq_handle())

    def update_weights_from_ipc(
        self, peft_config: dict | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Receive all buckets from the trainer and reload the model from them.

        Raises:
            ValueError: for LoRA adapters, which the CPU rollout does not take.
        """
        if peft_config is not None:
            raise ValueError("LoRA adapters cannot be synced to the CPU rollout; set model.lora.merge=true.")
        received: list[tuple[str, torch.Tensor]] = []

        def keep(weights: list[tuple[str, torch.Tensor]], is_last: bool) -> None:
            # `.to("cpu")` does not copy, and the shared segment cannot be closed while views of it live.
            received.extend((name, tensor.clone()) for name, tensor in weights)

        BucketedWeightReceiver(
            zmq_handle=self._get_zmq_handle(), device=torch.device("cpu"), use_shm=use_shm
        ).receive_weights(on_bucket_received=keep)
        self.model_runner.reload_weights(weights_iterator=iter(received))
