# SPDX-License-Identifier: Apache-2.0
"""The `opd` command: instant help, arguments handed on untouched, wrong input answered with one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import opd_ext
from opd_ext.cli import app

HEAVY = {"torch", "verl", "ray", "vllm", "transformers", "hydra", "pandas", "matplotlib"}


def opd(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["data", "--help"], ["report", "--help"]])
def test_help_imports_no_framework(arguments):
    probe = (
        "import sys\n"
        "from opd_ext.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit: pass\n"
        f"sys.exit(', '.join(sorted({HEAVY!r} & set(sys.modules))) or None)"
    )
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert answer.returncode == 0, f"imported: {answer.stderr}"


def test_version_is_the_packages():
    assert opd("--version").stdout.strip() == opd_ext.__version__


def test_every_command_is_listed():
    page = opd("--help").output
    assert all(command in page for command in ("train", "doctor", "data", "report"))


def test_train_hands_on_every_argument_in_order(monkeypatch):
    import opd_ext.train

    received = []
    monkeypatch.setattr(opd_ext.train, "main", lambda argv: received.extend(argv) or 7)
    arguments = [
        "method=crisp",
        "--dry-run",
        "+x=[1, 2]",
        "--cfg",
        "~data.seed",
        "-h",
        "--help",
        "y={a: 'b c'}",
    ]
    assert opd("train", *arguments).exit_code == 7
    assert received == arguments
    received.clear()
    assert opd("train", "--dry-run", "method=crisp").exit_code == 7
    assert received == ["--dry-run", "method=crisp"]


def test_train_refuses_an_unknown_method_in_one_sentence():
    answer = opd("train", "method=unheard_of", "--dry-run")
    assert answer.exit_code == 2
    assert answer.stderr.startswith("opd train: ") and "unheard_of" in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_an_unknown_model_is_refused_before_anything_is_built(tmp_path):
    answer = opd("data", "tinymath", "--models", "base,huge", "--out", str(tmp_path / "world"))
    assert answer.exit_code == 2
    assert answer.stderr.startswith("opd data tinymath: unknown models ['huge']")
    assert not (tmp_path / "world").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    answer = opd("report", str(tmp_path))
    assert answer.exit_code == 2
    assert answer.stderr.startswith("opd report: ") and str(Path(tmp_path)) in answer.stderr


def test_a_missing_run_folder_is_refused(tmp_path):
    assert opd("report", str(tmp_path / "none")).exit_code == 2
