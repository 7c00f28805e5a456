# SPDX-License-Identifier: Apache-2.0
"""Two tokenizers on one text: spans cover it byte by byte, and stop where the two read different texts."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd_ext.errors import ConfigError
from opd_ext.tinymath.tokenizer import make_tokenizer
from opd_ext.tokens.byte_spans import OUTSIDE, Foreign, Reader, align

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The counter shows 47, and 47 + 8 = 55.",
    "Schrödinger's naïve façade: 3.14159 ≈ π, 2² = 4, ½ + ¼ = ¾",
    "def f(x):\n    return x ** 2  # two  blanks\n\tand a tab",
    "你好世界。これは試験です。 한국어 문장",
    "नमस्ते दुनिया, Привет мир, שלום עולם, مرحبا",
    "👩‍👩‍👧 and 🇩🇪, e\u0301 is not \u00e9, ﬁ is not fi",
]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}{{ end }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def _fast(backend: Tokenizer, end: str) -> PreTrainedTokenizerFast:
    template = TEMPLATE.replace("{{ end }}", end)
    backend.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken(end, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, chat_template=template)


def by_bytes(size: int, normalizer=None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Qwen and Llama 3 have it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder, backend.normalizer = decoders.ByteLevel(), normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    return _fast(backend, "<|end|>")


def by_pieces(size: int) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE with bytes to fall back to, as Llama 2 and Gemma have it; its corpus has one alphabet."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(CORPUS[:1], trainers.BpeTrainer(vocab_size=size, special_tokens=tokens))
    content = backend.to_str()  # bytes are no control tokens, whatever the trainer makes of its first entries
    import json

    plain = json.loads(content)
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] == "<unk>"]
    return _fast(Tokenizer.from_str(json.dumps(plain)), "</s>")


READERS = {
    "bytes": Reader(by_bytes(400), "bytes"),
    "more bytes": Reader(by_bytes(700), "more bytes"),
    "composed": Reader(by_bytes(330, normalizers.NFC()), "composed"),
    "pieces": Reader(by_pieces(420), "pieces"),
    "world": Reader(make_tokenizer(), "world"),
}
PAIRS = [(s, t) for s in READERS for t in READERS if s != t]


def _texts(count: int) -> list[str]:
    """Pieces of all scripts put together at random; U+2581 is SentencePiece's blank, so no text of its."""
    draw, characters = random.Random(4), "".join(CORPUS) + "\r\n\x00\u200d\ufeff"
    whole = [text for text in CORPUS for _ in range(3)]
    return whole + ["".join(draw.choices(characters, k=draw.randint(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("student, teacher", PAIRS, ids=[f"{s} by {t}" for s, t in PAIRS])
def test_every_span_is_the_same_bytes_on_both_sides(student, teacher):
    mine, theirs = READERS[student], READERS[teacher]
    texts = _texts(60)
    for text, ids, spans in zip(texts, encoded := mine.encode(texts), align(mine, theirs, encoded, []), strict=True):
        assert b"".join(mine.pieces[i] for i in ids) == text.encode()
        assert b"".join(theirs.pieces[i] for i in spans.teacher_ids) == text.encode()
        assert len(spans.student) == len(ids) and OUTSIDE not in spans.student
        for number in range(max(spans.student) + 1):
            sides = [
                b"".join(reader.pieces[i] for i, own in zip(tokens, numbers, strict=True) if own == number)
                for reader, tokens, numbers in ((mine, ids, spans.student), (theirs, spans.teacher_ids, spans.teacher))
            ]
            assert sides[0] == sides[1] != b""
        assert spans.student == sorted(spans.student) and spans.teacher == sorted(spans.teacher)


@pytest.mark.parametrize("student, teacher", PAIRS, ids=[f"{s} by {t}" for s, t in PAIRS])
def test_spans_are_the_shortest(student, teacher):
    """No boundary of both lies within a span."""
    mine, theirs = READERS[student], READERS[teacher]
    ids = mine.encode(CORPUS)
    for own, spans in zip(ids, align(mine, theirs, ids, []), strict=True):
        ends = [set(_ends(reader, tokens)) for reader, tokens in ((mine, own), (theirs, spans.teacher_ids))]
        assert max(spans.student) + 1 == len(ends[0] & ends[1])


def _ends(reader, ids):
    at = 0
    for i in ids:
        at += len(reader.pieces[i])
        yield at


def test_a_tokenizer_beside_itself_has_a_span_for_every_token():
    for reader in READERS.values():
        (ids,) = reader.encode([CORPUS[0]])
        (spans,) = align(reader, reader, [ids], [])
        assert spans.student == spans.teacher == list(range(len(ids))) and spans.teacher_ids == ids


def test_a_response_is_read_up_to_where_it_was_cut_within_a_character():
    mine, theirs = READERS["bytes"], READERS["pieces"]
    (ids,) = mine.encode(["ab 한"])
    partial = ids[:-1] if mine.pieces[ids[-1]] != "한".encode() else None
    assert partial is not None, "the corpus has taught this syllable as one token: choose another"
    (spans,) = align(mine, theirs, [partial], [])
    read = [i for i, number in zip(partial, spans.student, strict=True) if number != OUTSIDE]
    assert b"".join(mine.pieces[i] for i in read) == b"ab " and spans.student[len(read) :] == [OUTSIDE] * (
        len(partial) - len(read)
    )
    assert b"".join(theirs.pieces[i] for i in spans.teacher_ids) == b"ab "


def test_the_end_of_a_turn_is_the_teacher_s_own():
    mine, theirs = READERS["world"], READERS["pieces"]
    end, (ids,) = mine.tokenizer.eos_token_id, mine.encode(["Answer: 12"])
    (whole,) = align(mine, theirs, [[*ids, end]], [end])
    assert theirs.tokenizer.convert_ids_to_tokens(whole.teacher_ids)[-1] == "</s>" == theirs.tokenizer.eos_token
    assert whole.student[-1] == whole.teacher[-1] == max(whole.student)
    (cut,) = align(mine, theirs, [ids], [end])
    assert theirs.end not in cut.teacher_ids
    (empty,) = align(mine, theirs, [[end]], [end])
    assert (empty.student, empty.teacher_ids, empty.teacher) == ([0], [theirs.end], [0])
    (nothing,) = align(mine, theirs, [[]], [end])
    assert (nothing.student, nothing.teacher_ids, nothing.teacher) == ([], [], [])


def test_what_spells_a_control_token_is_text_and_one_within_a_response_ends_what_is_read():
    mine, theirs = READERS["bytes"], READERS["more bytes"]
    (spelled,) = mine.encode(["a <|end|> b"])
    (spans,) = align(mine, theirs, [spelled], [mine.end])
    assert theirs.end not in spans.teacher_ids and OUTSIDE not in spans.student
    start = mine.tokenizer.convert_tokens_to_ids("<|start|>")
    (a,), (b,) = mine.encode(["a"]), mine.encode(["b"])
    (spans,) = align(mine, theirs, [[*a, start, *b, mine.end]], [mine.end])
    assert spans.student == [0] * len(a) + [OUTSIDE] * (2 + len(b)) and theirs.end not in spans.teacher_ids
    (spans,) = align(mine, theirs, [[*a, len(mine.pieces) + 3, *b]], [])  # of a head that is taller than the vocabulary
    assert spans.student == [0] * len(a) + [OUTSIDE] * (1 + len(b))


def test_where_the_teacher_reads_another_text_spans_end():
    """U+2581 is a blank to SentencePiece: what stands behind it is not asked about."""
    mine, theirs = READERS["bytes"], READERS["pieces"]
    (ids,) = mine.encode(["one ▁ two"])
    (spans,) = align(mine, theirs, [ids], [])
    assert b"".join(theirs.pieces[i] for i in spans.teacher_ids) == b"one "
    assert spans.student[-1] == OUTSIDE


def test_the_end_is_what_the_template_puts_behind_an_answer():
    tokenizer = by_bytes(300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    assert Reader(tokenizer, "x").end == tokenizer.eos_token_id
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|turn|>")
    assert Reader(tokenizer, "x").end == tokenizer.convert_tokens_to_ids("<|turn|>")


def test_a_teacher_that_keeps_the_text_is_accepted():
    for student, teacher in PAIRS:
        Foreign(READERS[student], READERS[teacher], ()).check()


def test_a_teacher_that_changes_the_text_is_refused():
    """Lower case, and a vocabulary without bytes to fall back to."""
    lowering = Reader(by_bytes(300, normalizers.Lowercase()), "opd.teacher.path=low")
    with pytest.raises(ConfigError, match=r"path=low .* does not give back \d+ of the student's tokens byte by byte"):
        Foreign(READERS["bytes"], lowering, ()).check()
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer, backend.decoder = normalizers.Replace(" ", "▁"), decoders.Metaspace()
    backend.train_from_iterator(CORPUS[:1], trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")
    with pytest.raises(ConfigError, match="does not give back"):
        Foreign(READERS["bytes"], Reader(tokenizer, "small"), ()).check()


def test_a_tokenizer_that_joins_words_by_rules_is_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match=r"does not say which bytes a token stands for \(its decoder is WordPiece\)"):
        Reader(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"), "the student")
    with pytest.raises(ConfigError, match="has no fast tokenizer"):
        Reader(object(), "the student")
