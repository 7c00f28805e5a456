# SPDX-License-Identifier: Apache-2.0
"""`opd methods NAME` answers where a method is: every file and line that it prints is the piece itself."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from opd_ext.cli import app
from opd_ext.report.method_page import choices, formula, recipes
from opd_ext.report.methods import preset, preset_files

ROOT = Path(__file__).parents[3]
# (method, key) -> the name that stands at the line which is printed
PIECES = {
    ("sdpo", "opd.teacher.weights"): "class MovingAverage",
    ("sdpo", "opd.context.kind"): "class FeedbackContext",
    ("sdpo", "opd.divergence.kind"): "def (jsd|topk_divergence)",
    ("sdpo", "opd.credit.kind"): "def uniform",
    ("trace", "opd.divergence.key.kind"): "def topk_divergence",
    ("trace", "opd.credit.annotator.kind"): "class SelfAnnotator",
    ("trace", "opd.policy.gate"): "def complement",
    ("rlsd", "opd.policy.shaping"): "def teacher_ratio",
    ("iw_opd", "opd.divergence.kind"): "def clipped_surrogate",
}


def _page(*arguments):
    return CliRunner().invoke(app, ["methods", *arguments])


def _choices(method):
    return {choice.key: choice for choice in choices(preset(OmegaConf.load(preset_files()[method])))}


@pytest.mark.parametrize(("method", "key"), PIECES)
def test_a_choice_is_where_the_page_says(method, key, monkeypatch):
    monkeypatch.chdir(ROOT)
    file, _, line = _choices(method)[key].where.rpartition(":")
    # A decorated piece begins with its decorators.
    begin = "\n".join((ROOT / file).read_text().splitlines()[int(line) - 1 : int(line) + 3])
    assert re.search(rf"\b{PIECES[method, key]}\b", begin)


def test_a_policy_loss_is_found_in_verl():
    file, _, line = _choices("grpo")["opd.policy.loss"].where.rpartition(":")
    import verl

    text = (Path(verl.__file__).parents[1] / file).read_text().splitlines()[int(line) - 1]
    assert re.search(r"register_policy_loss\(.vanilla.\)", text)


@pytest.mark.parametrize("method", sorted(preset_files()))
def test_every_method_has_a_page_with_its_paper_and_its_command(method):
    page = _page(method)
    assert page.exit_code == 0, page.output
    for choice in _choices(method).values():
        assert choice.key in page.output and choice.what
    assert "https://arxiv.org/abs/" in page.output or method == "opd"  # its preset stands for several papers
    assert f"opd train method={method} scale=cpu_tiny" in page.output


def test_a_recipe_of_a_search_is_shown_with_the_command_that_searches():
    shown = " ".join(_page("sdpo").output.split())
    assert "opd discover QUESTIONS recipe=sdpo/discover" in shown and "opd train recipe=sdpo/qwen3_8b" in shown
    assert "opd train recipe=sdpo/discover" not in shown


def test_the_formula_names_what_is_switched_on():
    lines = {method: formula(preset(OmegaConf.load(preset_files()[method]))) for method in ("grpo", "crisp", "trace")}
    assert lines["grpo"] == ["loss = policy(log q)"]
    assert lines["crisp"][0] == "loss = sum_t weight_t * lambda * credit_t * D_t"
    assert "D_t = reverse_kl, full" in lines["crisp"]
    assert "lambda = 0.5, to 0 within 30 steps after step 10" in lines["trace"]


def test_an_unknown_method_and_a_module_that_is_not_there_are_one_sentence():
    unknown = _page("nope")
    assert unknown.exit_code == 2 and unknown.output.startswith("opd methods: nope is no method; choose one of: cispo")
    missing = _page("--config-dir", str(ROOT / "examples" / "custom_method" / "config"))
    assert missing.exit_code == 2 and "surprise cannot be imported" in missing.output


def test_a_method_that_trains_agents_says_so():
    assert recipes("crisp")[-2:] == ["opd train method=crisp scale=cpu_tiny_tools", "opd train recipe=agents/qwen3_8b"]
    assert recipes("sdpo")[-1] == "opd train method=sdpo scale=cpu_tiny_tools"
    assert not any("tools" in command for command in recipes("opd")), "it has no teacher there"
