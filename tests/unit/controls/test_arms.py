# SPDX-License-Identifier: Apache-2.0
"""Every control on every method: it changes what it says and nothing else, or a sentence says why it does not apply."""

import json

import pytest
from omegaconf import OmegaConf

from opd_ext.config.compose import compose_config
from opd_ext.controls.arms import METHOD, controls, plan_study
from opd_ext.controls.study import run_study
from opd_ext.errors import ConfigError
from opd_ext.report.controls import STUDY
from opd_ext.report.methods import preset_files
from opd_ext.run_state import running
from tests.unit.test_presets import leaves

pytestmark = pytest.mark.usefixtures("presets_composed_once")

CHANGES = {
    "constant_weight": {"opd.credit.placement"},
    "random_places": {"opd.credit.placement"},
    "prefix_only": {"opd.credit.placement", "opd.credit.prefix"},
    "another_problem": {"opd.context.problem"},
    "short_horizon": {"opd.horizon.end", "opd.horizon.stop"},
    "constant_advantage": {"opd.divergence.constant_advantage"},
    "instruction_alone": {"opd.validation.prompt", "trainer.val_only", "trainer.val_before_train"},
}
APPLY = {
    "crisp": {"prefix_only", "short_horizon", "instruction_alone"},
    "opsd": {"prefix_only", "short_horizon", "another_problem"},
    "sdpo": {"prefix_only", "another_problem"},
    "srpo": {"constant_weight", "random_places", "prefix_only", "another_problem"},
    "trace": {"random_places", "another_problem"},
    "rlsd": {"another_problem"},
    "opd": {"prefix_only", "short_horizon", "constant_advantage"},
    "exopd": {"prefix_only", "short_horizon"},
    "iw_opd": {"constant_weight", "random_places", "prefix_only", "short_horizon", "constant_advantage"},
    "tip": {"constant_weight", "random_places", "prefix_only", "short_horizon"},
    "grpo": set(),
    "cispo": set(),
}


def plan(*overrides, wanted="all", seeds=1, folder=None, dirs=()):
    return plan_study(["scale=cpu_tiny", *overrides], dirs, wanted, seeds, folder)


@pytest.mark.parametrize("method", sorted(preset_files()))
def test_a_control_applies_to_the_methods_that_it_can_say_something_about(method):
    study = plan(f"method={method}")
    assert {arm.name for arm in study.arms} == {METHOD, *APPLY[method]}
    assert set(study.skipped) == set(CHANGES) - APPLY[method]
    assert all(why.endswith(".") and "\n" not in why for why in study.skipped.values())


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_a_control_changes_what_it_says_and_nothing_else(name):
    assert controls() == sorted(CHANGES)
    method = next(method for method, names in APPLY.items() if name in names)
    before, after = (
        leaves(OmegaConf.to_container(compose_config([f"method={method}", *more])))
        for more in ([], [f"control={name}"])
    )
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed - {"opd.control"} <= CHANGES[name] and after["opd.control"] == name


def test_seeds_begin_where_the_configuration_says_and_folders_are_by_arm_and_seed(tmp_path):
    study = plan("method=crisp", "opd.seed=5", wanted="prefix_only", seeds=2, folder=tmp_path)
    assert study.seeds == (5, 6) and "opd.seed=5" not in study.overrides
    assert [study.run_dir(arm, 6).name for arm in study.arms] == ["method-seed6", "prefix_only-seed6"]


@pytest.mark.parametrize(
    "overrides, options, words",
    [
        (["opd.run_dir=x"], {}, ["opd.run_dir=x", "--out"]),
        (["control=prefix_only"], {}, ["control=prefix_only", "--controls"]),
        ([], {"wanted": "prefix"}, ["--controls prefix does not exist", "prefix_only"]),
        ([], {"wanted": "constant_weight"}, ["constant_weight applies to crisp", "kind=uniform"]),
        ([], {"seeds": 0}, ["--seeds 0", "at least 1"]),
        (["trainer.test_freq=-1"], {}, ["validation before and after", "trainer.test_freq"]),
        (["trainer.val_before_train=false"], {}, ["trainer.val_before_train=true"]),
        (["opd.teacher.weights=stale"], {}, ["opd.teacher.weights=stale"]),
    ],
)
def test_a_study_that_makes_no_sense_is_one_sentence(overrides, options, words, presets_composed_once):
    with pytest.raises(ConfigError) as refused:
        plan("method=crisp", *overrides, **options)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_an_arm_without_training_costs_no_more_than_a_validation():
    arms = plan_study(["recipe=crisp/qwen3_8b"], (), "instruction_alone", 1, None).arms
    hours = {arm.name: arm.hours for arm in arms}
    assert 0 < hours["instruction_alone"] < hours[METHOD] / 2


def test_a_control_of_ones_own_is_a_file(tmp_path):
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "half.yaml").write_text(
        "# @package _global_\nopd:\n  control: half\n  credit: {placement: prefix, prefix: 0.5}\n"
    )
    study = plan("method=crisp", wanted="half", dirs=[tmp_path])
    assert [arm.name for arm in study.arms] == [METHOD, "half"] and "prefix 0.5" in study.arms[1].places["credit"]


def finish(study):
    """Leave what finished runs leave."""
    for arm in study.arms:
        for seed in study.seeds:
            folder = study.run_dir(arm, seed)
            (folder / "generations").mkdir(parents=True)
            with running(folder):
                for step in (0, 2):
                    rows = [
                        {"data_source": "d", "index": i, "acc": float(i < 5 + step), "response_tokens": 9}
                        for i in range(9)
                    ]
                    lines = "".join(json.dumps(row) + "\n" for row in rows)
                    (folder / "generations" / f"val_{step}.jsonl").write_text(lines)
                (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "phase": "train"}) + "\n")


def test_finished_runs_are_left_alone_and_the_table_follows(tmp_path):
    study = plan("method=crisp", wanted="prefix_only", seeds=2, folder=tmp_path / "s")
    finish(study)
    run_study(study)  # a run would need a model: none is begun
    assert "* accuracy: " in (study.folder / "controls.md").read_text()
    assert json.loads((study.folder / STUDY).read_text())["arms"] == [METHOD, "prefix_only"]


def test_a_folder_with_runs_of_other_settings_is_refused(tmp_path):
    study = plan("method=crisp", wanted="prefix_only", folder=tmp_path / "s")
    finish(study)
    run_study(study)
    other = plan("method=crisp", "trainer.total_training_steps=3", wanted="prefix_only", folder=tmp_path / "s")
    with pytest.raises(ConfigError, match=r"holds the runs of overrides .*--out"):
        run_study(other)
