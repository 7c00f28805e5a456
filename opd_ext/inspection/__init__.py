# SPDX-License-Identifier: Apache-2.0
"""``opd inspect``: rollouts of a run whose every token is coloured by the signal that a method gives it.

The signals are those of the loss itself (:mod:`opd_ext.objective`), computed afterwards from a checkpoint and from the
ids that the run has kept (:mod:`opd_ext.recorded`), so any method can be put to the same rollouts.
"""
