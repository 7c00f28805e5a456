# SPDX-License-Identifier: Apache-2.0
"""The miniature world: arithmetic problems, a tokenizer and small models built from scratch on a CPU.

It exists so that the real reinforcement-learning stack can be tried, and its tests run, anywhere and
without a download. ``opd_ext.tinymath.build.build`` makes it; this package itself imports nothing,
because reward workers load :mod:`opd_ext.tinymath.problems` through it.
"""
