# SPDX-License-Identifier: Apache-2.0
"""Reading a run folder and showing it: the line per training step, the before/after table, curves and a page.

A run folder holds ``config.yaml``, ``metrics.jsonl`` (one object per line with ``step``, ``phase``
(``train`` or ``val``), ``time`` in unix seconds, and metrics), ``generations/val_<step>.jsonl`` (one line per
evaluated sample), ``checkpoints/`` and ``report/``. Only ``report/`` is written here.
"""
