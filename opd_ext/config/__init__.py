# SPDX-License-Identifier: Apache-2.0
"""YAML presets (one file per method, one per scale) and the schema that refuses what makes no sense."""
