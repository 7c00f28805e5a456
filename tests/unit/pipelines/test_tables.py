# SPDX-License-Identifier: Apache-2.0
"""Token tables: whole or absent, the same bytes for the same rows, and no row trained under another row's key."""

import numpy as np
import pandas as pd
import pytest

from opd_ext.tokens.dataset import Corruption, TokenDataset
from opd_ext.tokens.tables import (
    CONFIDENCE,
    FLAGS,
    SAMPLES,
    TableError,
    content_key,
    file_digest,
    read_table,
    write_table,
)

STOP = 9


def rows(*pairs, reason="stop"):
    """Sample rows of (prompt, response) pairs."""
    return pd.DataFrame(
        {
            "uid": [str(index) for index in range(len(pairs))],
            "sample": 0,
            "key": [content_key(*pair) for pair in pairs],
            "prompt_ids": [pair[0] for pair in pairs],
            "response_ids": [pair[1] for pair in pairs],
            "finish_reason": reason,
        }
    )


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "samples.parquet"
    write_table(path, rows(([1, 2], [3, 4, STOP]), ([5], [6, STOP])), SAMPLES, job="a")
    return path


def flags(table, *of_rows, keys=None):
    path = table.with_name("flags.parquet")
    keys = read_table(table, SAMPLES)["key"] if keys is None else keys
    write_table(path, pd.DataFrame({"key": keys, "flags": list(of_rows)}), FLAGS)
    return path


def masks(dataset):
    return [item["loss_mask"].tolist() for item in dataset]


def test_equal_rows_give_equal_bytes_and_leave_nothing_else(tmp_path, table):
    again = tmp_path / "again.parquet"
    write_table(again, read_table(table, SAMPLES), SAMPLES, job="a")
    assert file_digest(again) == file_digest(table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.parquet", "samples.parquet"]


def test_floats_come_back_exactly_and_take_less_room(tmp_path):
    logp = -np.random.default_rng(0).random(20_000).astype(np.float32) * 1e-2
    write_table(tmp_path / "c.parquet", pd.DataFrame({"key": ["k"], "logp": [logp]}), CONFIDENCE)
    assert np.array_equal(read_table(tmp_path / "c.parquet", CONFIDENCE)["logp"][0], logp)
    assert (tmp_path / "c.parquet").stat().st_size < 0.95 * logp.nbytes


def test_a_file_says_what_it_is(table, tmp_path):
    with pytest.raises(TableError, match="made with job a, not b"):
        read_table(table, SAMPLES, {"job": "b"})
    with pytest.raises(TableError, match="no column logp"):
        read_table(table, CONFIDENCE)
    with pytest.raises(TableError, match="does not exist"):
        read_table(tmp_path / "none.parquet", SAMPLES)
    (tmp_path / "torn.parquet").write_bytes(table.read_bytes()[:100])
    with pytest.raises(TableError, match="not a readable parquet"):
        read_table(tmp_path / "torn.parquet", SAMPLES)


def test_digest_of_a_folder_sees_names_and_contents(tmp_path):
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "other").write_text("1")
    a, b, c, d = (file_digest(tmp_path / name) for name in "abcd")
    assert a == b and len({a, c, d}) == 3


def test_responses_are_trained_and_prompts_are_not(table):
    dataset = TokenDataset(table, 10, [STOP])
    assert masks(dataset) == [[0, 0, 1, 1, 1], [0, 1, 1]]
    assert dataset[0]["input_ids"].tolist() == [1, 2, 3, 4, STOP]
    assert dataset[0]["position_ids"].tolist() == [0, 1, 2, 3, 4]


def test_a_mask_takes_tokens_out_of_the_loss_and_not_out_of_the_input(table):
    dataset = TokenDataset(table, 10, [STOP], flags(table, [True, False, True], [False, False]))
    assert masks(dataset) == [[0, 0, 1, 0, 1], [0, 0, 0]]
    assert dataset[0]["input_ids"].tolist() == [1, 2, 3, 4, STOP]
    assert dataset[1]["response_mask"].tolist() == [0, 1, 1]


def test_masks_are_found_by_content_and_not_by_position(table):
    keys = read_table(table, SAMPLES)["key"][::-1]
    dataset = TokenDataset(table, 10, [STOP], flags(table, [True, False], [False, True, True], keys=keys))
    assert masks(dataset) == [[0, 0, 0, 1, 1], [0, 1, 0]]


def test_a_mask_of_other_ids_is_refused(table):
    with pytest.raises(TableError, match="other token ids"):
        TokenDataset(table, 10, [STOP], flags(table, [True] * 3, [True] * 2, keys=["x", "y"]))
    with pytest.raises(TableError, match="2 values for the 3 response tokens"):
        TokenDataset(table, 10, [STOP], flags(table, [True] * 2, [True] * 2))


def test_ids_that_are_not_those_of_their_key_are_refused(tmp_path):
    changed = rows(([1, 2], [3, STOP]))
    changed.at[0, "response_ids"] = [4, STOP]
    write_table(tmp_path / "s.parquet", changed, SAMPLES)
    with pytest.raises(TableError, match="not those that its key was made of"):
        TokenDataset(tmp_path / "s.parquet", 10, [STOP])


def test_the_end_is_trained_only_where_the_model_ended(tmp_path):
    cut, unfinished = rows(([1], [2, 3]), reason="length"), rows(([1], [2, 3]))
    write_table(tmp_path / "cut.parquet", cut, SAMPLES)
    assert TokenDataset(tmp_path / "cut.parquet", 10, [STOP])[0]["input_ids"].tolist() == [1, 2, 3]
    write_table(tmp_path / "wrong.parquet", unfinished, SAMPLES)
    with pytest.raises(TableError, match="does not end with"):
        TokenDataset(tmp_path / "wrong.parquet", 10, [STOP])


def test_long_rows_lose_their_tail_and_are_counted(table):
    dataset = TokenDataset(table, 4, [STOP], flags(table, [False, True, True], [True, True]))
    assert dataset.cut == 1
    assert dataset[0]["input_ids"].tolist() == [1, 2, 3, 4] and dataset[0]["loss_mask"].tolist() == [0, 0, 0, 1]
    with pytest.raises(TableError, match="raise train.max_length"):
        TokenDataset(table, 2, [STOP])


def test_a_corruption_belongs_to_row_and_epoch_and_holds_what_must_be_restored(tmp_path):
    path = tmp_path / "long.parquet"
    write_table(path, rows(([1, 2], [*range(10, 60), STOP])), SAMPLES)
    chosen = np.zeros(51, dtype=bool)
    chosen[[0, 50]] = True
    data = TokenDataset(
        path, 100, [STOP], flags(path, chosen), Corruption(0.3, 0.8, seed=1, end=STOP, block_size=1, canvas=0)
    )
    first = data[0]["loss_mask"]
    assert first[:2].sum() == 0 and first[2] == 1 and first[-1] == 1
    assert 0.1 < first[2:].float().mean() < 1
    data.set_epoch(1)
    second = data[0]["loss_mask"]
    data.set_epoch(0)
    assert not first.equal(second) and data[0]["loss_mask"].equal(first)


@pytest.mark.parametrize(("block_size", "canvas", "length"), [(8, 0, 8), (4, 0, 8), (None, 6, 8), (None, 2, 5)])
def test_a_finished_response_is_filled_with_ends_that_are_trained(table, block_size, canvas, length):
    """Else the number of masked tokens in the last block would tell a model how long the response is."""
    everything = Corruption(1.0, 1.0, seed=1, end=STOP, block_size=block_size, canvas=canvas)
    item = TokenDataset(table, 20, [STOP], flags(table, [True] * 3, [False] * 2), everything)[0]
    assert item["input_ids"].tolist() == [1, 2, 3, 4] + [STOP] * (length - 4)
    assert item["loss_mask"].tolist() == item["response_mask"].tolist() == [0, 0] + [1] * (length - 2)
