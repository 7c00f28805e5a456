# SPDX-License-Identifier: Apache-2.0
"""The miniature world's own annotator."""

from opd_ext.credit.annotate.base import Annotator, Found, Request, Text, register_annotator
from opd_ext.credit.annotate.parse import MAX_SPANS
from opd_ext.tinymath.diagnosis import diagnose


@register_annotator("rule")
class RuleAnnotator(Annotator):
    """The miniature world's own diagnosis: decisive columns of a right answer, the first wrong line of another."""

    async def find(self, request: Request, text: Text) -> Found:
        question = request.extra_info.get("question", request.problem)
        found = diagnose(str(question), text.text, request.correct)[:MAX_SPANS]
        return Found("ok" if found else "empty", [tuple(finding) for finding in found])
