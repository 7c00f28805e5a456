# SPDX-License-Identifier: Apache-2.0
"""Graders. Every module here offers one function with the signature of verl's custom reward functions.

``compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict``

The dict has the same keys for every sample of a data source, because verl stacks them into columns:

* ``score`` (float): what a policy loss would maximise and what decides whether a rollout counts as a success;
* ``acc`` (float, 0 or 1): correctness, the number that tables report; where a label of a rollout decides what is
  trained, the rollout is right if ``acc`` is 1 and ``score`` is positive;
* ``feedback`` (str): what a feedback-conditioned teacher may be shown. ``""`` when there is nothing to say,
  always ``""`` on success, and never a text that gives the reference answer away;
* any further floats are metrics.

``extra_info["truncated"]`` says whether a rollout was cut at its token limit.

Graders are called from the worker threads of an event loop, so they must not depend on signals in the calling
thread, and no response, however odd, may raise or block. A bad *reference* raises ``ValueError``: that is a
fault of the data, and grading it as a wrong answer would hide it. A module may also offer
``check_reference(ground_truth)``, which raises it: before a run starts, every reference that was read is asked about.
And it may offer ``check_machine(**arguments)``, asked with the arguments that a run gives the function: it says what
the grader works with on this machine, or raises ``RuntimeError`` if that is missing.

Nothing is imported here; name the module, e.g. ``pkg://opd_ext.rewards.math_dual`` in verl's reward config.
"""
