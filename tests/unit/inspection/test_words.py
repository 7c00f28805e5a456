# SPDX-License-Identifier: Apache-2.0
"""Tokens as texts, one by one: what a text is made of, unfinished characters and unknown ids included."""

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from opd_ext.inspection.words import token_texts


def made(pieces, decoder):
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_bytes_of_an_unfinished_character_are_spelled():
    tokenizer = made(["Ġthe", "Ã¤", "âĤ", "Ċ", "aâĤ"], decoders.ByteLevel())
    assert token_texts(tokenizer, [4, 0, 1, 2, 3, 3]) == {0: " the", 1: "ä", 2: "\\xE2\\x82", 3: "\n", 4: "a\\xE2\\x82"}


def test_the_space_in_front_of_a_word_is_kept():
    tokenizer = made(["▁the", "re"], decoders.Metaspace())
    assert token_texts(tokenizer, [0, 1]) == {0: " the", 1: "re"}


def test_a_row_of_the_head_without_a_token_is_named_by_its_id():
    assert token_texts(made(["a"], decoders.ByteLevel()), [0, 7]) == {0: "a", 7: "[7]"}
