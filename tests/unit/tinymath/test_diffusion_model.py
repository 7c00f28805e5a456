# SPDX-License-Identifier: Apache-2.0
"""The world's masked-diffusion model: what a hidden token may know, and that it learns."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_ext.tinymath import measure
from opd_ext.tinymath.build import build
from opd_ext.tinymath.diffusion import (
    HiddenReplies,
    add_mask_token,
    collate_blocks,
    hidden_logits,
    hidden_loss,
    sample_denoised,
    to_diffusion,
)
from opd_ext.tinymath.levels import SIZES
from opd_ext.tinymath.pretrain import SPECS, DiffusionSpec, make_corpus, make_model, pretrain
from opd_ext.tinymath.tokenizer import make_tokenizer

BLOCK = 4
SPEC = DiffusionSpec(
    hidden_size=32, heads=1, kv_heads=1, layers=1, intermediate_size=32,
    textbook_chats=96, chats=32, block_size=BLOCK,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer()
    add_mask_token(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    model = make_model(SPEC, make_tokenizer(), seed=0).eval()
    to_diffusion(model, SPEC, tokenizer, seed=0)
    return model


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Four chats as whole blocks: ids, reply, and a random half of the replies hidden."""
    (chats, _) = make_corpus(tokenizer, SPEC, 0, set())
    ids, reply = collate_blocks(chats[:4], tokenizer.eos_token_id, BLOCK)
    return ids, reply, HiddenReplies(SPEC, seed=0).draw(reply)


def test_the_mask_is_one_token_more_and_every_other_keeps_its_id(tokenizer, model):
    plain = make_tokenizer()
    assert tokenizer.mask_token_id == len(plain) == len(tokenizer) - 1 == model.config.vocab_size - 1
    assert all(tokenizer.get_vocab()[token] == index for token, index in plain.get_vocab().items())


class TestWhatAHiddenTokenKnows:
    @pytest.fixture
    def logits(self, model):
        @torch.no_grad()
        def rows(ids, reply, hidden):
            """[B, T, V], zero where nothing is hidden."""
            found = torch.zeros(*ids.shape, model.config.vocab_size)
            found[hidden] = hidden_logits(model, ids, reply, hidden)
            return found

        return rows

    def changed(self, logits, batch, place):
        """Positions of row 0 whose logits move when the clean token at ``place`` is another one."""
        ids, reply, hidden = batch
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 100
        moved = (logits(other, reply, hidden) != logits(ids, reply, hidden)).any(-1)
        assert not moved[1:].any()  # rows do not see each other
        return set(moved[0].nonzero().flatten().tolist())

    def test_neither_its_own_token_nor_one_of_a_later_block(self, logits, batch):
        _, _, hidden = batch
        for place in hidden[0].nonzero().flatten().tolist():
            seers = self.changed(logits, batch, place)
            assert all(position // BLOCK > place // BLOCK for position in seers)

    def test_the_visible_tokens_of_its_block_on_both_sides_and_all_blocks_before(self, logits, batch):
        _, reply, hidden = batch
        positions = hidden[0].nonzero().flatten().tolist()
        for place in range(hidden.shape[1]):
            if hidden[0, place]:
                continue
            expected = {position for position in positions if position // BLOCK >= place // BLOCK}
            assert self.changed(logits, batch, place) == expected


def test_chats_together_and_apart_have_the_same_loss(model, tokenizer, batch):
    ids, reply, hidden = batch
    together = hidden_loss(model, ids, reply, hidden).item()
    total = 0.0
    for row in range(len(ids)):
        width = (int(reply[row].nonzero().max()) // BLOCK + 1) * BLOCK
        alone = [part[row : row + 1, :width] for part in (ids, reply, hidden)]
        total += hidden_loss(model, *alone).item() * int(hidden[row].sum())
    assert together == pytest.approx(total / int(hidden.sum()), rel=1e-5)  # fp32 sums in another order


def test_a_reply_is_filled_with_ends_up_to_its_block(tokenizer, batch):
    ids, reply, _ = batch
    end = tokenizer.eos_token_id
    for row, trained in zip(ids, reply, strict=True):
        tokens = row[trained].tolist()
        assert end in tokens
        assert set(tokens[tokens.index(end) :]) == {end}
        assert (int(trained.nonzero().max()) + 1) % BLOCK == 0


def test_ratios_are_spread_evenly_over_a_batch():
    reply = torch.ones(16, 400, dtype=torch.bool)
    spec = replace(SPEC, block_size=200)
    shares = HiddenReplies(spec, seed=0).draw(reply).unflatten(1, (2, 200)).float().mean(-1).sort(0).values
    steps = (torch.arange(16) + 0.5) / 16
    # Half a step of 1/16, and five standard deviations of a share among 200 draws.
    assert (shares - steps[:, None]).abs().max() < 1 / 32 + 5 * 0.5 / 200**0.5


def test_pre_training_lowers_the_loss(tokenizer):
    spec = replace(SPEC, hidden_size=64, heads=2, textbook_chats=400, chats=1)
    corpus = make_corpus(tokenizer, spec, 0, set())
    model = make_model(spec, make_tokenizer(), 0)
    to_diffusion(model, spec, tokenizer, 0)
    held_back = collate_blocks(corpus[0][:64], tokenizer.eos_token_id, BLOCK)
    hidden = HiddenReplies(spec, seed=1).draw(held_back[1])
    before = hidden_loss(model, *held_back, hidden).item()
    pretrain(model, [corpus[0][64:]], spec, 0, False, "diffusion", HiddenReplies(spec, 0))
    assert hidden_loss(model, *held_back, hidden).item() < before - 1.0  # of 5.9 nats at random


def test_it_joins_a_world_that_exists_and_changes_nothing_there(tmp_path, monkeypatch):
    small = {"hidden_size": 32, "heads": 1, "kv_heads": 1, "layers": 1, "intermediate_size": 32}
    small |= {"textbook_chats": 32, "chats": 32}
    for name in ("base", "diffusion"):
        monkeypatch.setitem(SPECS, name, replace(SPECS[name], **small))
    for split, size in (("train", 40), ("val", 5), ("test", 20)):
        monkeypatch.setitem(SIZES, split, size)
    monkeypatch.setattr(measure, "MAX_NEW_TOKENS", 8)

    world = build(tmp_path / "world", ["base"], progress=False, rebuild=True)
    before = {file: file.read_bytes() for file in world.rglob("*") if file.is_file() and file.suffix != ".md"}
    build(world, ["base", "diffusion"], progress=False, rebuild=True)
    changed = [file.name for file, content in before.items() if file.read_bytes() != content]
    assert changed == ["world.json"]

    record = json.loads((world / "world.json").read_text())["models"]["diffusion"]
    assert record["spec"] == asdict(SPECS["diffusion"])
    assert set(record["measured"]) == {"student"}
    with pytest.raises(ValueError, match="the model diffusion starts from base: name both"):
        build(tmp_path / "other", ["diffusion"], progress=False, rebuild=True)
    assert "Masked diffusion in blocks of" in (world / "MODEL_CARD.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(world / "diffusion")
    tokenizer = AutoTokenizer.from_pretrained(world / "diffusion")
    config = model.config
    assert config.mask_token_id == tokenizer.mask_token_id == config.vocab_size - 1
    assert (config.diffusion_attention, config.diffusion_block_size) == ("block", SPECS["diffusion"].block_size)
    (reply,) = sample_denoised(model, tokenizer, ["What is 1+1?"], max_tokens=6)
    assert 0 < len(reply) <= 6
