# SPDX-License-Identifier: Apache-2.0
"""Contracts of vLLM: weights on their way into a server on the CPU, and the engine inside the sampler."""

import ast
import asyncio
import inspect
import threading
from pathlib import Path
from types import SimpleNamespace

import torch
import vllm
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver, BucketedWeightSender
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm import SamplingParams, TokensPrompt
from vllm.outputs import CompletionOutput, RequestOutput

from .seams import bare, parameters, says, seam

EXTENSION = "verl.workers.rollout.vllm_rollout.utils:vLLMColocateWorkerExtension"


def _written(file: str, kind: str, method: str) -> list[str]:
    """Parameters of a method as vLLM's source writes them: importing its model runner takes seconds."""
    tree = ast.parse((Path(vllm.__file__).parent / file).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind]
    (function,) = [node for node in classes[0].body if getattr(node, "name", "") == method]
    return [argument.arg for argument in function.args.args]


@seam(
    "bridge/vllm_cpu.py",
    covers="CPUWorkerExtension._get_zmq_handle",
    pins={f"{EXTENSION}._get_zmq_handle": "self", EXTENSION: None},
)
def socket_name(monkeypatch):
    """A server's worker listens at a name of job, replica and rank, the one that the trainer sends to."""
    monkeypatch.setenv("VERL_RAY_JOB_ID", "01000000")
    monkeypatch.setenv("VERL_REPLICA_RANK", "2")
    worker = bare(vLLMColocateWorkerExtension, local_rank=1, model_runner=SimpleNamespace())
    assert worker._get_zmq_handle() == "ipc:///tmp/rl-colocate-zmq-01000000-replica-2-rank-1.sock"


@seam(
    "bridge/vllm_cpu.py",
    covers="CPUWorkerExtension.update_weights_from_ipc",
    pins={
        f"{EXTENSION}.update_weights_from_ipc": "self peft_config= base_sync_done= use_shm=",
        "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:BucketedWeightReceiver": "zmq_handle device "
        "use_shm=",
        "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer:BucketedWeightReceiver.receive_weights": "self "
        "on_bucket_received",
    },
)
def buckets(tmp_path):
    """Weights arrive in buckets, as (name, tensor), in shared memory that is gone afterwards; the last one says so."""
    weights = {f"w{i}": torch.full((200_000,), float(i)) for i in range(3)}  # 800 kB each: a bucket of 1 MiB has one
    handle, received = f"ipc://{tmp_path}/weights.sock", []
    sender = BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True)
    thread = threading.Thread(target=lambda: asyncio.run(sender.async_send_weights(iter(weights.items()))))
    thread.start()

    def keep(bucket, is_last):
        received.append(([(name, tensor.clone()) for name, tensor in bucket], is_last))

    receiver = BucketedWeightReceiver(zmq_handle=handle, device=torch.device("cpu"), use_shm=True)
    receiver.receive_weights(on_bucket_received=keep)
    thread.join(timeout=10)
    assert [is_last for _, is_last in received] == [False, False, True]
    found = {name: tensor for bucket, _ in received for name, tensor in bucket}
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


@seam("bridge/vllm_cpu.py")
def reload():
    """``model_runner.reload_weights`` takes an iterator of (name, tensor) and restores the loadable layout first."""
    runner = "v1/worker/gpu_model_runner.py", "GPUModelRunner"
    assert _written(*runner, "reload_weights")[1:3] == ["weights_iterator", "weights_path"]
    text = (Path(vllm.__file__).parent / runner[0]).read_text()
    start = text.index("def reload_weights")
    body = text[start : start + 4000]
    order = ["initialize_layerwise_reload(model)", "model.load_weights(weights_iterator)", "finalize_layerwise_reload"]
    assert [body.index(step) for step in order] == sorted(body.index(step) for step in order)
    cpu = (Path(vllm.__file__).parent / "v1/worker/cpu_model_runner.py").read_text()
    assert "class CPUModelRunner(GPUModelRunner)" in cpu


RELOAD = "vllm.model_executor.model_loader.reload:"


@seam(
    "bridge/teacher_server.py",
    pins={
        "vllm:LLM.encode": None,
        "vllm:PoolingParams": None,
        "vllm.config:PoolerConfig": None,
        "ray:available_resources": "",
        "verl.utils.torch_dtypes:PrecisionType.to_dtype": None,
        "ray.exceptions:GetTimeoutError": None,
    },
)
def hidden_states():
    """A language model is served as one that embeds tokens: the rows behind its last norm, in its dtype, all of them.

    ``tests/stack/test_served_teacher.py`` compares them with the engine's.
    """
    from vllm import LLM, PoolingParams
    from vllm.config import PoolerConfig

    assert {"runner", "convert", "pooler_config", "hf_overrides"} <= set(inspect.signature(LLM).parameters)
    assert {"pooling_params", "pooling_task", "use_tqdm"} <= set(inspect.signature(LLM.encode).parameters)
    assert PoolerConfig(task="token_embed").task == "token_embed" and PoolingParams(use_activation=False)
    says("vllm.model_executor.layers.pooler.tokwise.heads:TokenEmbeddingPoolerHead.forward_chunk", "use_activation:")
    says("vllm.config.model:_get_head_dtype", 'if head_dtype == "model":')
    adapters = (Path(vllm.__file__).parent / "model_executor/models/adapters.py").read_text()
    assert "targets=(LogitsProcessor, ParallelLMHead)" in adapters, "a projection that is no embedding is not loaded"


@seam(
    "bridge/teacher_server.py",
    pins={f"{RELOAD}initialize_layerwise_reload": "model", f"{RELOAD}finalize_layerwise_reload": None},
)
def reload_in_buckets():
    """Between the two, ``load_weights`` may be called for some weights at a time; a worker takes methods of ours."""
    reload()
    text = (Path(vllm.__file__).parent / "v1/worker/worker_base.py").read_text()
    assert "worker_extension_cls" in text and "__bases__" in text


@seam(
    "bridge/served_teacher.py",
    pins={
        "verl.workers.engine.fsdp.transformer_impl:FSDPEngine.get_per_tensor_param": None,
        "ray:put": None,
        "ray.exceptions:GetTimeoutError": None,
    },
)
def whole_weights():
    """Weights come one by one and whole, under the names of the checkpoint."""
    path = "verl.workers.engine.fsdp.transformer_impl:FSDPEngine.get_per_tensor_param"
    says(path, "param.to(device, non_blocking=True).full_tensor() if isinstance(param, DTensor) else param")


@seam("config/scale/cpu_tiny.yaml")
def extension_class(config):
    """``rollout.engine_kwargs.vllm.worker_extension_cls`` goes to vLLM in the place of verl's own."""
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls.endswith("CPUWorkerExtension")
    # The server is an actor; in what it passes on, engine_kwargs come last.
    path = "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer.launch_server"
    says(path, '"worker_extension_cls": self._get_worker_extension_cls(),', "**engine_kwargs,}")
    source = "".join(inspect.getsource(vllm_server().launch_server).split())
    assert source.index('"worker_extension_cls"') < source.index("**engine_kwargs,}")


def vllm_server() -> type:
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    return vLLMHttpServer


@seam(
    "bridge/sampler.py",
    pins={
        "vllm:LLM": None,
        "vllm:TokensPrompt": None,
        "vllm:LLM.collective_rpc": "self method timeout= args= kwargs=",
        "vllm:LLM.reset_prefix_cache": None,
        "vllm.v1.engine.llm_engine:LLMEngine.add_request": None,
        "vllm.v1.engine.llm_engine:LLMEngine.step": "self",
        "vllm.v1.engine.llm_engine:LLMEngine.has_unfinished_requests": "self",
    },
)
def engine():
    """An engine in this process takes requests under names of ours, steps, and says why an answer ended."""
    from vllm import LLM
    from vllm.v1.engine.llm_engine import LLMEngine

    assert {"model", "seed"} <= set(inspect.signature(LLM).parameters)
    assert parameters(LLMEngine.add_request).split()[:4] == ["self", "request_id", "prompt", "params"]
    assert _written("v1/worker/gpu_worker.py", "Worker", "reload_weights") == ["self"]  # *args, **kwargs pass through
    assert {"finished", "outputs", "request_id"} <= set(inspect.signature(RequestOutput).parameters)
    assert {"token_ids", "finish_reason"} <= set(inspect.signature(CompletionOutput).parameters)
    assert TokensPrompt(prompt_token_ids=[1, 2])["prompt_token_ids"] == [1, 2]


@seam("bridge/sampler.py", pins={"vllm:SamplingParams": None})
def sampling():
    """Every decoding setting of a job is a sampling parameter; ``top_k`` 0 is off."""
    params = SamplingParams(
        temperature=0.9,
        top_k=0,
        top_p=0.8,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        max_tokens=5,
        stop_token_ids=[7],
        seed=2**31 - 1,
        detokenize=False,
    )
    assert (params.top_k, params.seed, params.stop_token_ids, params.max_tokens) == (0, 2**31 - 1, [7], 5)
