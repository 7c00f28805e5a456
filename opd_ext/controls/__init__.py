# SPDX-License-Identifier: Apache-2.0
"""``opd compare METHOD``: a method and what it is held against, planned, run and judged."""
