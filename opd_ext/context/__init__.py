# SPDX-License-Identifier: Apache-2.0
"""The second place of a method: what the teacher sees that the student does not (``opd.context``)."""

from opd_ext.context import contexts, feedback  # noqa: F401  (they register themselves)
from opd_ext.context.base import TeacherContext, context_names, copy_messages, get_context, register_context
from opd_ext.context.config import ContextConfig, build_context
from opd_ext.context.sequence import build_teacher_sequence, render, render_text

__all__ = [
    "ContextConfig",
    "TeacherContext",
    "build_context",
    "build_teacher_sequence",
    "context_names",
    "copy_messages",
    "get_context",
    "register_context",
    "render",
    "render_text",
]
