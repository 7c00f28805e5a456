# SPDX-License-Identifier: Apache-2.0
"""scale=cpu computes in bf16 where the processor multiplies in it."""

import pytest

from opd_ext.config import processor
from opd_ext.config.compose import compose_config


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx512f avx512_bf16", True),  # EPYC from Zen 4
        ("flags : fpu avx512f amx_bf16 amx_tile", True),  # Xeon from Sapphire Rapids
        ("Features : fp asimd bf16", True),  # Arm with FEAT_BF16
        ("flags : fpu avx2 f16c", False),
        ("flags : fpu bf16_of_a_name_that_only_begins_so", False),
    ],
)
def test_bf16_only_where_it_is_multiplied(flags, expected):
    assert processor.multiplies_in_bf16(flags) is expected


@pytest.mark.parametrize(("bf16", "names"), [(True, ("bf16", "bfloat16")), (False, ("fp32", "float32"))])
def test_trainer_teacher_and_sampler_compute_alike(bf16, names, monkeypatch):
    monkeypatch.setattr(processor, "multiplies_in_bf16", lambda: bf16)
    config = compose_config(["method=crisp", "world=gym", "scale=cpu"]).actor_rollout_ref
    trained = {config[part].fsdp_config.mixed_precision.param_dtype for part in ("actor", "ref")}
    assert (trained, config.rollout.dtype) == ({names[0]}, names[1])


def test_the_miniature_world_stays_exact(monkeypatch):
    monkeypatch.setattr(processor, "multiplies_in_bf16", lambda: True)
    config = compose_config(["method=crisp", "scale=cpu_tiny"]).actor_rollout_ref
    assert config.actor.fsdp_config.mixed_precision.param_dtype == "fp32" and config.rollout.dtype == "float32"
