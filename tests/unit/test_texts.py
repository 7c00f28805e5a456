# SPDX-License-Identifier: Apache-2.0
"""Many rows are decoded at once to what they are one by one."""

import random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from opd_ext.tokens.texts import decode

CORPUS = [
    "Let x be 3, then x + 4 = 7 .",
    "Größe: 5 € – fünf",
    "数は七です",
    "a  b\n\n  c\t<|end|>",
    "it is n't , is it ?",
]


def _tokenizer(clean: bool, kind: type = PreTrainedTokenizerFast):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return kind(tokenizer_object=backend, eos_token="<|end|>", clean_up_tokenization_spaces=clean)


class Shouting(PreTrainedTokenizerFast):
    def _decode(self, *args, **kwargs):
        return super()._decode(*args, **kwargs).upper()


def _rows(tokenizer) -> list[list[int]]:
    draw = random.Random(0)
    spelt = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in CORPUS]
    random_ids = [[draw.randrange(len(tokenizer)) for _ in range(draw.randrange(40))] for _ in range(50)]
    return [*spelt, [], *random_ids]  # broken characters among them


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, Shouting])
def test_rows_decode_together_to_what_they_are_alone(kind, clean, special):
    tokenizer = _tokenizer(clean, kind)
    rows = _rows(tokenizer)
    assert decode(tokenizer, rows, special) == [tokenizer.decode(row, skip_special_tokens=special) for row in rows]


def test_a_tokenizer_without_a_rust_part_is_asked_row_by_row():
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: f"{ids} {skip_special_tokens}")
    assert decode(tokenizer, [(1, 2), (3,)], True) == ["[1, 2] True", "[3] True"]


def test_a_fast_tokenizer_takes_all_rows_in_one_call(monkeypatch):
    tokenizer = _tokenizer(clean=False)
    monkeypatch.setattr(tokenizer, "_decode", lambda *_, **__: pytest.fail("row by row"))
    assert len(decode(tokenizer, _rows(tokenizer), True)) == len(_rows(tokenizer))
