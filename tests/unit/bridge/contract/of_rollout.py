# SPDX-License-Identifier: Apache-2.0
"""Contracts of verl's agent loop: who calls our hooks, when, and what of a rollout reaches the queue."""

import asyncio
import inspect
import math
from types import SimpleNamespace
from unittest.mock import AsyncMock, Mock

import numpy as np
import ray
import torch
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.agent_loop import agent_loop
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, AgentLoopWorker
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.workers.rollout.replica import TokenOutput
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from opd_ext.bridge.agent_loop import OPDAgentLoopWorker
from opd_ext.config import schema
from opd_ext.credit.horizon import HorizonConfig

from .seams import bare, parameters, says, seam

TQ = "verl.trainer.ppo.v1.agent_loop_tq:"
LOOP = "verl.experimental.agent_loop.agent_loop:AgentLoopWorker."
MANAGER = "verl.experimental.reward_loop.reward_manager.naive:NaiveRewardManager"
PROMPT = [{"role": "user", "content": "1 + 1"}]


def _worker(**attributes):
    """verl's worker, which never saw its constructor."""
    return bare(AgentLoopWorkerTQ.__ray_metadata__.modified_class, **attributes)


@seam(
    "bridge/agent_loop.py",
    covers="__ray_metadata__",
    pins={f"{TQ}AgentLoopWorkerTQ": None, f"{TQ}AgentLoopManagerTQ": None},
)
def unwrapping():
    """``AgentLoopWorkerTQ`` is a Ray actor class; the class inside can be subclassed and wrapped again."""
    assert isinstance(AgentLoopWorkerTQ, ray.actor.ActorClass)
    inside = AgentLoopWorkerTQ.__ray_metadata__.modified_class
    assert inspect.isclass(inside) and issubclass(inside, AgentLoopWorker)
    assert isinstance(ray.remote(type("Probe", (inside,), {})), ray.actor.ActorClass)


@seam(
    "bridge/agent_loop.py",
    covers="OPDAgentLoopWorker.__init__ OPDAgentLoopWorker.config OPDAgentLoopWorker.tokenizer "
    "OPDAgentLoopWorker.llm_client",
    pins={
        f"{LOOP}__init__": "self config llm_client teacher_client= reward_loop_worker_handles=",
        "verl.workers.rollout.llm_server:LLMServerClient.generate": "self request_id * prompt_ids sampling_params "
        "image_data= video_data= audio_data= mm_processor_kwargs= **kwargs",
    },
)
def construction(config, monkeypatch):
    """A worker has the whole configuration, the tokenizer, and the client of vLLM's servers; the queue is joined."""
    joined = Mock()
    monkeypatch.setattr(agent_loop_tq.tq, "init", joined)
    worker = AgentLoopWorkerTQ.__ray_metadata__.modified_class(config, client := SimpleNamespace())
    joined.assert_called_once_with()
    assert worker.config is config and worker.llm_client is client
    assert isinstance(worker.tokenizer.eos_token_id, int)
    assert TokenOutput(token_ids=[1, 2]).token_ids == [1, 2]


@seam(
    "bridge/agent_loop.py",
    covers="OPDAgentLoopWorker._run_agent_loop",
    pins={f"{LOOP}_run_agent_loop": "self sampling_params trajectory * agent_name trace= **kwargs"},
)
def sessions(config, monkeypatch):
    """Every session is one ``_run_agent_loop`` with the prompt, its number, and whether it validates, at which step."""
    statuses, calls = [], []

    async def put(key, partition_id, tag):
        statuses.append((key, partition_id, tag["status"]))

    async def run(sampling_params, **kwargs):
        calls.append((sampling_params, kwargs))

    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_put", put)
    config.actor_rollout_ref.rollout.n = 2
    worker = _worker(config=config)
    object.__setattr__(worker, "_run_agent_loop", run)
    prompt = {"uid": "t1p0", "raw_prompt": PROMPT, "agent_name": "single_turn_agent", "global_steps": 3}
    trajectory = {"step": 3, "sample_index": 0, "rollout_n": 0, "validate": False}
    asyncio.run(worker._run_prompt(prompt, {"temperature": 1.0}, trajectory))
    assert [kwargs["session_id"] for _, kwargs in calls] == [0, 1]
    for params, kwargs in calls:
        assert params == {"temperature": 1.0} and kwargs["trajectory"] == trajectory
        assert kwargs["raw_prompt"] == PROMPT and kwargs["uid"] == "t1p0" and kwargs["global_steps"] == 3
    assert statuses == [("t1p0", "train", "running"), ("t1p0", "train", "finished")]
    found = asyncio.run(agent_loop.get_trajectory_info(3, [0], True))
    assert found[0]["step"] == 3 and found[0]["validate"] is True


@seam(
    "bridge/agent_loop.py",
    covers="OPDAgentLoopWorker._compute_score outputs[-1].reward_score",
    pins={f"{LOOP}_compute_score": "self outputs kwargs"},
)
def grades():
    """A rollout that has a ``reward_score`` is not graded again; a row without an answer gets 0 and no grade."""
    output = AgentLoopOutput(prompt_ids=[1, 2], response_ids=[3, 4], response_mask=[1, 1], metrics={})
    opd = SimpleNamespace(rollout=SimpleNamespace(grading_seconds=60))
    ours = bare(OPDAgentLoopWorker, reward_loop_worker_handles=["would be asked"], opd=opd)
    asyncio.run(ours._compute_score([output], kwargs={"reward_model": {"ground_truth": None}}))
    assert output.reward_score == 0.0 and math.isnan(output.extra_fields["reward_extra_info"]["acc"])
    asyncio.run(ours._compute_score([output], kwargs={"reward_model": {"ground_truth": "2"}}))
    assert output.reward_score == 0.0, "verl left it as it was"


@seam(
    "bridge/agent_loop.py",
    covers="OPDAgentLoopWorker._compute_teacher_logprobs OPDAgentLoopWorker._agent_loop_postprocess",
    pins={
        f"{LOOP}_compute_teacher_logprobs": "self output prompt_ids response_ids validate sample_kwargs=",
        f"{TQ}AgentLoopWorkerTQ.__ray_metadata__.modified_class._agent_loop_postprocess": "self output validate "
        "**kwargs",
    },
)
def finished_rollout(config, monkeypatch, queue):
    """``_agent_loop_postprocess`` scores and stores; ``_compute_teacher_logprobs`` comes in between; ``extra_fields``
    travel along."""
    turns = []

    async def score(outputs, kwargs):
        turns.append("score")
        outputs[-1].reward_score = 1.0
        outputs[-1].extra_fields["reward_extra_info"] = {"acc": 1.0}

    async def teacher(output, prompt_ids, response_ids, validate, sample_kwargs=None):
        turns.append("teacher")
        assert (prompt_ids, response_ids, validate) == ([1, 2], [3, 4], False)
        assert sample_kwargs["raw_prompt"] == PROMPT and sample_kwargs["session_id"] == 1
        assert output.reward_score == 1.0 and output.response_ids == [3, 4]
        output.extra_fields["opd_annotation"] = {"runs": [(0, 1, 1)]}

    async def put(keys, fields, tags, partition_id):
        turns.append("put")
        queue.kv_batch_put(keys=keys, fields=fields, tags=tags, partition_id=partition_id)

    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_batch_put", put)
    worker = _worker(config=config, processor=None, hf_model_type=None)
    object.__setattr__(worker, "_compute_score", score)
    object.__setattr__(worker, "_compute_teacher_logprobs", teacher)
    output = AgentLoopOutput(prompt_ids=[1, 2], response_ids=[3, 4], response_mask=[1, 1], metrics={})
    sample = {"uid": "t1p0", "session_id": 1, "raw_prompt": PROMPT, "global_steps": 1, "data_source": "d"}
    sample |= {"extra_info": {"index": 5}, "reward_model": {"ground_truth": "2"}, "index": 5}
    asyncio.run(worker._agent_loop_postprocess(output, False, **sample))
    assert turns == ["score", "teacher", "put"]
    ((key, tag),) = queue.kv_list("train")["train"].items()
    assert key == "t1p0_1_0" and (tag["prompt_len"], tag["response_len"], tag["seq_len"]) == (2, 2, 4)
    data = queue.kv_batch_get(keys=[key], partition_id="train")
    tensors = {"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 2, 3], "prompts": [1, 2], "responses": [3, 4]}
    tensors |= {"loss_mask": [1, 1], "response_mask": [1, 1], "rm_scores": [0.0, 1.0]}
    assert {name: data[name].unbind()[0].tolist() for name in tensors} == tensors
    from opd_ext.bridge.rollouts import read_rows

    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "text")
    (row,) = read_rows(SimpleNamespace(keys=[key], partition_id="train"), tokenizer, max_tokens=8, stops={4})
    assert (row["uid"], row["sample"], row["index"], row["data_source"]) == ("t1p0", 1, 5, "d")
    assert (row["score"], row["acc"], row["ground_truth"], row["truncated"]) == (1.0, 1.0, "2", False)
    assert row["annotation"] == {"runs": [[0, 1, 1]]}, "tuples come back as lists"


def _finish(worker, queue, monkeypatch, output, session):
    async def put(keys, fields, tags, partition_id):
        queue.kv_batch_put(keys=keys, fields=fields, tags=tags, partition_id=partition_id)

    monkeypatch.setattr(agent_loop_tq.tq, "async_kv_batch_put", put)
    sample = {"uid": "t9p0", "session_id": session, "raw_prompt": PROMPT, "global_steps": 1, "data_source": "d"}
    sample |= {"extra_info": {"index": 5}, "reward_model": {"ground_truth": "2"}, "index": 5}
    asyncio.run(worker._agent_loop_postprocess(output, False, **sample))


@seam("bridge/agent_loop.py", covers="OPDAgentLoopWorker._agent_loop_postprocess one.response_mask")
def horizon(config, monkeypatch, queue):
    """What ``response_mask`` leaves out trains in no loss, teacher's or verl's; a stopped rollout is not graded."""
    from opd_ext.bridge.rollouts import read_rows

    opd = schema.load(config.opd)
    opd.rollout.train_tokens = 8
    opd.horizon = HorizonConfig(start=0.25, end=0.5, steps=2)
    parts = {"config": config, "processor": None, "hf_model_type": None, "distillation_enabled": False}
    worker = bare(OPDAgentLoopWorker, **parts, annotator=None, stop_ids=[4], opd=opd, reward_loop_worker_handles=[])
    assert [worker._limit(False, step) for step in (1, 3)] == [8, 8]
    assert worker._limit(True, 1) == opd.rollout.val_tokens

    def finish(session, response, mask):
        output = AgentLoopOutput(prompt_ids=[1, 2], response_ids=response, response_mask=mask, metrics={})
        output.reward_score = None if opd.horizon.stop else 1.0
        _finish(worker, queue, monkeypatch, output, session)
        name = f"t9p0_{session}_0"
        data = queue.kv_batch_get(keys=[name], partition_id="train")
        (row,) = read_rows(SimpleNamespace(keys=[name], partition_id="train"), tokenizer, max_tokens=8, stops=[4])
        return [data[field].unbind()[0].tolist() for field in ("responses", "loss_mask", "response_mask")], row

    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "text")
    found, row = finish(0, [3, 5, 3, 4], [1, 0, 1, 1])  # of step 1, whose horizon is two tokens
    assert found == [[3, 5, 3, 4], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert (row["score"], row["stopped"], row["truncated"]) == (1.0, False, False)
    opd.horizon.stop = True
    assert [worker._limit(False, step) for step in (1, 2, 3)] == [2, 3, 4]
    _, row = finish(1, [3, 5], [1, 1])
    assert (row["stopped"], row["truncated"], row["score"]) == (True, False, 0.0) and math.isnan(row["acc"])
    opd.horizon.stop = False  # else a grader would be asked
    _, row = finish(2, [3, 4], [1, 1])
    assert row["stopped"] is False and row["acc"] == 1.0


@seam(
    "bridge/failures.py",
    covers="output.reward_score",
    pins={
        "verl.experimental.agent_loop.agent_loop:AgentLoopOutput": None,
        "verl.experimental.agent_loop.agent_loop:AgentLoopMetrics": None,
    },
)
def failed_rollouts(config, monkeypatch, queue):
    """A rollout that was never finished, or not graded, goes the way of any other, and keeps its score of 0."""
    from opd_ext.bridge.failures import mark_ungraded, unfinished
    from opd_ext.bridge.rollouts import read_rows

    worker = _worker(config=config, processor=None, hf_model_type=None, reward_loop_worker_handles=["a grader"])
    worker.distillation_enabled = False
    ungraded = AgentLoopOutput(prompt_ids=[1, 2], response_ids=[3, 4], response_mask=[1, 1], metrics={})
    mark_ungraded(ungraded, KeyError("unit_tests"))
    _finish(worker, queue, monkeypatch, unfinished([1, 2], 4, TimeoutError("tool")), 0)
    _finish(worker, queue, monkeypatch, ungraded, 1)
    tokenizer = SimpleNamespace(eos_token_id=4, decode=lambda ids, skip_special_tokens: "text")
    keys = ["t9p0_0_0", "t9p0_1_0"]
    rows = read_rows(SimpleNamespace(keys=keys, partition_id="train"), tokenizer, max_tokens=8, stops=[4])
    assert [row["failed"] for row in rows] == ["TimeoutError: tool", "KeyError: 'unit_tests'"]
    assert [(row["score"], row["acc"]) for row in rows] == [(0.0, 0.0)] * 2
    data = queue.kv_batch_get(keys=keys, partition_id="train", select_fields=["loss_mask"])
    assert [mask.tolist() for mask in data["loss_mask"].unbind()] == [[0], [1, 1]]


@seam(
    "bridge/agent_loop.py",
    covers="OPDAgentLoopWorker._compute_score OPDAgentLoopWorker._agent_loop_postprocess "
    "OPDAgentLoopManager.agent_loop_workers",
    pins={f"{LOOP}_compute_score": "self outputs kwargs", "ray.exceptions:RayActorError": None, "ray:get": None},
)
def raising_graders(config, monkeypatch, queue):
    """What a grader raises comes out of ``_compute_score``, and what a session raises out of ``_run_agent_loop``.

    The manager lists its workers. A dead actor is a ``RayActorError``.
    """
    from opd_ext.bridge.agent_loop import OPDAgentLoopWorker

    assert issubclass(ray.exceptions.ActorDiedError, ray.exceptions.RayActorError)
    assert "self.agent_loop_workers" in inspect.getsource(agent_loop.AgentLoopManager)
    grader = SimpleNamespace(compute_score=SimpleNamespace(remote=AsyncMock(side_effect=KeyError("unit_tests"))))
    worker = bare(
        OPDAgentLoopWorker,
        config=config,
        processor=None,
        hf_model_type=None,
        reward_loop_worker_handles=[grader],
        distillation_enabled=False,
        mm_processor_kwargs=None,
        annotator=None,
        stop_ids=[4],
        opd=SimpleNamespace(
            rollout=SimpleNamespace(train_tokens=8, val_tokens=8, grading_seconds=60), horizon=HorizonConfig()
        ),
    )
    output = AgentLoopOutput(prompt_ids=[1, 2], response_ids=[3, 4], response_mask=[1, 1], metrics={})
    _finish(worker, queue, monkeypatch, output, 2)
    assert output.reward_score == 0.0 and output.extra_fields["opd_failure"] == "KeyError: 'unit_tests'"


@seam(
    "bridge/agent_loop.py",
    pins={f"{MANAGER}.run_single": "self data", f"{MANAGER}.__init__": None},
)
def told_grader(config):
    """``extra_fields`` of a rollout, sent as ``tool_extra_fields``, come to the grader within ``extra_info``."""
    says(f"{LOOP}_compute_score", '"tool_extra_fields": np.array([o.extra_fields for o in outputs]')
    told = []

    def grade(data_source, solution_str, ground_truth, extra_info):
        told.append((solution_str, extra_info["truncated"], extra_info["index"]))
        return 1.0

    async def score():
        manager = NaiveRewardManager(config, SimpleNamespace(decode=lambda ids, skip_special_tokens: "text"), grade)
        tensors = {"responses": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
        others = {"data_source": "d", "reward_model": {"ground_truth": "2"}, "extra_info": {"index": 5}}
        others |= {"tool_extra_fields": {"truncated": True}}
        held = {name: np.array([value], dtype=object) for name, value in others.items()}
        return await manager.run_single(DataProto(TensorDict(tensors, batch_size=1), held))

    assert asyncio.run(score())["reward_score"] == 1.0
    assert told == [("text", True, 5)]


@seam(
    "bridge/engine.py",
    pins={f"{LOOP}_compute_score": "self outputs kwargs"},
)
def served_teacher():
    """verl's teacher servers leave ``teacher_logprobs``, row j for token j + 1, and a last row of zeros."""
    worker = _worker(distillation_enabled=True, teacher_key="data_source")
    scored = torch.tensor([2]), torch.tensor([[-0.5]])
    manager = SimpleNamespace(compute_teacher_logprobs_single=AsyncMock(return_value=scored))
    object.__setattr__(worker, "teacher_server_manager", manager)
    output = AgentLoopOutput(prompt_ids=[1], response_ids=[2], response_mask=[1], metrics={})
    asyncio.run(worker._compute_teacher_logprobs(output, [1], [2], validate=False))
    assert manager.compute_teacher_logprobs_single.await_args.kwargs["sequence_ids"] == [1, 2]
    assert output.as_dict()["teacher_logprobs"].tolist() == [[-0.5]]
    assert "teacher_logprobs" not in output.as_dict()["extra_fields"]
    from verl.workers.rollout.vllm_rollout.utils import extract_prompt_logprobs

    entry, found = {2: SimpleNamespace(logprob=-0.5, rank=1)}, {}
    extract_prompt_logprobs(SimpleNamespace(prompt_logprobs=[None, entry]), 0, found)
    assert found["prompt_logprobs"] == [[-0.5], [0.0]]


@seam(
    "bridge/likeliest.py",
    pins={
        "verl.experimental.teacher_loop.teacher_manager:_get_teacher_sampling_params": "teacher_model_config "
        "distillation_loss_config",
        "verl.workers.rollout.vllm_rollout.utils:extract_prompt_logprobs": "output num_prompt_logprobs result_dict",
    },
)
def likeliest_tokens(config):
    """With ``loss_mode=forward_kl_topk`` verl asks its servers for ``topk`` log-probs and has vLLM allow so many; an
    answer has them in the order of their ranks, row j of token j + 1, without the sampled one that is not among them.
    """
    from verl.experimental.teacher_loop.teacher_manager import _get_teacher_sampling_params
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import DistillationConfig
    from verl.workers.rollout.vllm_rollout.utils import extract_prompt_logprobs

    from opd_ext.bridge import likeliest
    from opd_ext.config.compose import compose_config

    topk = "opd.divergence={kind: forward_kl, support: topk, k: 2}"
    composed = compose_config(["method=opd", "teacher_server=cpu_tiny", "opd.teacher.path=/t", topk])
    asked: DistillationConfig = omega_conf_to_dataclass(composed.distillation)
    (teacher,) = asked.teacher_models.values()
    assert _get_teacher_sampling_params(teacher, asked.distillation_loss)["prompt_logprobs"] == 2
    assert teacher.inference.engine_kwargs["vllm"]["max_logprobs"] == 2
    # vLLM puts the sampled token first, whatever its rank, and the likeliest behind it.
    entries = [{9: (-5.0, 7), 3: (-0.2, 1), 4: (-2.0, 2)}, {4: (-1.5, 2), 3: (-0.4, 1)}]
    entries = [{i: SimpleNamespace(logprob=p, rank=r) for i, (p, r) in entry.items()} for entry in entries]
    found = {}
    extract_prompt_logprobs(SimpleNamespace(prompt_logprobs=[None, *entries]), 2, found)
    assert found["prompt_ids"] == [[3, 4], [3, 4], [0, 0]]
    assert found["prompt_logprobs"] == [[-0.2, -2.0], [-0.4, -1.5], [0.0, 0.0]]
    answer = torch.tensor(found["prompt_ids"], dtype=torch.int32), torch.tensor(found["prompt_logprobs"])
    likeliest.check_answer(*answer, 2)
    worker = _worker(distillation_enabled=True, teacher_key="data_source", served_topk=2)
    manager = SimpleNamespace(compute_teacher_logprobs_single=AsyncMock(return_value=answer))
    object.__setattr__(worker, "teacher_server_manager", manager)
    output = AgentLoopOutput(prompt_ids=[1, 2], response_ids=[4], response_mask=[1], metrics={})
    asyncio.run(worker._compute_teacher_logprobs(output, [1, 2], [4], validate=False))
    assert output.as_dict()[likeliest.IDS].tolist() == [[3, 4], [3, 4], [0, 0]]
    assert output.as_dict()[likeliest.LOG_PROBS].shape == (3, 2)


@seam(
    "bridge/agent_loop.py",
    pins={"vllm.sampling_params:RequestOutputKind": None, "vllm:SamplingParams": None},
)
def sampling_parameters():
    """A request's ``seed``, ``max_tokens``, ``detokenize`` and ``output_kind`` reach vLLM's ``SamplingParams``."""
    ours = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "ignore_eos": False}
    ours |= {"seed": 2**63 - 1, "detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY, "logprobs": None}
    params = SamplingParams(max_tokens=7, **ours)
    assert (params.seed, params.max_tokens, params.detokenize) == (2**63 - 1, 7, False)
    assert params.output_kind is RequestOutputKind.FINAL_ONLY
    # The server is an actor with an engine in it, so its two lines are read.
    path = "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer.generate"
    says(path, 'max_tokens = sampling_params.pop("max_tokens")')
    says(path, "SamplingParams(max_tokens=max_tokens, **sampling_params)")
    says(
        "verl.experimental.agent_loop.single_turn_agent_loop:SingleTurnAgentLoop.run", "sampling_params=sampling_params"
    )


@seam("bridge/evaluation.py")
def samples_of_a_prompt():
    """A prompt's own ``__rollout_n__`` comes before ``val_kwargs.n``, and is taken out of what goes on."""
    path = f"{TQ}AgentLoopWorkerTQ.__ray_metadata__.modified_class._run_prompt"
    says(path, 'n = prompt.pop("__rollout_n__",', "for i in range(n):", "session_id=i, **prompt")


@seam(
    "bridge/agent_loop.py",
    covers="OPDAgentLoopManager.__init__ OPDAgentLoopManager.agent_loop_workers_class",
    pins={"verl.experimental.agent_loop.agent_loop:AgentLoopManager.__init__": None},
)
def manager(config, monkeypatch):
    """The manager starts its workers from ``agent_loop_workers_class``, which may be set after its constructor."""
    started = AgentLoopManagerTQ(config, "client", "teacher", "handles")
    assert started.agent_loop_workers_class is AgentLoopWorkerTQ
    started.agent_loop_workers_class = kind = Mock()
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "0" * 56, "Alive": True, "Resources": {"CPU": 1}}])
    asyncio.run(started._init_agent_loop_workers())
    kind.options.return_value.remote.assert_called_once_with(config, "client", "teacher", "handles")
    says("verl.trainer.main_ppo:TaskRunnerV1.__ray_metadata__.modified_class.init_agent_loop_manager", "rollout.get(")
    assert parameters(AgentLoopManagerTQ.generate_sequences) == "self prompts"
