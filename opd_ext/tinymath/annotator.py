# SPDX-License-Identifier: Apache-2.0
"""The miniature world's own annotator."""

from opd_ext.credit.annotate.base import Annotator, Found, Request, Text, register_annotator
from opd_ext.credit.annotate.parse import MAX_SPANS
from opd_ext.tinymath.diagnosis import diagnose
from opd_ext.tinymath.long.diagnosis import diagnose as diagnose_chain
from opd_ext.tinymath.long.problems import OPENING


@register_annotator("rule")
class RuleAnnotator(Annotator):
    """The miniature world's own diagnosis: decisive lines of a right answer, the first wrong line of another.

    The question says which level it belongs to.
    """

    async def find(self, request: Request, text: Text) -> Found:
        question = str(request.extra_info.get("question", request.problem))
        of_level = diagnose_chain if OPENING in question else diagnose
        found = of_level(question, text.text, request.correct)[:MAX_SPANS]
        return Found("ok" if found else "empty", [tuple(finding) for finding in found])
