# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation trainers as an extension of stock verl.

Kept free of frameworks: every verl, Ray and vLLM process loads this package at start-up, before any is ready.
"""

from opd_ext.moved import answer_old_names

__version__ = "0.1.0"

answer_old_names()
