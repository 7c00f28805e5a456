# SPDX-License-Identifier: Apache-2.0
"""verl's agent loop with additions per request: its own sampling seed and the token limit of its phase."""

import hashlib
import json
from typing import Any

import ray
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from vllm.sampling_params import RequestOutputKind


def request_seed(run_seed: int, step: int, prompt: Any, session: int) -> int:
    """Sampling seed of one rollout request, in [0, 2**63).

    Requests of a vLLM server otherwise draw from one stream, so that a rollout depends on which requests arrived
    before it. The prompt enters by its content, so the seed does not depend on its place in a batch.

    Args:
        run_seed: ``opd.seed``.
        step: global step; 0 in validation, so that every evaluation of a run faces the same random numbers.
        prompt: chat messages, anything that JSON can hold.
        session: index of the sample among the rollouts of its prompt.
    """
    identity = json.dumps([run_seed, step, prompt, session], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") >> 1


# verl decorates its worker with `ray.remote`; the class itself is what can be subclassed.
_Worker = AgentLoopWorkerTQ.__ray_metadata__.modified_class


class OPDAgentLoopWorker(_Worker):
    """Sets ``seed``, ``max_tokens`` and what vLLM need not produce; verl passes them to the server unchanged."""

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        opd, validate = self.config.opd, trajectory["validate"]
        step = 0 if validate else int(trajectory["step"])
        messages = [dict(message) for message in kwargs["raw_prompt"]]
        params = dict(sampling_params)
        params["seed"] = request_seed(opd.seed, step, messages, int(kwargs["session_id"]))
        params["max_tokens"] = opd.rollout.val_tokens if validate else opd.rollout.train_tokens
        # Only the finished token ids are read: no text and no intermediate output per token and request.
        params.update(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        return await super()._run_agent_loop(params, trajectory=trajectory, **kwargs)


class OPDAgentLoopManager(AgentLoopManagerTQ):
    """Starts :class:`OPDAgentLoopWorker` actors (named in ``rollout.agent.agent_loop_manager_class``)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(OPDAgentLoopWorker)
