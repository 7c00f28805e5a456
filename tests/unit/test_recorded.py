# SPDX-License-Identifier: Apache-2.0
"""Rollouts as token ids beside their texts."""

import numpy as np
import pytest

from opd_ext import recorded
from opd_ext.files import write_jsonl

TEXTS = [{"uid": "t1p0", "sample": i, "output": f"a\u2028{i}", "score": 0.5} for i in range(2)]
IDS = [
    {"uid": "t1p0", "sample": 0, "prompts": [1, 2], "responses": [3], "raw_prompt": [], "extra_info": {"index": 1}},
    {"uid": "t1p0", "sample": 1, "prompts": [1], "responses": [3, 4], "raw_prompt": [], "extra_info": None}
    | {"loss_mask": [1, 0]},
]  # fmt: skip


def test_ids_and_texts_of_a_step_come_back_together(tmp_path):
    write_jsonl(tmp_path / "generations/train_3.jsonl", TEXTS)
    recorded.write(tmp_path, 3, IDS)
    first, second = recorded.read(tmp_path, 3)
    assert first == {**TEXTS[0], **IDS[0], "loss_mask": [1]}
    assert second == {**TEXTS[1], **IDS[1]}
    assert recorded.steps(tmp_path) == [3] and recorded.steps(tmp_path / "other") == []


def test_the_same_rollouts_are_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        recorded.write(tmp_path / folder, 1, IDS)
    assert recorded.path_of(tmp_path / "a", 1).read_bytes() == recorded.path_of(tmp_path / "b", 1).read_bytes()


def test_what_a_data_set_holds_besides_text_does_not_stop_a_run(tmp_path):
    odd = {"array": np.arange(2), "number": np.float32(0.5), "image": object(), "half": "\ud800"}
    recorded.write(tmp_path, 1, [{**IDS[0], "extra_info": odd}])
    write_jsonl(tmp_path / "generations/train_1.jsonl", TEXTS[:1])
    (row,) = recorded.read(tmp_path, 1)
    assert row["extra_info"]["array"] == [0, 1] and row["extra_info"]["number"] == 0.5
    assert row["extra_info"]["image"].startswith("<object") and row["extra_info"]["half"] == "?"


def test_files_of_different_rollouts_are_refused(tmp_path):
    write_jsonl(tmp_path / "generations/train_1.jsonl", TEXTS[::-1])
    recorded.write(tmp_path, 1, IDS)
    with pytest.raises(ValueError, match="not of the same rollouts"):
        recorded.read(tmp_path, 1)
