# SPDX-License-Identifier: Apache-2.0
"""The settings of plain fine-tuning."""

from dataclasses import dataclass

from opd_ext.pipelines.settings import TracedConfig


@dataclass
class SFTConfig(TracedConfig):
    """Fine-tuning on traces: those of a column, a teacher's right ones, or (``teacher=model``) the model's own."""
