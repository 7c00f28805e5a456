# SPDX-License-Identifier: Apache-2.0
"""The table of methods: every preset, in the words of its five places."""

from pathlib import Path

import pytest

from opd_ext.config.checks import check
from opd_ext.config.compose import compose_config
from opd_ext.errors import ConfigError
from opd_ext.report.methods import read_methods

ROOT = Path(__file__).parents[3]
PATHS = ["data.train_files=/data/train.parquet", "data.val_files=/data/val.parquet"]
EXPECTED = {
    "grpo": ("-", "-", "-", "-", "vanilla"),
    "cispo": ("-", "-", "-", "-", "cispo, mean per prompt"),
    "crisp": ("periodic(50)", "instruction:v2", "reverse_kl, full", "uniform", "-"),
    "opsd": ("base", "solution", "forward_kl, full, clip 0.05, T 1.1", "uniform", "-"),
    "sdpo": (
        "ema(0.05)",
        "feedback",
        "jsd(0.5), top-100 of the student",
        "uniform, importance cap 2, rollout cap 2",
        "-",
    ),
}


def test_the_table_is_that_of_the_design():
    methods = read_methods()
    assert set(methods) >= {*EXPECTED, "opd", "iw_opd", "trace", "srpo", "tip"}
    for name, places in EXPECTED.items():
        assert tuple(methods[name].values()) == places, name
    assert methods["iw_opd"]["credit"] == "position(gamma 0.5), rollout cap 5"
    assert "on key spans" in methods["trace"]["divergence"] and "0 after 40" in methods["trace"]["credit"]


def test_presets_of_a_user_stand_beside_ours(monkeypatch):
    folder = ROOT / "examples" / "custom_method" / "config"
    monkeypatch.syspath_prepend(folder.parent)
    found = read_methods([folder])["surprise"]
    assert found["divergence"] == "hellinger, full"
    assert found["teacher weights"] == "warm(from 20, 0.05)"
    assert found["policy"] == "vanilla, advantages through unhesitating"


def test_an_option_that_a_users_piece_does_not_have_is_refused_by_name(monkeypatch):
    folder = ROOT / "examples" / "custom_method" / "config"
    monkeypatch.syspath_prepend(folder.parent)
    for key in (
        "teacher.stop",
        "context.notes",
        "divergence.order",
        "credit.share",
        "credit.annotator.word",
        "policy.factors",
    ):
        with pytest.raises(ConfigError, match=rf"opd\.{key} does not exist for .*: take it out"):
            check(compose_config(["method=surprise", *PATHS, f"opd.{key}=1"], [folder]))


@pytest.mark.parametrize("scale", ["cpu_tiny", "cpu_tiny_long", "node_8xh200"])
@pytest.mark.parametrize("method", sorted(read_methods()))
def test_every_method_composes_at_every_scale(method, scale, presets_composed_once):
    opd = check(compose_config([f"method={method}", f"scale={scale}", *PATHS]))
    assert opd.method == method


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=crisp", "opd.credit.kind=position", "+opd.credit.gamma=0.5"],
        ["method=crisp", "opd.credit.kind=entropy", "+opd.credit.share=0.2"],
        ["method=sdpo", "opd.credit.kind=spans", "+opd.credit.annotator.kind=rule"],
        ["method=opsd", "opd.teacher.weights=ema", "opd.divergence.clip_mode=token_scale"],
        ["method=opd", "opd.divergence.support=full", "opd.credit.rollout_cap=null"],
        ["method=sdpo", "+opd.policy={loss: vanilla, weight: 0.9}", "+opd.credit.weight=0.1"],
        ["method=trace", "opd.divergence.error={kind: reverse_kl, support: full}"],
    ],
)
def test_the_algebra_is_open(overrides, presets_composed_once):
    """Combinations that no paper has published compose without a line of code."""
    assert check(compose_config([*overrides, *PATHS]))


def test_no_method_imports_another():
    """A method is a preset and at most a registered class: nothing below is named after one and imported elsewhere."""
    sources = [path for path in (ROOT / "opd_ext").rglob("*.py")]
    for path in sources:
        for line in path.read_text().splitlines():
            if line.startswith(("from opd_ext", "import opd_ext")):
                assert not any(f".{name}" in line for name in ("grpo", "cispo", "sdpo", "opsd", "iw_opd", "crisp")), (
                    path
                )
