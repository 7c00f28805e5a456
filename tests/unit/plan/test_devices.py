# SPDX-License-Identifier: Apache-2.0
"""Devices of all parts of a run: what is refused, what each of them holds, and what the plan says of them."""

from io import StringIO

import pytest
from rich.console import Console

from opd_ext.config.checks import check
from opd_ext.config.compose import compose_config
from opd_ext.errors import ConfigError
from opd_ext.plan import as_json
from opd_ext.plan.machines import GiB
from opd_ext.plan.memory import phases
from opd_ext.plan.page import _settings
from opd_ext.plan.timing import times
from tests.unit.plan.test_plan import ACTOR, REF, memory, plan

SEPARATE = "asynchronous=separate_node_8xh200"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("recipe=opd/qwen3_0_6b", "teacher_server=vllm_node_8xh200", "trainer.n_gpus_per_node=8"),
            "8 GPUs that train and 4 that serve the teacher are 12, and there are 1 node(s) of 8: set "
            "trainer.n_gpus_per_node=4",
        ),
        (
            ("recipe=crisp/qwen3_8b", SEPARATE, "trainer.n_gpus_per_node=8"),
            "8 GPUs that train and 4 that sample are 12",
        ),
        (
            ("recipe=opd/qwen3_0_6b", SEPARATE, "teacher_server=vllm_node_8xh200"),
            "4 GPUs that train, 4 that sample and 4 that serve the teacher are 12, and there are 1 node(s) of 8: lower",
        ),
        (
            (
                "recipe=opd/qwen3_0_6b",
                "teacher_server=vllm_node_8xh200",
                "opd.teacher.vllm.replicas=1",
                "opd.plan.nodes=2",
                "opd.teacher.vllm.tensor_parallel_size=12",
            ),
            "opd.teacher.vllm.tensor_parallel_size puts 12 GPUs on one node",
        ),
        (
            ("recipe=crisp/qwen3_8b", "trainer.n_gpus_per_node=2"),
            "tensor_model_parallel_size=4 takes 4 devices for a replica of vLLM, and trainer.nnodes x "
            "trainer.n_gpus_per_node are 2",
        ),
        (
            ("recipe=crisp/qwen3_8b", SEPARATE, "actor_rollout_ref.rollout.n_gpus_per_node=1"),
            "actor_rollout_ref.rollout.nnodes x actor_rollout_ref.rollout.n_gpus_per_node are 1",
        ),
    ],
)
def test_more_devices_than_there_are_and_replicas_without_any_are_refused(overrides, said):
    with pytest.raises(ConfigError) as refused:
        plan(*overrides)
    assert said in str(refused.value)


def test_a_sampler_on_devices_of_its_own_leaves_the_trainers_alone():
    """Four and four: as many GPU hours as there are GPUs, no vLLM in the update, half as many replicas as beside."""
    beside, apart = (plan("recipe=crisp/qwen3_8b", *more) for more in ((), (SEPARATE,)))
    assert (beside.gpus, beside.replicas) == (8, 2) and (apart.gpus, apart.ranks, apart.replicas) == (8, 4, 1)
    assert apart.gpus_there == 8
    sampling, *training = phases(apart)
    assert sampling.name == "generation" and not any("vLLM" in use for phase in training for use in phase.uses)
    assert sampling.uses.keys() == {"vLLM: weights, cache", "vLLM: CUDA graphs", "CUDA context, NCCL"}
    assert times(apart).phases["generation"] > times(beside).phases["generation"]


def test_ranks_that_share_sequences_and_devices_beside_the_trainers_are_told():
    def devices(*words):
        config = compose_config(list(words))
        console = Console(width=400, record=True, file=StringIO())
        with console.capture() as said:
            console.print(_settings(config, check(config), {}))
        return next(line for line in said.get().splitlines() if "devices" in line and "cuda" in line)

    shared = devices("recipe=crisp/qwen3_8b", f"{ACTOR}.ulysses_sequence_parallel_size=2")
    assert "8 FSDP2 rank(s), 2 of which share every sequence (Ulysses) and 2 vLLM" in shared
    assert "4 FSDP2 rank(s) and 1 vLLM replica(s) of tensor parallel 4; 4 more sample" in devices(
        "recipe=crisp/qwen3_8b", SEPARATE
    )
    assert "; 4 more serve the teacher" in devices(
        "recipe=opd/qwen3_0_6b", "teacher_server=node_8xh200", "trainer.n_gpus_per_node=4"
    )


def test_teachers_that_do_not_fit_are_advised_to_wait_in_the_hosts_memory():
    """32.8 and 30.5 billion parameters in bfloat16 over two GPUs are 59 GiB on each; streamed, two layers are left."""
    words = (
        "recipe=opd/qwen3_0_6b", "opd.teacher_key=data_source", "trainer.n_gpus_per_node=2", "opd.plan.gpu=h100",
        "opd.teachers={a: {path: Qwen/Qwen3-32B}, b: {path: Qwen/Qwen3-30B-A3B}}",
        "data.train_batch_size=64", f"{ACTOR}.ppo_mini_batch_size=64",
    )  # fmt: skip
    config, away = compose_config(list(words)), f"{REF}.fsdp_config.param_offload=true"
    (grave,) = [said for said in as_json(config, check(config))["advice"] if "OUT OF MEMORY in teacher" in said]
    assert away in grave
    here, streamed = (memory(*words, *more)["teacher"] for more in ((), (away,)))
    assert here.uses["teacher weights"] == pytest.approx(63.3e9, rel=0.01)
    assert here.bytes > 79 * GiB > streamed.bytes and "teacher weights" not in streamed.uses
