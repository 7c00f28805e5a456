# SPDX-License-Identifier: Apache-2.0
"""Names of release 0.1 still work; each goes with release 0.3, and says so."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import opd_ext

PACKAGE = Path(opd_ext.__file__).parent
OLD = {
    "objective.divergence": "reverse_kl forward_kl jsd topk_divergence register_divergence sampled_kl",
    "objective.head": "chunked_divergence divergence_head",
    "objective.credit": "position_weights importance_clip register_credit CreditInputs",
    "objective.schedule": "teacher_version trace_schedule",
    "objective.policy": "clipped_surrogate sampled_advantage span_gate prompt_mean_scale self_distilled_advantage",
    "objective.loss": "Objective MicroBatch Branch Surrogate Terms means",
    "objective.objective": "token_weights",
    "offline.t3s": "keep_mask random_keep pick_bottleneck",
    "offline.ssd": "truncated_distribution",
    "teacher.annotate": "parse segment align register_annotator Annotator AnnotatorConfig build_annotator",
    "teacher.base": "TeacherContext register_context",
    "teacher.context": "TeacherContext register_context build_context render build_teacher_sequence SameContext",
    "teacher.feedback": "FeedbackContext",
    "teacher.prompts": "instruction teacher_prompt ERROR_TYPES STEP_TYPES",
    "rewards.tinymath": "compute_score",
    "config.schema": "ConfigError load OPDConfig",
    "train": "compose_config main run",
}


@pytest.mark.parametrize("module", OLD)
def test_an_old_name_is_the_new_object(module):
    found = importlib.import_module(f"opd_ext.{module}")
    for name in OLD[module].split():
        thing = getattr(found, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):  # of registries, methods and tables come along too
            assert getattr(importlib.import_module(thing.__module__), name) is thing


def test_a_face_says_where_its_names_are_and_when_it_goes():
    faces = [path for path in PACKAGE.rglob("*.py") if '"""Moved to ' in path.read_text()]
    assert len(faces) >= 14
    for path in faces:
        text = path.read_text()
        new = re.search(r'"""Moved to (opd_ext[\w.]+).*; this name goes with release 0\.3\."""', text)
        assert new, f"{path} must say where its names are and when it goes"
        importlib.import_module(new[1])
        assert all(line.startswith(("#", '"""', "from opd_ext.")) for line in text.splitlines() if line), path
