# SPDX-License-Identifier: Apache-2.0
"""Plain fine-tuning on given or verified traces: ``opd sft``."""
