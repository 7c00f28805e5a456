# SPDX-License-Identifier: Apache-2.0
"""The first place of a method: whose weights teach (``opd.teacher``)."""

from opd_ext.teacher.config import TeacherConfig
from opd_ext.teacher.kinds import (
    Teacher,
    TeacherOutput,
    get_teacher,
    register_teacher,
    teacher_names,
    teacher_version,
)
from opd_ext.teacher.weights import copy_shards, ema_shards

__all__ = [
    "Teacher",
    "TeacherConfig",
    "TeacherOutput",
    "copy_shards",
    "ema_shards",
    "get_teacher",
    "register_teacher",
    "teacher_names",
    "teacher_version",
]
