# SPDX-License-Identifier: Apache-2.0
"""Answers as text: what a response states, how a reference must look, and spellings that math-verify cannot read."""

import re
from itertools import accumulate

_ANSWER = re.compile(
    r"Answer[*_`]*\s*[:：][\s*_]*(\$\$(?s:.{1,2000}?)\$\$|\\\[(?s:.{1,2000}?)\\\]|[^\n]+)", re.IGNORECASE
)
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_BARE_BOX = re.compile(r"\\boxed\s+([^\s{}$]+)")
_STARTS_WITH_BOX = re.compile(r"[\s$]*(?:\\[(\[]\s*)?\\f?box(?:ed)?\b")

# Both read text whose runs of white space are one blank: several repetitions of it side by side would be slow.
_RETRACTED = re.compile(
    r"(?:^|[.!?\n]) ?(?:no|nope|oops|hmm+|wait|actually|correction|scratch that|hold on|sorry) ?[,.!:;-]"
    r"|\bno,? wait\b|\b(?:wait|actually),? (?:no|it|that|the answer)\b|\bon second thoughts?\b"
    r"|\b(?:is|was|are|be) (?:wrong|incorrect|mistaken|not (?:right|correct))\b"
    r"|\b(?:do not|don't|don’t) know\b|\bnot sure\b|\bmade an? (?:mistake|error)\b",
    re.IGNORECASE,
)
_RESTATES = re.compile(
    r"\banswer (?:is|should be|must be|equals)(?: (?:in fact|actually|indeed|therefore|thus))?[ :]*"
    r"(?=[-+\d$\\(]|[a-zA-Z] ?=)",
    re.IGNORECASE,
)
_RESTATED_ENDS = re.compile(r"(?<!=)[.!?;,]?(?: [a-zA-Z]|\n|$)|[.!?;,] ")

_LAYOUT = re.compile(r"\\(?:text|mathrm|left|right|[dt]?frac|sqrt)(?![a-zA-Z])|(?<!\\)[{}]|[\s$()\[\].,;:?!*]")
_UNFINISHED = re.compile(r"(?:(?<!\^)[+\-]|[/=^_]|\\(?:[dt]?frac|sqrt)(?![a-zA-Z])|\\[dt]?frac\s*\{[^{}]*\})\s*\$*$")
_NO_REFERENCE = {"nan", "none", "null", "n/a", "<na>", "unknown"}
_PROSE_WORDS = 20

LONGEST = 1000
"""Characters of a reference; an answer that is longer is not spelled anew."""


def answer_line(response: str) -> str:
    """What follows the last ``Answer:`` on its line, or display there; ``""`` if there is none.

    Emphasis (``**42**``, backticks) and trailing ``. , ; : ? " '`` and blanks do not belong to it. An exclamation mark
    stays: it may be a factorial.
    """
    matches = _ANSWER.findall(response)
    return matches[-1].strip().strip("*`").rstrip(".,;:?\"'*_` \t\r").strip() if matches else ""


def last_box(response: str) -> str:
    """The content of the last ``\\boxed{...}`` or ``\\fbox{...}``, braces balanced, or of a ``\\boxed 5``; ``""`` if
    there is none or it stays open."""
    found = stated_box(response)
    return (found or "").strip()


def stated_box(response: str) -> str | None:
    """As :func:`last_box`, but None for a last box that stays open: its answer was never finished."""
    opening, bare = (max(form.finditer(response), key=re.Match.start, default=None) for form in (_BOX, _BARE_BOX))
    if bare and (not opening or bare.start() > opening.start()):
        return bare[1].rstrip(".,;:")
    if not opening:
        return ""
    end = _closing(response, opening.end())
    return None if end is None else response[opening.end() : end - 1]


def final_answers(response: str) -> list[str]:
    """What a response commits itself to after its thinking: last answer line and last box, those that there are.

    Nothing if the thinking or the last box stays open, or if the words behind take it back. A line that is a box says
    the same as the box. An answer that the words behind state (`the answer is 17`) comes first.
    """
    told = response.rpartition("</think>")[2]
    box = stated_box(told)
    if box is None or "<think>" in told:
        return []
    line = answer_line(told)
    found = [text for text in ("" if _STARTS_WITH_BOX.match(line) else line, box.strip()) if text]
    behind = _behind(told)
    if not found or _RETRACTED.search(_bare(behind)) or _RETRACTED.search(_bare(line)):
        return []
    return _restated(behind) + found


def _behind(told: str) -> str:
    """The words behind the last answer line and the last box."""
    line = max((match.end() for match in _ANSWER.finditer(told)), default=0)
    box = max((match.end() for form in (_BOX, _BARE_BOX) for match in form.finditer(told)), default=0)
    if box < line:
        return "\n" + told[line:]
    return told[(_closing(told, box) if told[:box].endswith("{") else box) or box :]


def _closing(text: str, start: int) -> int | None:
    """Behind the brace that closes the one in front of ``start``; None where it stays open."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    return None


def _restated(behind: str) -> list[str]:
    """What `the answer is ...` says, up to the next word or the end of its sentence."""
    found, text = [], "\n".join(re.sub(r"\s+|\*{2,}", " ", line).strip() for line in behind.split("\n"))
    for opening in _RESTATES.finditer(text):
        end = _RESTATED_ENDS.search(text, opening.end() + 1)
        found.append(text[opening.end() : end.start() if end else None].strip(" *"))
    return found


def _bare(text: str) -> str:
    """The words of lines that have some, without signs of emphasis, one blank between them."""
    return "\n".join(filter(None, (re.sub(r"[\s$*]+", " ", line).strip() for line in text.split("\n"))))


def check_reference(reference: object, where: str = "") -> str:
    """The reference answer as text; ``where`` begins the sentence that refuses one.

    A full stop, asterisks and GSM8K's ``####`` around it are taken off.

    Raises:
        ValueError: it is empty, says that there is none, is a whole solution or a sentence, holds nothing to compare,
            or is not finished; one sentence.
    """
    text = _around(str(reference)) if reference is not None else ""
    braces = re.sub(r"\\[{}]", "", text)
    depths = [0, *accumulate({"{": 1, "}": -1}.get(mark, 0) for mark in braces)]
    prose = re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", re.sub(r"\\text\s*\{[^{}]*\}", "", text))
    faults = {
        "is empty": not text,
        "says that there is none": text.casefold() in _NO_REFERENCE,
        "holds a box, so it is a solution": bool(_BOX.search(text) or _BARE_BOX.search(text)),
        "is a text, not an answer": len(text) > LONGEST or len(prose) > _PROSE_WORDS,
        "is a sentence": bool(re.search(r"\banswer\s*(?:is|:|=)", text, re.IGNORECASE)),
        "holds a tag": bool(re.search(r"</?[a-z]{2,}>", text)),
        "has braces that do not match": min(depths) < 0 or depths[-1] != 0,
        "holds nothing to compare": not _LAYOUT.sub("", text),
        "is not finished": bool(_UNFINISHED.search(text)),
    }
    fault = next((words for words, found in faults.items() if found), None)
    if fault:
        shown = f" {text!r:.60}" if text else ""
        remedy = "give the bare answer in LaTeX, or leave the row out"
        raise ValueError(f"{where}the reference answer{shown} {fault}: {remedy}.")
    return text


def _around(reference: str) -> str:
    """Without what stands around an answer in the files of some sets: ``#### 42``, ``**42**``, ``42.``."""
    text = re.sub(r"^#{2,}\s*", "", reference.strip())
    text = re.sub(r"^\*\*([^*]*)\*\*$", r"\1", text).strip()
    return re.sub(r"(?<=[\w)}$\]])\.$", "", text)


# ---------------------------------------------------------------------- spellings

_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[\u2010-\u2015\u2212]", "-"),
        (r"(?<=\d)(?:\\[,!;: ]|[\u00a0\u2000-\u200a\u202f\u205f]|\{,\})+(?=\d{3}(?!\d))", ""),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*(\d+(?:\.\d+)?|[a-zA-Zπ])", r"\\sqrt{\1}"),
        (r"∛\s*\(?(\d+)\)?", r"\\sqrt[3]{\1}"),
        (r"∞", r"\\infty "),
        (r"π|(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"\s*(?:°|\^\s*\{?\s*\\circ\s*\}?|\\degrees?\b|\\?\s*\\text\s*\{\s*degrees?\s*\}|\bdegrees?\b)", ""),
    )
]
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*percent\s*\}|\bpercent\b)\s*$", re.IGNORECASE)
_NAMED = re.compile(r"[a-zA-Z]\s*=\s*([^=]+)$")
# `(C) 5` or `C. because ...`; what follows names no other letter.
_CHOICE = re.compile(r"\\?\(?([A-Z])(?:\\?\)|[.:])(?:\s+(?!.*\b[B-HJ-Z]\b).*)?$", re.DOTALL)
_MATHS = re.compile(r"^(?:\$\$?|\\[(\[])\s*(.*?)\s*(?:\$\$?|\\[)\]])$", re.DOTALL)


def spelled(text: str) -> tuple[str, bool]:
    """``text`` without its delimiters, signs and spaces spelled as LaTeX, degrees and a last percent sign taken off.

    Returns:
        The text, and whether it was a percentage.
    """
    for _ in range(2):  # `$10$%` has its sign outside, `$10\%$` inside
        inner = _MATHS.match(text.strip())
        text = inner[1] if inner and "$" not in inner[1] else text.strip()
        text, percent = _PERCENT.sub("", text), bool(_PERCENT.search(text))
        if percent:
            break
    inner = _MATHS.match(text)
    text = inner[1] if inner and "$" not in inner[1] else text
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text.strip(), percent


def readings(reference: str, answer: str) -> list[tuple[str, str]]:
    """Pairs of LaTeX texts, spelled alike, of which one must be equal.

    A percent sign on one side alone may be a unit or a hundredth: 10 % is 10 where percents are asked for, else 0.1.
    """
    (right, right_percent), (given, given_percent) = spelled(reference), spelled(answer)
    pairs = [(right, given)]
    if re.fullmatch("[A-Z]", right) and (choice := _CHOICE.match(given)):
        pairs.append((right, choice[1]))
    if "=" not in right and (named := _NAMED.match(given)):
        pairs.append((right, named[1]))
    if right_percent and not given_percent:
        pairs.append((rf"\frac{{{right}}}{{100}}", given))
    if given_percent and not right_percent:
        pairs.append((right, rf"\frac{{{given}}}{{100}}"))
    return pairs


_TOWER = re.compile(r"\d+(?:\s*\^[\s{(]*\d+){2,}")
_VAST = re.compile(r"\d{6,}[\s})]*!|\^[\s{(]*\d{7,}")


def never_evaluates(text: str) -> bool:
    """Whether a text holds a power or a factorial of more than a million digits, which no answer needs.

    >>> never_evaluates("10^{10^{10}}"), never_evaluates("2^{3^{2}}")
    (True, False)
    """
    if len(text) > LONGEST:  # no answer, and not looked at elsewhere either
        return False
    towers = [re.findall(r"\d+", found[0]) for found in _TOWER.finditer(text)]
    high = any(len(t) > 3 or len(t[2]) > 4 or int(t[2]) * len(t[1]) > 6 for t in towers)
    return high or bool(_VAST.search(text))


_BETWEEN = re.compile(  # elements of a list: no separator of thousands, nor within brackets
    r"[,;](?!\d{3}(?!\d))(?![^(\[{]*[)\]}])|\\text\s*\{\s*(?:or|and)\s*\}|(?<![\\a-zA-Z])(?:or|and)(?![a-zA-Z])"
)


def is_chosen(reference: str, answer: str) -> bool:
    """Whether an answer names the option that is asked for, with its text behind: ``C. x = 42``."""
    choice = _CHOICE.match(spelled(answer)[0])
    return bool(re.fullmatch("[A-Z]", reference) and choice and choice[1] == reference)


def chains(answer: str) -> list[list[str]]:
    """The sides of every element of an answer, which may be a list.

    >>> chains("$x = 1$ or $x = 2 = 4/2$")
    [['x', '1'], ['x', '2', '4/2']]
    """
    return [sides(part.strip(" $")) for part in _BETWEEN.split(spelled(answer)[0]) if part.strip(" $")]


def sides(answer: str) -> list[str]:
    """The sides of an answer that is a chain of equations, spelled; one where it is none.

    >>> sides("$x = \\\\frac{1}{3} \\\\approx 0.33$")
    ['x', '\\\\frac{1}{3}', '0.33']
    """
    parts = re.split(r"(?<![<>!\\:])=(?!=)|≈|\\approx(?![a-zA-Z])", spelled(answer)[0])
    return [part.strip() for part in parts if part.strip()]
