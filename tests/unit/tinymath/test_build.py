# SPDX-License-Identifier: Apache-2.0
"""Building the world, at a size that takes seconds: complete or absent, never rebuilt without need."""

import copy
import itertools
import json
import shutil
from dataclasses import asdict, replace
from functools import partial

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_ext.context.prompts import strip_student_prompt
from opd_ext.tinymath import build as building
from opd_ext.tinymath import measure, shipped
from opd_ext.tinymath.build import WorldError, build
from opd_ext.tinymath.grader import compute_score
from opd_ext.tinymath.levels import SIZES
from opd_ext.tinymath.pretrain import (
    SPECS,
    batches,
    collate,
    make_corpus,
    make_model,
    pretrain,
    reply_loss,
)
from opd_ext.tinymath.splits import draw_splits
from opd_ext.tinymath.tokenizer import make_tokenizer

trained = partial(build, rebuild=True, progress=False)


def shrink(patch):
    for name, layers in (("base", 1), ("large", 2)):
        small = replace(
            SPECS[name], hidden_size=32, heads=1, kv_heads=1, layers=layers, intermediate_size=32,
            textbook_chats=32, chats=32,
        )  # fmt: skip
        patch.setitem(SPECS, name, small)
    for split, size in (("train", 40), ("val", 10), ("test", 20)):
        patch.setitem(SIZES, split, size)
    patch.setattr(measure, "MAX_NEW_TOKENS", 8)


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world with its base model; tests that change it come with their own."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        return trained(tmp_path_factory.mktemp("home") / "tinymath", ["base"])


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_world_is_loaded_by_stock_transformers(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_rows_have_verls_schema_and_grade_their_own_solution_as_right(world):
    for split, size in (("train", 40), ("val", 10), ("test", 20)):
        rows = pd.read_parquet(world / f"{split}.parquet").to_dict("records")
        assert len(rows) == size
        for index, row in enumerate(rows):
            info = row["extra_info"]
            assert (row["data_source"], row["ability"]) == ("tinymath", "math")
            assert (info["index"], info["split"]) == (index, split)
            (message,) = row["prompt"]
            assert message["role"] == "user"
            assert strip_student_prompt(message["content"]) == info["question"]
            assert row["reward_model"]["style"] == "rule"
            truth = row["reward_model"]["ground_truth"]
            assert compute_score(row["data_source"], info["solution"], truth, info)["score"] == 1.0


def test_a_question_occurs_in_one_split_only_and_held_out_ones_never_in_pre_training():
    splits = draw_splits(seed=0)
    everything = [question for pairs in splits.values() for _, question in pairs]
    assert len(everything) == len(set(everything)) == 20_768
    held_out = {question for split in ("val", "test") for _, question in splits[split]}
    tokenizer, spec = make_tokenizer(), replace(SPECS["base"], textbook_chats=500, chats=500)
    examples = itertools.chain(*make_corpus(tokenizer, spec, 0, held_out))
    seen = "".join(tokenizer.decode(example.ids) for example in examples)
    assert not [question for question in held_out if question in seen]


def test_the_card_states_what_was_measured(world):
    card = (world / "MODEL_CARD.md").read_text()
    record = json.loads((world / "world.json").read_text())["models"]["base"]
    assert f"{record['parameters']:,} parameters" in card
    assert record["measured"]["student"]["all"]["n"] == 10
    assert "| the student prompt | 10 |" in card and "| instruction v2 | 10 |" in card


def test_a_second_build_touches_nothing_and_says_so(world, small, capsys):
    before = content(world)
    build(world, ["base"], rebuild=True)
    assert content(world) == before
    assert "complete (base), nothing to do" in capsys.readouterr().out


def test_a_missing_model_is_added_and_the_rest_stays_as_it_is(tmp_path, small):
    world = trained(tmp_path / "w", ["base"])
    before = content(world)
    trained(world, ["base", "large"])
    after = content(world)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"world.json", "MODEL_CARD.md"}
    assert {name.split("/")[0] for name in after if name not in before} == {"large"}


def test_the_same_settings_give_the_same_world(world, tmp_path, small):
    again = content(trained(tmp_path / "w", ["base"]))
    for name, data in content(world).items():
        if name not in ("world.json", "MODEL_CARD.md"):  # these hold timings
            assert again[name] == data, name


def test_other_settings_are_refused_unless_forced(tmp_path, small, monkeypatch):
    world = trained(tmp_path / "w", ["base"])
    with pytest.raises(WorldError, match=r"built with other settings \(seed\): use force"):
        trained(world, ["base"], seed=1)
    monkeypatch.setitem(SPECS, "base", replace(SPECS["base"], chats=48))
    with pytest.raises(WorldError, match=r"built with other settings \(models.base\)"):
        trained(world, ["base"])
    trained(world, ["base"], seed=1, force=True)
    assert json.loads((world / "world.json").read_text())["settings"]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_a_folder_with_something_else_in_it_is_refused_even_when_forced(tmp_path, small):
    (tmp_path / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(WorldError, match="not a tinymath world: choose another folder"):
            build(tmp_path, ["base"], force=force, rebuild=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unknown_model_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="'huge'.*base, large"):
        build(tmp_path / "w", ["base", "huge"])
    with pytest.raises(ValueError, match="name one or more of base, large"):
        build(tmp_path / "w", [])
    assert not list(tmp_path.iterdir())


def test_an_interrupted_build_leaves_nothing_half(tmp_path, small, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    world = trained(tmp_path / "w", ["base"])
    before = content(world)
    monkeypatch.setattr(building, "measure_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "new", ["base"])
    with pytest.raises(KeyboardInterrupt):
        trained(world, ["large"])
    with pytest.raises(KeyboardInterrupt):
        trained(world, ["base"], force=True)
    assert content(world) == before
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_padding_changes_no_loss():
    """Rows padded on the right need no attention mask: their loss is that of each row on its own."""
    tokenizer, spec = make_tokenizer(), replace(SPECS["base"], textbook_chats=1, chats=6)
    _, examples = make_corpus(tokenizer, spec, 0, set())
    model = make_model(spec, tokenizer, 0).double()
    together = reply_loss(model, *collate(examples, tokenizer.pad_token_id))
    counts = [len(e.ids) - e.reply_start for e in examples]
    apart = [reply_loss(model, *collate([e], tokenizer.pad_token_id)) for e in examples]
    weighted = sum(n * loss for n, loss in zip(counts, apart, strict=True)) / sum(counts)
    torch.testing.assert_close(together, weighted, rtol=1e-10, atol=0)  # float64 rounding only


def test_one_pass_visits_every_example_once():
    tokenizer, spec = make_tokenizer(), replace(SPECS["base"], textbook_chats=1, chats=1000)
    _, examples = make_corpus(tokenizer, spec, 0, set())
    visited = [id(example) for batch in batches(examples, 16, seed=0) for example in batch]
    assert sorted(visited) == sorted(id(example) for example in examples)


def test_pre_training_lowers_the_loss():
    tokenizer = make_tokenizer()
    spec = replace(SPECS["base"], layers=1, hidden_size=64, heads=2, textbook_chats=400, chats=1)
    corpus, model = make_corpus(tokenizer, spec, 0, set()), make_model(spec, tokenizer, 0)
    held_back = collate(corpus[0][:64], tokenizer.pad_token_id)
    before = reply_loss(model, *held_back).item()
    pretrain(model, [corpus[0][64:]], spec, 0, progress=False, name="base")
    after = reply_loss(model, *held_back).item()
    assert after < 0.6 * before, "twenty steps take it from log 356 to well under 3.5 nats per token"


# ---------------------------------------------------------------------- the models that come with the package


def test_what_ships_was_made_with_the_settings_and_sizes_of_this_code():
    record = shipped.record()
    assert record["settings"] == building._settings(0)
    assert {name: model["spec"] for name, model in record["models"].items()} == {
        name: asdict(spec) for name, spec in SPECS.items()
    }


def test_the_world_is_unpacked_bit_for_bit_and_loads(tmp_path, capsys):
    world = build(tmp_path / "w")
    assert all(shipped.is_shipped(world / name, name) for name in SPECS)
    for name, model in json.loads((world / "world.json").read_text())["models"].items():
        loaded = AutoModelForCausalLM.from_pretrained(world / name)
        assert sum(p.numel() for p in loaded.parameters()) == model["parameters"]
        assert AutoTokenizer.from_pretrained(world / name).get_vocab().items() >= make_tokenizer().get_vocab().items()
    assert "Comes with the package" in (world / "MODEL_CARD.md").read_text()
    assert "base ready in" in capsys.readouterr().out
    assert (world / "train.parquet").exists()


def test_a_damaged_package_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    package = shutil.copytree(shipped.FOLDER, tmp_path / "package")
    monkeypatch.setattr(shipped, "FOLDER", package)
    weights = package / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    for _ in ("changed", "missing"):
        with pytest.raises(WorldError, match=r"base/model.safetensors is damaged or missing: install opd-ext again"):
            build(tmp_path / "w", ["large", "base"], progress=False)
        weights.unlink(missing_ok=True)
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_settings_that_do_not_ship_must_be_trained(tmp_path):
    with pytest.raises(WorldError, match="no models for these settings: train them with rebuild"):
        build(tmp_path / "w", seed=1)


def test_a_world_with_models_trained_here_says_so(tmp_path, capsys):
    world = build(tmp_path / "w", ["base"], progress=False)
    weights = world / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    build(world, ["base"])
    assert "base was trained here and is not the shipped one; force replaces it" in capsys.readouterr().out


def test_a_rebuilt_model_is_compared_bit_for_bit_then_within_noise():
    built = copy.deepcopy(shipped.record()["models"]["base"])
    assert shipped.compare(shipped.FOLDER / "base", "base", built) == "base: bit for bit the shipped model"
    elsewhere = shipped.FOLDER / "large"
    assert "equal to it within noise" in shipped.compare(elsewhere, "base", built)
    accuracy, half_width = built["measured"]["student"]["all"]["accuracy"]
    # Three standard errors of a difference are 3 / 1.96 * sqrt(2) = 2.16 half widths.
    built["measured"]["student"]["all"]["accuracy"] = [accuracy - 2.1 * half_width, half_width]
    assert "equal to it within noise" in shipped.compare(elsewhere, "base", built)
    built["measured"]["student"]["all"]["accuracy"] = [accuracy - 2.2 * half_width, half_width]
    assert "NOT the shipped model" in shipped.compare(elsewhere, "base", built)


@pytest.mark.slow
def test_rebuilding_the_base_model_gives_the_shipped_one(tmp_path, capsys):
    """On one thread, from nothing. Another processor may round otherwise; then the model must still do as well."""
    build(tmp_path / "w", ["base"], rebuild=True)
    said = capsys.readouterr().out
    assert "bit for bit the shipped model" in said or "equal to it within noise" in said
    assert "pre-training base: " in said and " tokens/s, loss " in said
