# SPDX-License-Identifier: Apache-2.0
"""Annotators: which spans of a rollout decided its outcome, and of what kind they are."""

from opd_ext.credit.annotate import controls, models  # noqa: F401  (they register themselves)
from opd_ext.credit.annotate.align import align
from opd_ext.credit.annotate.base import (
    FAILURES,
    STATUSES,
    Annotation,
    Annotator,
    Found,
    Request,
    Text,
    annotator_names,
    build_annotator,
    get_annotator,
    register_annotator,
)
from opd_ext.credit.annotate.config import AnnotatorConfig
from opd_ext.credit.annotate.metrics import annotation_metrics
from opd_ext.credit.annotate.parse import parse
from opd_ext.credit.annotate.segments import segment

__all__ = [
    "FAILURES",
    "STATUSES",
    "Annotation",
    "Annotator",
    "AnnotatorConfig",
    "Found",
    "Request",
    "Text",
    "align",
    "annotation_metrics",
    "annotator_names",
    "build_annotator",
    "get_annotator",
    "parse",
    "register_annotator",
    "segment",
]
