# SPDX-License-Identifier: Apache-2.0
"""A run that will overflow says so when it starts; one that certainly cannot fit is refused."""

import os
from pathlib import Path
from unittest import mock

import pytest

from opd_ext.config.checks import check
from opd_ext.config.compose import compose_config
from opd_ext.doctor.devices import Gpu, NoDriver
from opd_ext.errors import ConfigError
from opd_ext.plan.run import read_run
from opd_ext.preflight.findings import Findings
from opd_ext.preflight.size import check_memory

ROLLOUT = "actor_rollout_ref.rollout"
CACHE = "ray_kwargs.ray_init.runtime_env.env_vars.VLLM_CPU_KVCACHE_SPACE"


@pytest.fixture(autouse=True)
def every_card_is_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def cards(mib, count=1):
    return lambda: [Gpu("a card", mib, 0.0, "580.65.06")] * count


def notes(gpus, *overrides):
    config, findings = compose_config(list(overrides)), Findings()
    # Whoever runs a Ray on this machine beside the tests has it joined.
    with mock.patch("opd_ext.preflight.machine._started_here", return_value=Path("/nowhere")):
        check_memory(read_run(config, check(config)), findings, gpus)
    return findings.notes


def test_a_start_notes_what_will_not_fit_and_a_start_that_fits_does_not(start, presets_composed_once):
    status, said, started, printed = start(f"{CACHE}='100000'")
    assert (status, len(started)) == (0, 1), said
    assert "note: OUT OF MEMORY on this machine: trainer" in printed and "sampler 100" in printed
    status, said, started, printed = start()
    assert (status, len(started)) == (0, 2) and "OUT OF MEMORY" not in printed, said


def test_a_dry_run_says_it_once(start, presets_composed_once):
    status, _, _, printed = start(f"{CACHE}='100000'", "--dry-run")
    assert status == 0 and printed.count("OUT OF MEMORY on this machine") == 1


def test_the_memory_is_that_of_the_smallest_card_here():
    assert notes(cards(81_559), "recipe=crisp/qwen3_1_7b_gpu_1") == []
    (note,) = notes(cards(46_068), "recipe=crisp/qwen3_1_7b_gpu_1")  # of an L40S, which the recipe does not name
    assert note.startswith("OUT OF MEMORY in generation from step 2 on") and "of 45 GiB; set " in note
    assert "tensor_model_parallel_size" not in note, "there is one card"
    whole, small = cards(143_771, 7)(), cards(81_559)()
    assert any("of 80 GiB" in note for note in notes(lambda: whole + small, "recipe=crisp/qwen3_32b"))


def test_a_sequence_that_has_no_room_beside_the_weights_is_noted():
    (note,) = notes(cards(81_559), "recipe=crisp/qwen3_4b_gpu_1", f"{ROLLOUT}.gpu_memory_utilization=0.16")
    assert note.startswith("vLLM WILL NOT START")


def test_weights_or_moments_beyond_the_card_are_refused():
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization=0.05 gives vLLM 4.0 of 79.6 GiB, and the weights"):
        notes(cards(81_559), "recipe=crisp/qwen3_4b_gpu_1", f"{ROLLOUT}.gpu_memory_utilization=0.05")
    with pytest.raises(ConfigError, match=r"An update holds .*AdamW moments 12.8.*LoRA"):
        notes(cards(24_564), "recipe=crisp/qwen3_1_7b_gpu_1")


def test_without_a_driver_or_on_a_cluster_the_machine_is_the_one_that_is_named():
    def none():
        raise NoDriver("there is no nvidia-smi")

    small = ("recipe=crisp/qwen3_1_7b_gpu_1", "opd.plan.gpu=l40s")
    assert notes(none, *small) == notes(cards(float("nan")), *small) != []
    with mock.patch.dict(os.environ, RAY_ADDRESS="elsewhere:6379"):
        assert notes(cards(24_564), *small) == notes(none, *small)


def test_a_run_of_an_adapter_is_not_told_to_use_one():
    (adapter, *_) = notes(cards(20_480), "recipe=crisp/qwen3_4b_gpu_1")
    assert "use more GPUs or a smaller model." in adapter


def test_a_plan_refuses_to_compute_an_untied_head_again_of_a_model_that_is_not_here(start, presets_composed_once):
    """Qwen3-8B is known by name to have a head of its own; that of 0.6B is its embedding, and GRPO has verl's loss."""
    offload = "actor_rollout_ref.model.enable_activation_offload=true"
    here = "--dry-run", "scale=node_8xh200", "actor_rollout_ref.model.enable_gradient_checkpointing=true", offload
    for method, model, refused in (("crisp", "8B", True), ("crisp", "0.6B", False), ("grpo", "8B", False)):
        status, said, _, _ = start(method, f"actor_rollout_ref.model.path=/elsewhere/Qwen3-{model}", *here)
        assert (status, "enable_activation_offload=true with" in said) == ((2, True) if refused else (0, False)), said
