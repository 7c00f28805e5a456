# SPDX-License-Identifier: Apache-2.0
"""The only room that subclasses verl (and vLLM): an upgrade of either touches these files and no other."""
