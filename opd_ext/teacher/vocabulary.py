# SPDX-License-Identifier: Apache-2.0
"""Whether two tokenizers mean the same by every id: what lets a teacher score the ids that a student sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def compare_vocabularies(student: Mapping[str, int], teacher: Mapping[str, int]) -> str | None:
    """The first difference between two token -> id maps in words, or None if every id of the student is shared.

    Sizes say nothing: two vocabularies of equal size may number their tokens differently. The teacher may know more
    tokens than the student, which will never sample them.
    """
    differing = sorted((i, token) for token, i in student.items() if teacher.get(token) != i)
    if not differing:
        return None
    i, token = differing[0]
    found = teacher.get(token)
    there = "does not exist" if found is None else f"has id {found}"
    return f"{len(differing)} of {len(student)} tokens differ, the first is {token!r}: id {i} here, it {there} there"


def check_same_ids(tokenizer: Any, teacher_path: str, key: str = "opd.teacher.path") -> None:
    """Refuse a teacher whose tokenizer numbers tokens differently.

    Args:
        tokenizer: the student's.
        teacher_path: folder or hub id of the teacher.
        key: where that stands.

    Raises:
        ValueError: naming the first token that differs.
    """
    from transformers import AutoTokenizer

    difference = compare_vocabularies(tokenizer.get_vocab(), AutoTokenizer.from_pretrained(teacher_path).get_vocab())
    if difference is not None:
        raise ValueError(
            f"{key}={teacher_path} does not share the student's token ids ({difference}); choose a teacher "
            "of the same tokenizer."
        )
