# SPDX-License-Identifier: Apache-2.0
"""The ``opd`` command. A subcommand imports what it needs when it runs, so that ``opd --help`` is instant."""

from opd_ext.cli import runs, data, results, pipelines  # isort: skip  (the order of `opd --help`)
from opd_ext.cli.app import app

__all__ = ["app", "data", "pipelines", "results", "runs"]
