# SPDX-License-Identifier: Apache-2.0
"""Contracts of TransferQueue and of the containers that travel through it."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu
from verl.utils import transferqueue_utils

from .seams import seam

INTERFACE = "transfer_queue.interface:"


@seam(
    "bridge/teacher_inputs.py",
    pins={
        "transfer_queue:kv_batch_put": "keys partition_id fields= tags= data_parser=",
        "transfer_queue:kv_batch_get": "keys partition_id select_fields=",
    },
)
def rows(queue, jagged):
    """Jagged rows come back jagged, in the order of the keys that are asked for, also when all are equally long."""
    fields = {"ids": jagged([[1, 2], [3], [4]]), "flag": torch.tensor([True, False, True])}
    fields |= {"info": [{"q": 1}, {"q": 2}, {"q": 3}]}
    queue.kv_batch_put(keys=["a", "b", "c"], partition_id="train", fields=tu.get_tensordict(fields))
    data = queue.kv_batch_get(keys=["b", "a"], partition_id="train", select_fields=["ids", "flag", "info"])
    assert [row.tolist() for row in data["ids"].unbind()] == [[3], [1, 2]]
    assert data["flag"].tolist() == [False, True]
    assert [getattr(item, "data", item) for item in list(data["info"])] == [{"q": 2}, {"q": 1}]
    even = queue.kv_batch_get(keys=["b", "c"], partition_id="train", select_fields=["ids"])["ids"]
    assert even.is_nested and even.offsets().tolist() == [0, 1, 2] and even.to_padded_tensor(0).tolist() == [[3], [4]]


@seam("bridge/teacher_inputs.py", pins={"transfer_queue:KVBatchMeta": "keys= tags= partition_id= fields= extra_info="})
def overwriting(queue, jagged):
    """Putting a field anew replaces it for these keys alone, whatever the lengths, and leaves tags as they are."""
    first = tu.get_tensordict({"ids": jagged([[1, 2], [3]]), "kept": jagged([[7], [8]])})
    queue.kv_batch_put(keys=["a", "b"], partition_id="train", fields=first, tags=[{"seq_len": 2}, {"seq_len": 1}])
    again = tu.get_tensordict({"ids": jagged([[9, 9, 9]])})
    assert isinstance(queue.kv_batch_put(keys=["b"], partition_id="train", fields=again), KVBatchMeta)
    data = queue.kv_batch_get(keys=["a", "b"], partition_id="train", select_fields=["ids", "kept"])
    assert [row.tolist() for row in data["ids"].unbind()] == [[1, 2], [9, 9, 9]]
    assert [row.tolist() for row in data["kept"].unbind()] == [[7], [8]]
    assert queue.kv_list("train") == {"train": {"a": {"seq_len": 2}, "b": {"seq_len": 1}}}


@seam("bridge/rollouts.py", pins={f"{INTERFACE}async_kv_batch_get": "keys partition_id select_fields="})
def absent_fields(queue, jagged):
    """A field that no row has is left out of what comes back: which ones there are depends on the configuration."""
    queue.kv_batch_put(keys=["a"], partition_id="train", fields=tu.get_tensordict({"ids": jagged([[1]])}))
    data = queue.kv_batch_get(keys=["a"], partition_id="train", select_fields=["ids", "nothing"])
    assert set(data.keys()) == {"ids"} and data.get("nothing", None) is None


@seam("bridge/teacher_inputs.py", pins={"transfer_queue:kv_clear": "keys partition_id"})
def clearing(queue, jagged):
    """A cleared row is gone and its neighbours stay."""
    queue.kv_batch_put(keys=["a", "b"], partition_id="train", fields=tu.get_tensordict({"ids": jagged([[1], [2]])}))
    queue.kv_clear(keys=["a"], partition_id="train")
    assert list(queue.kv_list("train")["train"]) == ["b"]


@seam("bridge/trainer.py", covers="batch.fields", pins={"transfer_queue:KVBatchMeta.reorder": "self indexes"})
def batch_meta():
    """Keys and tags move together; tags and ``extra_info`` are the batch's own, and may be written to."""
    tags, told = [{"seq_len": 1}, {"seq_len": 2}], {"temperature": 1.0}
    batch = KVBatchMeta(partition_id="train", keys=["a", "b"], tags=tags, extra_info=told)
    batch.reorder([1, 0])
    assert (batch.keys, [tag["seq_len"] for tag in batch.tags], batch.fields) == (["b", "a"], [2, 1], None)
    batch.tags[0]["seq_len"] += 5
    batch.extra_info["temperature"] = 0.5
    assert tags[1]["seq_len"] == 2 and told == {"temperature": 1.0}


@seam("bridge/trainer.py", pins={"verl.utils.transferqueue_utils:tqbridge": "dispatch_mode="})
def on_the_way_to_workers(queue, jagged, monkeypatch):
    """A worker gets the fields that the batch names, and its ``extra_info`` as plain values beside them."""
    monkeypatch.setattr(transferqueue_utils, "TQ_INITIALIZED", True)
    fields = {"ids": jagged([[1, 2], [3]]), "other": torch.zeros(2)}
    queue.kv_batch_put(keys=["a", "b"], partition_id="train", fields=tu.get_tensordict(fields), tags=[{}, {}])
    batch = KVBatchMeta(keys=["b", "a"], tags=[{}, {}], partition_id="train", fields=["ids"])
    batch.extra_info = {"opd_scale": 0.5, "dataloader_kwargs": {"shuffle": False}}
    seen = []

    @transferqueue_utils.tqbridge()
    def worker(data):
        seen.append(data)
        return tu.get_tensordict({}, {"metrics": {"loss": [1.0]}})

    answer = worker(batch)
    (data,) = seen
    assert [row.tolist() for row in data["ids"].unbind()] == [[3], [1, 2]] and "other" not in data
    assert data["opd_scale"] == 0.5 and data["dataloader_kwargs"] == {"shuffle": False}
    assert answer["metrics"] == {"loss": [1.0]}


@seam(
    "bridge/engine.py",
    pins={
        "verl.utils.tensordict_utils:get_tensordict": "tensor_dict non_tensor_dict=",
        "verl.utils.tensordict_utils:assign_non_tensor": "tensor_dict **kwargs",
        "verl.utils.tensordict_utils:assign_non_tensor_data": "tensor_dict key val",
        "verl.utils.tensordict_utils:get_non_tensor_data": "data key default",
    },
)
def containers(jagged):
    """Jagged tensors, objects and plain values stand in one TensorDict; ``data[name]`` gives a plain value itself."""
    fields = {"ids": jagged([[1, 2], [3]]), "uid": np.array(["a", "b"], dtype=object), "flag": torch.tensor([1, 0])}
    data = tu.get_tensordict(fields, {"scale": 0.5})
    tu.assign_non_tensor(data, opd_tokens=7, nothing=None)
    tu.assign_non_tensor_data(data, "validate", True)
    assert isinstance(data, TensorDict) and len(data) == 2 and list(data["uid"]) == ["a", "b"]
    assert (data["scale"], data["opd_tokens"], data["validate"]) == (0.5, 7, True)
    assert tu.get_non_tensor_data(data, "scale", 1.0) == 0.5 and tu.get_non_tensor_data(data, "absent", 1.0) == 1.0
    assert "has_teacher" not in data.keys() and "scale" in data
    copied = data.clone(recurse=False)
    copied["flag"] = torch.tensor([5, 5])
    assert data["flag"].tolist() == [1, 0]
    with pytest.raises(AssertionError):
        tu.get_tensordict(fields | {"short": torch.zeros(1)})
