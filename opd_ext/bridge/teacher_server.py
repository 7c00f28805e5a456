# SPDX-License-Identifier: Apache-2.0
"""A teacher on devices of its own: vLLM in an actor, which answers with hidden states instead of probabilities.

The last hidden states of a response, [R, H], are what a divergence over the whole vocabulary needs of a teacher: the
projection [V, H] is with those who ask. They are 2 H bytes a token in bfloat16, where logits would be 2 V.

vLLM serves any language model as one that embeds every token (``runner="pooling"``): the rows behind the last norm, in
the model's dtype. An actor runs one request after another, each a batch of its own, so that an answer depends on
nothing but the request.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from omegaconf import DictConfig, OmegaConf
from ray.exceptions import GetTimeoutError, RayError
from verl.utils.torch_dtypes import PrecisionType

from opd_ext.bridge.first_cause import first_cause, session_roots
from opd_ext.config.schema import OPDConfig
from opd_ext.errors import RunError
from opd_ext.teacher.config import ServingConfig

LOADING = -1
"""The version of weights that have not all arrived."""

Packed = tuple[np.ndarray, str, tuple[int, ...]]
"""See :func:`packed`."""


class Replicas(NamedTuple):
    """Who serves one teacher.

    Attributes:
        path: of the model that was loaded.
        actors: of :class:`TeacherServer`, of equal weights.
    """

    path: str
    actors: list[Any]


Servers = dict[str, Replicas]
"""By the name of the first teacher that is there."""


class ReloadExtension:
    """What vLLM's workers get beside their own methods: weights bucket by bucket, in the names of the checkpoint."""

    model_runner: Any

    def begin_reload(self) -> None:
        """Bring the layers back into the layout in which weights are loaded."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model_runner.get_model())

    def reload_bucket(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Some of the weights, whole: every worker cuts its part out."""
        self.model_runner.get_model().load_weights(iter(tensors.items()))

    def finish_reload(self) -> None:
        """Pack the layers as the kernels want them."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model_runner.get_model(), self.model_runner.model_config)


class TeacherServer:
    """One replica of a teacher.

    Args:
        arguments: of vLLM's engine; see :func:`engine_arguments`.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        # The engine in this very process: one process less, and a death of either is the death of the actor.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from opd_ext import plugin

        plugin.register()  # by which a CPU build of vLLM is found
        from vllm import LLM
        from vllm.config import PoolerConfig

        self.version = 0
        self._fault: Exception | None = None
        try:
            self._engine = LLM(**arguments, pooler_config=PoolerConfig(task="token_embed"))
        except Exception as error:  # of an actor that is not even made, Ray tells a whole traceback and no cause
            self._fault = error

    def ready(self) -> None:
        """Answers as soon as the model is loaded.

        Raises:
            Exception: vLLM's own, if it cannot be.
        """
        if self._fault is not None:
            raise self._fault

    def hidden(self, sequences: Sequence[np.ndarray], counts: Sequence[int], version: int) -> Packed:
        """The rows that predict the last ``counts[i]`` tokens of sequence i, end to end.

        Args:
            sequences: token ids of prompt and response.
            version: how often the weights must have moved.

        Returns:
            [sum of counts, H] of the model's dtype, packed.

        Raises:
            RuntimeError: the weights are another version.
        """
        from vllm import PoolingParams, TokensPrompt

        if version != self.version:
            raise RuntimeError(
                f"the teacher's server has version {self.version} of its weights, and version {version} is asked for"
            )
        prompts = [TokensPrompt(prompt_token_ids=ids.tolist()) for ids in sequences]
        params = PoolingParams(use_activation=False)
        answers = self._engine.encode(prompts, params, pooling_task="token_embed", use_tqdm=False)
        rows = [answer.outputs.data[-count - 1 : -1] for answer, count in zip(answers, counts, strict=True)]
        return packed(torch.cat(rows))

    def begin_reload(self) -> None:
        """Weights will come; what is asked meanwhile is refused, since their version is another one."""
        self.version = LOADING
        self._engine.collective_rpc("begin_reload")

    def reload_bucket(self, tensors: Mapping[str, Packed]) -> None:
        """Some of the weights, by the names of the checkpoint."""
        self._engine.collective_rpc("reload_bucket", args=({name: unpacked(*of) for name, of in tensors.items()},))

    def finish_reload(self, version: int) -> None:
        """They have come, and are ``version``."""
        self._engine.collective_rpc("finish_reload")
        self.version = version


def packed(tensor: torch.Tensor) -> Packed:
    """A tensor as it travels: its bytes, which Ray sends without a copy (numpy has no bfloat16), dtype and shape."""
    whole = tensor.detach().cpu().contiguous()
    return whole.view(-1).view(torch.uint8).numpy(), str(whole.dtype).removeprefix("torch."), tuple(whole.shape)


def unpacked(content: np.ndarray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A copy, since what Ray brings cannot be written to."""
    return torch.from_numpy(content.copy()).view(getattr(torch, dtype)).view(shape)


def engine_arguments(serving: ServingConfig, config: DictConfig, path: str) -> dict[str, Any]:
    """Arguments of vLLM's engine for a teacher at ``path``, by the settings of a run."""
    model, ref = config.actor_rollout_ref.model, config.actor_rollout_ref.ref
    compute = (ref.fsdp_config.mixed_precision or {}).get("param_dtype", "bf16")
    changed = dict(OmegaConf.to_container(model.override_config) or {}) if model.override_config else {}
    changed.pop("attn_implementation", None)  # of transformers
    length = config.opd.max_pair_length
    found = {
        "model": path,
        "runner": "pooling",
        "convert": "embed",
        "dtype": PrecisionType.to_dtype(compute),
        "tensor_parallel_size": serving.tensor_parallel_size,
        "distributed_executor_backend": "mp" if serving.tensor_parallel_size > 1 else "uni",  # no actors of vLLM's own
        "gpu_memory_utilization": serving.gpu_memory_utilization,
        "max_model_len": length,
        "max_num_batched_tokens": max(length, serving.tokens_per_call),
        "enable_prefix_caching": False,  # rows of a cached prefix are not computed, and would be missing
        "trust_remote_code": bool(model.get("trust_remote_code")),
        "seed": config.opd.seed,
        "worker_extension_cls": f"{__name__}.{ReloadExtension.__name__}",
        "hf_overrides": {**changed, "head_dtype": "model"},  # else vLLM sends float32
        "disable_log_stats": True,
        "enforce_eager": config.opd.device == "cpu",
    }
    return found | dict(serving.engine)


def start(opd: OPDConfig, config: DictConfig) -> Servers:
    """Bring all servers of a run up, and wait for them.

    Raises:
        RunError: one does not come up; one sentence with the first cause.
    """
    found: Servers = {}
    for name, view in opd.teacher_servers.items():
        serving = view.opd.teacher.vllm
        path = view.opd.teacher.kind.path_of_weights or config.actor_rollout_ref.model.path
        arguments = engine_arguments(serving, config, path)
        actor = ray.remote(num_gpus=serving.tensor_parallel_size, num_cpus=1)(TeacherServer)
        found[name] = Replicas(path, [actor.remote(arguments) for _ in range(serving.replicas)])
    for name, view in opd.teacher_servers.items():
        _await(found[name].actors, view.key, view.opd.teacher.vllm, config)
    return found


def _await(replicas: Sequence[Any], key: str, serving: ServingConfig, config: DictConfig) -> None:
    try:
        ray.get([replica.ready.remote() for replica in replicas], timeout=serving.start_seconds)
    except GetTimeoutError as error:
        free = ray.available_resources().get("GPU", 0)
        raise RunError(
            f"The server of {key} has not come up within {key}.vllm.start_seconds={serving.start_seconds:g}: it asks "
            f"for {serving.replicas} x {serving.tensor_parallel_size} devices, and Ray has {free:g} to give. Leave it "
            "some (trainer.n_gpus_per_node), or wait longer."
        ) from error
    except RayError as error:
        cause = first_cause(error, session_roots(config.ray_kwargs.ray_init.get("_temp_dir")))
        raise RunError(f"The server of {key} could not be started: {cause}") from error


def processes(servers: Servers) -> Iterator[tuple[str, Any]]:
    """Every replica by a name for people."""
    for name, replicas in servers.items():
        for i, replica in enumerate(replicas.actors):
            yield f"teacher server {f'{name} ' if name else ''}{i}", replica


def traffic(counted: Sequence[tuple[float, int, int]]) -> dict[str, float]:
    """Metrics of what every rank has waited for and got: seconds, bytes, rows."""
    seconds, sent, rows = zip(*counted, strict=True)
    return {
        "teacher/served/wait_seconds": max(seconds),
        "teacher/served/bytes_per_token": sum(sent) / sum(rows) if sum(rows) else 0.0,
    }
