# SPDX-License-Identifier: Apache-2.0
"""From an annotator's answer to labelled tokens: parsing, cutting, byte-exact alignment, the cap."""

import random

import pytest

from opd_ext.credit.annotate.align import AlignmentError, TokenBytes, align, cap, intervals, runs
from opd_ext.credit.annotate.parse import Span, parse
from opd_ext.credit.annotate.segments import segment
from opd_ext.tinymath.tokenizer import make_tokenizer

ODD_TEXTS = [
    "Let x² = 9.\n\nSo x = ±3 — 二つ。 🙂 done",
    "\n\n\n leading blanks, trailing blanks \n\n",
    "e\u0301 combining, \u202e right to left, \x00 control",
    "",
]


def test_every_published_parser_case(vectors):
    cases = vectors("trace")["parser"]
    for case in cases:
        status, spans = parse(case["raw"], case["num_segments"], correct=bool(case["outcome"]))
        expected = [(tuple(span["segment_ids"]), span["type"]) for span in case["spans"]]
        assert (status, [tuple(span) for span in spans]) == (case["status"], expected), case["raw"]
    assert len(cases) == 13


@pytest.mark.parametrize(
    "answer, status",
    [
        ("[]", "parse_error"),
        ("{}", "wrong_schema"),
        ('{"key_spans": "2"}', "wrong_schema"),
        ('{"key_spans": [3]}', "wrong_schema"),
        ('{"key_spans": [{"segment_ids": null, "step_type": "insight"}]}', "empty"),
        ('{"key_spans": [{"segment_ids": [true, 1.5, [2]], "step_type": "insight"}]}', "empty"),
        ('{"key_spans": [{"step_type": null}]}', "empty"),
        ('{"key_spans": [{"segment_ids": 2, "step_type": "insight"}]} trailing words', "ok"),
        ("{" * 10_000, "parse_error"),
    ],
)
def test_whatever_a_model_writes_becomes_a_status(answer, status):
    assert parse(answer, 8, correct=True)[0] == status


def test_published_projection_with_a_token_that_splits_a_character(vectors):
    data = vectors("trace")["projection"]
    text, offsets = intervals([bytes.fromhex(piece) for piece in data["token_bytes_hex"]])
    assert text == data["text"]
    assert [list(pair) for pair in offsets] == data["char_intervals"]
    for case in data["cases"]:
        _, spans = parse(case["raw"], len(data["segments"]), correct=bool(case["outcome"]))
        cut = data["segments"]
        groups = align([[tuple(cut[i]) for i in span.segment_ids] for span in spans], offsets)
        assert groups == case["token_groups"]
        label = 1 if case["outcome"] else 2
        for coverage in (1.0, 0.25):
            kept = cap(groups, len(offsets), coverage)
            expected = [index for index, mark in enumerate(case[f"label_alpha_{coverage}"]) if mark]
            assert kept == expected
            assert {mark for _, _, mark in runs(kept, label)} <= {label}
            assert [i for start, end, _ in runs(kept, label) for i in range(start, end)] == kept


def test_the_cap_rounds_down(vectors):
    for case in vectors("trace")["cap"]:
        length = case["length"]
        assert len(cap([list(range(length))], length, case["alpha"])) == case["budget"]
    assert len(cap([list(range(30))], 30, 0.1)) == 3  # 0.1 * 30 is 2.9999999999999996 in no decimal


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_intervals_follow_the_bytes_wherever_tokens_cut_them(text):
    rng = random.Random(text)
    for _ in range(50):
        data, pieces = text.encode(), []
        while data:
            width = rng.randint(1, 5)
            pieces.append(data[:width])
            data = data[width:]
            if rng.random() < 0.2:
                pieces.append(b"")  # a special token
        found, offsets = intervals(pieces)
        assert found == text
        assert all(start <= end for start, end in offsets)
        visible = [pair for pair in offsets if pair[1] > pair[0]]
        assert visible == sorted(visible)
        for piece, (start, end) in zip(pieces, offsets, strict=True):
            assert piece in text[start:end].encode()
            assert bool(piece) == (end > start)


def test_broken_bytes_become_replacement_characters_without_losing_the_count():
    text, offsets = intervals([b"a\xe2\x82", b"b", b"\xff", b"\xf0\x9f"])
    assert text == "a\ufffdb\ufffd\ufffd"
    assert offsets == [(0, 2), (2, 3), (3, 4), (4, 5)]


def test_tags_and_special_tokens_are_never_marked():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    reader = TokenBytes(tokenizer)
    ids = tokenizer("<think>Wait, let me check</think>ones: 3+4=7<|im_end|>", add_special_tokens=False).input_ids
    text, offsets = reader.text(ids)
    assert text == "Wait, let me checkones: 3+4=7"
    marked = align([[(0, len(text))]], offsets)[0]
    silent = [i for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids)) if token.startswith("<")]
    assert sorted(marked + silent) == list(range(len(ids)))


def test_unknown_ids_and_other_vocabularies_are_refused():
    with pytest.raises(AlignmentError, match="not in the vocabulary"):
        TokenBytes(make_tokenizer()).text([10_000])
    with pytest.raises(ValueError, match="byte-level"):
        TokenBytes(object())


def _characters(text):
    return [(i, i + 1) for i in range(len(text))]


@pytest.mark.parametrize("text", [*ODD_TEXTS, "one\n\ntwo\n\n\nthree", "A b. C d! E f?\n" * 40, "x" * 500])
@pytest.mark.parametrize("paragraph", ["blank", "line"])
def test_segments_are_contiguous_and_exhaustive(text, paragraph):
    for least, most in ((8, 96), (1, 10), (30, 40)):
        cut = segment(text, _characters(text), paragraph, least, most, max_segments=6)
        assert "".join(text[start:end] for start, end in cut) == text
        assert len(cut) <= 6
        assert all(end - start >= least for start, end in cut) or len(cut) == 1


def test_a_separator_stays_with_the_segment_before_it():
    text = "first paragraph\n\nsecond paragraph\nsame paragraph"
    assert [text[s:e] for s, e in segment(text, _characters(text))] == [
        "first paragraph\n\n",
        "second paragraph\nsame paragraph",
    ]
    assert len(segment(text, _characters(text), paragraph="line", min_tokens=1)) == 4


def test_long_paragraphs_are_split_at_sentence_ends():
    text = "This is one sentence. " * 10
    pieces = [text[s:e] for s, e in segment(text, _characters(text), max_tokens=50)]
    assert {len(piece) for piece in pieces} == {44}
    assert all(piece.startswith("This") for piece in pieces)
    unbroken = "x" * 200
    assert segment(unbroken, _characters(unbroken), max_tokens=50) == [(0, 200)]


_DRAFT = '{"error_spans": [{"segment_ids": %s, "error_type": "sign_error"}]}'


@pytest.mark.parametrize(
    "answer",
    [
        "In \\frac{1}{2} the sign is lost: " + _DRAFT % "[2]",
        "the set {1, 2}: " + _DRAFT % "[2]",
        "<think>is x^{2} right?</think>" + _DRAFT % "[2]",
        'Format: {"error_spans": [{"segment_ids": [0, 1], "error_type": "sign_error"}]}\n' + _DRAFT % "[2]",
        _DRAFT % "[1]" + "\nNo, rather:\n" + _DRAFT % "[2]",
        _DRAFT % "[2]" + " (see \\boxed{3})",
        _DRAFT % "[2]" + ' {"confidence": 0.9}',
        '{"error_spans": [{"segment_ids": [2], "error_type": "sign_error",},]}',
        "```json\n" + _DRAFT % "[2]" + "\n```",
        *(_DRAFT % ids for ids in ('"2"', '["[2]"]', "[2.0]", '"[2]"', '" 2 "')),
    ],
)
def test_the_answer_is_found_whatever_stands_around_it(answer):
    """For mathematics, and without constrained decoding, braces before the JSON are the usual reply."""
    assert parse(answer, 9, correct=False) == ("ok", [Span((2,), "sign_error")])


@pytest.mark.parametrize(("ids", "expected"), [('"2-4"', (2, 3, 4)), ('["2–3"]', (2, 3)), ('"[2], [3]"', (2, 3))])
def test_ranges_of_segments_are_read(ids, expected):
    assert parse(_DRAFT % ids, 9, correct=False) == ("ok", [Span(expected, "sign_error")])


@pytest.mark.parametrize(
    ("ids", "status"), [('"0-999999"', "ok"), ('"-1"', "empty"), ('"9"', "empty"), ("[1.5]", "empty")]
)
def test_ids_that_name_no_segment_count_for_nothing(ids, status):
    found, spans = parse(_DRAFT % ids, 9, correct=False)
    assert found == status and all(0 <= number < 9 for span in spans for number in span.segment_ids)


def test_braces_without_end_cost_neither_time_nor_a_rollout():
    assert parse('{"a":' * 50_000, 9, correct=False) == ("parse_error", [])


@pytest.mark.parametrize(
    ("sentence", "length"),
    [("因为甲等于乙。", 7), ("「はい。」と言った！", 10), ("所以 $x=2$。\n", 10), ("是吗？", 3)],
)
def test_chinese_and_japanese_sentences_end_without_white_space(sentence, length):
    assert len(sentence) == length
    text = sentence * 100
    pieces = [text[s:e] for s, e in segment(text, _characters(text), paragraph="blank")]
    assert "".join(pieces) == text and max(map(len, pieces)) <= 96 and len(pieces) > length
    assert all(piece.rstrip()[-1] in "。！？」" for piece in pieces)


def test_decimal_points_are_no_full_stops():
    text = "3.14 " + "1.5x" * 200
    assert segment(text, _characters(text)) == [(0, len(text))]
