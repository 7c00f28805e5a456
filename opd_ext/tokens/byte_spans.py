# SPDX-License-Identifier: Apache-2.0
"""Two tokenizers on one text: which tokens of a student's response a teacher of another tokenizer is asked about.

A *byte span* is the shortest piece of the text that begins and ends where tokens of both begin and end. Probabilities
are comparable span by span, since the product over the tokens of a span is the probability of the same bytes on either
side (of this one way to cut them: nothing sums over the others). The same idea is in Minixhofer et al., "Universal
Cross-Tokenizer Distillation via Approximate Likelihood Matching" (arXiv 2503.20083), where spans are called chunks.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from opd_ext.context.sequence import render
from opd_ext.errors import ConfigError

OUTSIDE = -1
"""Of a token that is in no span: there the two do not read the same text."""


@dataclass(frozen=True)
class ByteSpans:
    """A response as both sides read it.

    Attributes:
        student: per sampled token the number of its span, from 0 upwards, or ``OUTSIDE``.
        teacher_ids: the response in the teacher's tokens, as far as spans go.
        teacher: per token of the teacher's the number of its span.
    """

    student: list[int]
    teacher_ids: list[int]
    teacher: list[int]


class Reader:
    """A tokenizer by the bytes of its tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.
        name: by which a refusal calls it.

    Raises:
        ConfigError: bytes cannot be told: it is no fast tokenizer, or one that joins tokens by rules (WordPiece).
    """

    def __init__(self, tokenizer: Any, name: str):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(f"{name} has no fast tokenizer (tokenizer.json), whose bytes could be told.")
        self.tokenizer, self.name = tokenizer, name
        self._content = json.loads(backend.to_str())
        decoders = {decoder["type"] for decoder in _parts(self._content["decoder"], "decoders")}
        if not decoders & {"ByteLevel", "ByteFallback", "Metaspace"}:
            joined = ", ".join(sorted(decoders)) or "no rule"
            raise ConfigError(
                f"{name} has a tokenizer that does not say which bytes a token stands for (its decoder is {joined}): "
                "byte-level BPE, or SentencePiece with bytes to fall back to, does."
            )
        self._by_bytes = "ByteLevel" in decoders

    @cached_property
    def pieces(self) -> list[bytes | None]:
        """The bytes of every id; None for special tokens, which are no text, and for ids that nobody has."""
        added = self.tokenizer.added_tokens_decoder
        found: list[bytes | None] = [None] * (max(self.tokenizer.get_vocab().values()) + 1)
        for token, i in self.tokenizer.get_vocab().items():
            if i in added and added[i].special:
                continue
            elif self._by_bytes:
                found[i] = str(added[i]).encode() if i in added else _from_alphabet(token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                found[i] = bytes([int(token[3:5], 16)])
            else:
                found[i] = token.replace("▁", " ").encode()
        unknown = self.tokenizer.unk_token_id
        if unknown is not None:
            found[unknown] = None
        return found

    @cached_property
    def _encoder(self) -> Any:
        """The tokenizer without what it would do to a text: a response stands behind a prompt and is quoted as it is.

        A blank in front of a text belongs to its beginning, which a response is not. NFC is left out, since other
        bytes would come of it than those that were sampled. What spells a control token is text.
        """
        from tokenizers import Tokenizer

        content = dict(self._content)
        content["normalizer"] = _without(content["normalizer"], "normalizers", ("Prepend", "NFC"))
        for part in _parts(content["pre_tokenizer"], "pretokenizers"):
            if "add_prefix_space" in part:
                part["add_prefix_space"] = False
            if "prepend_scheme" in part:
                part["prepend_scheme"] = "never"
        encoder = Tokenizer.from_str(json.dumps(content))
        encoder.encode_special_tokens = True
        return encoder

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that stand behind a prompt."""
        return [found.ids for found in self._encoder.encode_batch(list(texts), add_special_tokens=False)]

    @cached_property
    def end(self) -> int:
        """The token by which this model ends its turn: what its chat template puts behind an answer, or its EOS.

        Raises:
            ConfigError: there is neither.
        """
        added = self.tokenizer.added_tokens_decoder.items()
        specials = {*self.tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        question = {"role": "user", "content": "1 + 1 = ?"}
        opened = render(self.tokenizer, [question])
        answered = render(self.tokenizer, [question, {"role": "assistant", "content": "2"}])
        # A token within the generation prompt may be special too, so the answer's own end is looked for behind it.
        common = next((i for i, (a, b) in enumerate(zip(opened, answered, strict=False)) if a != b), len(opened))
        for token in answered[common:]:
            if token in specials:
                return token
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(f"{self.name} names no token that ends a turn: set eos_token in its tokenizer_config.")
        return self.tokenizer.eos_token_id

    def pieces_of(self, ids: Sequence[int]) -> list[bytes | None]:
        """The bytes of a sequence, token by token. Ids beyond the vocabulary, of a taller head, are no text."""
        return [self.pieces[i] if i < len(self.pieces) else None for i in ids]

    def misread(self, student: Reader) -> list[str]:
        """Texts of the student's tokens that this tokenizer does not give back byte by byte."""
        texts = [text for piece in student.pieces if piece and (text := _text(piece)) is not None]
        return [t for t, ids in zip(texts, self.encode(texts), strict=True) if self._bytes(ids) != t.encode()]

    def _bytes(self, ids: Sequence[int]) -> bytes | None:
        pieces = self.pieces_of(ids)
        return None if None in pieces else b"".join(piece for piece in pieces if piece is not None)


@dataclass(frozen=True)
class Foreign:
    """A teacher of another tokenizer, beside the student.

    Attributes:
        student, teacher: whose tokens are aligned.
        stops: ids that end a response of the student's.
    """

    student: Reader
    teacher: Reader
    stops: tuple[int, ...]

    def check(self) -> None:
        """Whether the teacher can read whatever the student's tokens write.

        Raises:
            ConfigError: naming the first that it cannot.
        """
        if not (lost := self.teacher.misread(self.student)):
            return
        raise ConfigError(
            f"{self.teacher.name} has a tokenizer that does not give back {len(lost)} of the student's tokens byte by "
            f"byte, first {lost[0]!r}: it would be asked about another text; choose a teacher whose tokenizer keeps "
            "text as it is (byte-level BPE, or SentencePiece with bytes to fall back to)."
        )


def align(
    student: Reader, teacher: Reader, responses: Sequence[Sequence[int]], stops: Collection[int]
) -> list[ByteSpans]:
    """The byte spans of sampled responses.

    Each response is read as far as it is text: up to a special token, or to bytes that are no UTF-8, as where it was
    cut within a character. A token among ``stops`` at its very end is the end of a turn, and a span of its own with the
    token by which the teacher ends one.

    Args:
        responses: ids that the student sampled.
        stops: ids that end a response of the student's.
    """
    ended = [bool(ids) and ids[-1] in stops for ids in responses]
    bodies = [list(ids[:-1] if end else ids) for ids, end in zip(responses, ended, strict=True)]
    pieces = [_readable(student.pieces_of(body)) for body in bodies]
    texts = [b"".join(piece).decode(errors="ignore") for piece in pieces]
    found = []
    for body, end, mine, ids in zip(bodies, ended, pieces, teacher.encode(texts), strict=True):
        ours, yours = _common(mine, teacher.pieces_of(ids))
        spans = ByteSpans(ours + [OUTSIDE] * (len(body) - len(ours)), ids[: len(yours)], yours)
        if end:
            whole = len(yours) == len(ids) and OUTSIDE not in spans.student
            number = yours[-1] + 1 if yours else 0
            spans.student.append(number if whole else OUTSIDE)
            if whole:
                spans.teacher_ids.append(teacher.end)
                spans.teacher.append(number)
        found.append(spans)
    return found


def _readable(pieces: Sequence[bytes | None]) -> list[bytes]:
    """The pieces in front of the first that is no text; bytes that are no UTF-8 end the last one's text."""
    found: list[bytes] = []
    for piece in pieces:
        if piece is None:
            break
        found.append(piece)
    try:
        b"".join(found).decode()
    except UnicodeDecodeError as error:
        ends = accumulate(map(len, found))
        return found[: sum(end <= error.start for end in ends)]
    return found


def _common(student: Sequence[bytes], teacher: Sequence[bytes | None]) -> tuple[list[int], list[int]]:
    """Numbers of the spans, per token, up to the last boundary before which both have read the same bytes."""
    numbers: tuple[list[int], list[int]] = ([], [])
    taken, last = [0, 0], 0  # tokens of either side that were read; spans so far
    rest = [b"", b""]  # what one side has read and the other has not
    while taken[0] < len(student) or taken[1] < len(teacher):
        side = int(not rest[1] and bool(rest[0]))  # whoever is behind reads on
        if taken[side] == len((student, teacher)[side]):
            side = 1 - side
        piece = (student, teacher)[side][taken[side]] if taken[side] < len((student, teacher)[side]) else None
        if piece is None:
            break
        taken[side] += 1
        rest[side] += piece
        shared = min(map(len, rest))
        if rest[0][:shared] != rest[1][:shared]:
            break
        rest = [part[shared:] for part in rest]
        if not any(rest) and all(taken):
            for mine, count in zip(numbers, taken, strict=True):
                mine += [last] * (count - len(mine))
            last += 1
    return numbers


def _text(piece: bytes) -> str | None:
    """None: the bytes are part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _from_alphabet(token: str) -> bytes | None:
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return None


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: those that print stand for themselves, the others for what follows 255."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printed)]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _alphabet()


def _parts(section: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The components of a section of tokenizer.json, one or a sequence of them."""
    if section is None:
        return []
    return [part for each in section[key] for part in _parts(each, key)] if key in section else [section]


def _without(section: dict[str, Any] | None, key: str, kinds: Collection[str]) -> dict[str, Any] | None:
    kept = [part for part in _parts(section, key) if part["type"] not in kinds]
    return {"type": "Sequence", key: kept} if kept else None
