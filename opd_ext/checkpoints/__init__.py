# SPDX-License-Identifier: Apache-2.0
"""What a run has saved: where it lies, how ranks share it, and how it becomes a model. Knows torch, and no trainer."""
