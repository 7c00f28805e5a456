# SPDX-License-Identifier: Apache-2.0
"""The program in a response: which fenced block is the answer.

Fences are CommonMark's: three or more backticks or tildes, closed by at least as many of the same. So a program may
hold backticks, and a block that is never closed is none. As models write them, a fence may also open behind words (with
a language), close in front of words or at the end of the last line, and the next block may open where nobody closed the
one before. Responses are text of a model: nothing here parses them as Python, which a hostile text could make slow.
"""

import re
from collections.abc import Iterator

_OPEN = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^\n]*)")
_OPEN_BEHIND_WORDS = re.compile(r"[^`~\n]*[^`~\s][ \t]*(`{3,}|~{3,})[ \t]*([\w.+#-]+)[ \t]*")
_PYTHON = re.compile(r"\{?\s*\.?(?:python|py|pypy|cpython)[\d.]*\b", re.IGNORECASE)
# What no output of a program looks like: a statement, an assignment or a call.
_STATEMENT = re.compile(
    r"^[ \t]*(?:(?:import|from|def|class|for|while|if|with|try|async)\b|@\w)|^[\w.,\[\] \t]+=(?!=)|^[ \t]*[\w.]+\(",
    re.MULTILINE,
)


def program_of(response: str, function: str | None = None) -> str | None:
    """The program that a response answers with, or None if it has no closed block of code.

    After the thinking, the last block that is marked as Python and is more than data; without a mark the last block
    that is more than data. Where a function is asked for, the last block of these that defines it. An
    example of use behind the program is taken for it: to look for another block would pay for drafts.

    Args:
        response: the decoded response.
        function: its name.

    >>> program_of("```python\\nprint(input())\\n```\\nSample output:\\n```\\n5\\n```")
    'print(input())\\n'
    >>> program_of("```python\\nprint(input())") is None
    True
    """
    text = response.rpartition("</think>")[2].replace("\r\n", "\n").replace("\r", "\n")
    found = list(_blocks(text))
    marked = [body for mark, body in found if _PYTHON.match(mark)]
    # Another language is taken only where there is nothing else: models call Python many things.
    plain = [body for mark, body in found if not mark.strip()]
    for bodies in (marked, plain, [body for _, body in found]):
        programs = [body for body in bodies if _STATEMENT.search(body)]
        if function:
            defines = re.compile(rf"\b(?:def\s+{re.escape(function)}\b|{re.escape(function)}\s*=)")
            programs = [body for body in programs if defines.search(body)] or programs
        if programs or (bodies is marked and marked):
            return (programs or bodies)[-1]
    return found[-1][1] if found else None


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """What stands behind the opening fence, and the lines of a block, less the indentation of its fence."""
    fence, indent, mark, lines = "", 0, "", []
    for line in text.split("\n"):
        opening = _OPEN.fullmatch(line)
        if fence:
            held, closed = _closed(line, opening, fence, indent)
            if not closed or held.strip():
                lead = len(held) - len(held.lstrip(" \t"))
                lines.append(held[min(indent, lead) :])
            if closed:
                yield mark, "".join(f"{held}\n" for held in lines)
                fence = ""
                if not (opening and re.fullmatch(r"[\w.+#-]+", opening[3].strip())):
                    continue  # else the next block, with its language, opens where nobody closed this one
        if opening and not (opening[2][0] == "`" and "`" in opening[3]) and not fence:
            indent, fence, mark, lines = len(opening[1]), opening[2], opening[3], []
        elif not fence and (behind := _OPEN_BEHIND_WORDS.fullmatch(line)):
            indent, fence, mark, lines = 0, behind[1], behind[2], []


def _closed(line: str, opening: re.Match[str] | None, fence: str, indent: int) -> tuple[str, bool]:
    """What of a line is in the block, and whether the block ends with it."""
    if opening and opening[2].startswith(fence):
        if not opening[3].strip() or len(opening[1]) <= indent:
            return "", True
    elif not opening and line.rstrip().endswith(fence) and line.count(fence[0] * 3) == 1:
        return line.rstrip().rstrip(fence[0]), True
    return line, False
