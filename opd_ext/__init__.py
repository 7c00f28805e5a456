# SPDX-License-Identifier: Apache-2.0
"""On-policy distillation trainers as an extension of stock verl.

Kept free of imports: every verl, Ray and vLLM process loads this package at start-up, before any
framework is ready.
"""

__version__ = "0.1.0"
