# SPDX-License-Identifier: Apache-2.0
"""The masked-diffusion engine inside verl's training worker: real FSDP2 over gloo against plain forward passes."""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from tests.stack.engine_harness import Rank, run_ranks
from tests.stack.engine_inputs import VOCABULARY, EngineSpec, save_models

MASK = VOCABULARY - 1
BLOCK = 4
# fp32 on both sides; packing and the other attention kernel change the order of sums only (measured: up to 2e-6).
# A wrong position, block or neighbour in the pack shows at 1e-2 and above.
FP32 = 1e-5
# Prompt and response lengths, with blocks that hold parts of both and last blocks that are not whole.
LENGTHS = [(3, 9), (8, 5), (1, 1), (6, 14)]
BUDGET = 30  # tokens per micro-batch: the rows make several


@dataclasses.dataclass(frozen=True)
class Row:
    ids: list[int]
    mask: list[bool]


def make_rows() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt, response in LENGTHS:
        ids = torch.randint(3, MASK, (prompt + response,), generator=generator)
        mask = torch.rand(len(ids), generator=generator) < 0.6
        mask[:prompt] = False
        rows.append(Row(ids.tolist(), mask.tolist()))
    return rows


ROWS = make_rows()
UNMASKED = [dataclasses.replace(row, mask=[False] * len(row.ids)) for row in ROWS]
# attention of the model, implementation of it
ENGINES = [("full", "sdpa"), ("block", "sdpa"), ("full", "eager"), ("block", "eager")]


def _worker(rank: Rank, attention: str, implementation: str, **model: object):
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    from opd_ext.bridge.diffusion import MODEL_TYPE

    names = ("model_config", "engine_config", "optimizer_config", "checkpoint_config")
    configs = dict(zip(names, rank.configs(EngineSpec("untied")), strict=True))
    # Without decay, what changes a weight is its gradient.
    configs["optimizer_config"] = dataclasses.replace(configs["optimizer_config"], weight_decay=0.0)
    config = configs["model_config"]
    settings = {"mask_token_id": MASK, "diffusion_attention": attention, "diffusion_block_size": BLOCK, **model}
    settings["attn_implementation"] = implementation
    configs["model_config"] = type(config)(path=config.path, override_config=settings, use_remove_padding=True)
    worker = TrainingWorker(TrainingWorkerConfig(model_type=MODEL_TYPE, **configs))
    worker.reset()
    return worker


def _batch(rows: list[Row]):
    """What verl's SFT trainer makes of them."""
    from tensordict import NonTensorData
    from verl.utils import tensordict_utils as tu

    def jagged(values: list[list], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(v, dtype=dtype) for v in values], layout=torch.jagged)

    batch = tu.get_tensordict(
        {
            "input_ids": jagged([row.ids for row in rows]),
            "position_ids": jagged([list(range(len(row.ids))) for row in rows]),
            "loss_mask": jagged([row.mask for row in rows]),
        },
        {
            "use_remove_padding": True,
            "use_dynamic_bsz": True,
            "max_token_len_per_gpu": BUDGET,
            "micro_batch_size_per_gpu": None,
            "temperature": 1.0,
            "global_batch_size": len(rows),
        },
    )
    tu.assign_non_tensor(batch, update_lr_scheduler=False, global_token_num=NonTensorData([len(r.ids) for r in rows]))
    return batch


def _loss_of(output) -> float:
    from verl.utils import tensordict_utils as tu

    loss = tu.get(output, "metrics")["loss"]
    return float(sum(loss) if isinstance(loss, list) else loss)


def _step(rank: Rank) -> dict:
    """Loss and norm of the gradient of one update, the rows being shared out among the ranks."""
    from verl.utils import tensordict_utils as tu

    from opd_ext.bridge.diffusion import diffusion_loss

    found = {}
    for weighting in ("mean", "inverse_ratio"):
        worker = _worker(rank, "block", "sdpa")
        worker.set_loss_fn(functools.partial(diffusion_loss, config=None, weighting=weighting))
        batch = _batch(ROWS[rank.rank :: rank.world_size])
        tu.assign_non_tensor(batch, global_batch_size=len(ROWS))
        metrics = tu.get(worker.train_batch(batch), "metrics")
        found[weighting] = {name: float(torch.tensor(metrics[name]).sum()) for name in ("loss", "grad_norm")}
    return found


def _observe(rank: Rank) -> dict:
    """Everything the tests below look at, from one process."""
    from verl.utils import tensordict_utils as tu

    from opd_ext.bridge.diffusion import diffusion_loss

    found: dict = {"step": _step(rank)}
    for attention, implementation in ENGINES:
        worker = _worker(rank, attention, implementation)
        worker.set_loss_fn(functools.partial(diffusion_loss, config=None))
        output = worker.infer_batch(_batch(ROWS))
        logp = list(tu.get(output, "log_probs").unbind())
        seen = {"log_probs": logp, "loss": _loss_of(output)}
        nothing = worker.train_batch(_batch(UNMASKED))
        seen["nothing"] = _loss_of(nothing)
        seen["after_nothing"] = _loss_of(worker.infer_batch(_batch(ROWS)))
        worker.set_loss_fn(functools.partial(diffusion_loss, config=None, weighting="inverse_ratio"))
        seen["inverse_ratio"] = _loss_of(worker.infer_batch(_batch(ROWS)))
        worker.set_loss_fn(functools.partial(diffusion_loss, config=None))
        worker.train_batch(_batch(ROWS))
        seen["after_step"] = _loss_of(worker.infer_batch(_batch(ROWS)))
        found[attention, implementation] = seen
    for name, arguments in {
        "attention": ("full", "flash_attention_2", {}),
        "mask token": ("full", "sdpa", {"mask_token_id": None}),
        "block size": ("block", "sdpa", {"diffusion_block_size": None}),
        "kind": ("causal", "sdpa", {}),
        "vocabulary": ("full", "sdpa", {"mask_token_id": VOCABULARY}),
    }.items():
        try:
            _worker(rank, *arguments[:2], **arguments[2])
        except (ValueError, ImportError) as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(scope="module")
def observed(models) -> dict:
    (result,) = run_ranks(1, models, _observe)
    return result


@pytest.fixture(scope="module")
def model(models):
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(models / "untied", attn_implementation="eager", dtype=torch.float32)


@torch.no_grad()
def reference(model, row: Row, attention: str) -> Tensor:
    """log p(clean token | corrupted sequence), [L], of one sequence without packing.

    By blocks, every noised block takes a forward pass of its own behind the clean text before it.
    """
    ids, mask = torch.tensor(row.ids), torch.tensor(row.mask)
    noised = torch.where(mask, MASK, ids)

    def log_probs(text: Tensor, visible: Tensor) -> Tensor:
        bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        return model(input_ids=text[None], attention_mask=bias[None, None]).logits[0].log_softmax(-1)

    if attention == "full":
        everything = torch.ones(len(ids), len(ids), dtype=torch.bool)
        return log_probs(noised, everything).gather(-1, ids[:, None]).squeeze(-1)
    parts = []
    for start in range(0, len(ids), BLOCK):
        text = torch.cat([ids[:start], noised[start : start + BLOCK]])
        block = torch.arange(len(text)) // BLOCK
        logp = log_probs(text, block[:, None] >= block)[start:]
        parts.append(logp.gather(-1, ids[start : start + BLOCK, None]).squeeze(-1))
    return torch.cat(parts)


@pytest.mark.parametrize("attention, implementation", ENGINES)
class TestEngine:
    def test_packed_log_probs_are_those_of_every_sequence_alone(self, observed, model, attention, implementation):
        for row, logp in zip(ROWS, observed[attention, implementation]["log_probs"], strict=True):
            torch.testing.assert_close(logp, reference(model, row, attention), rtol=0, atol=FP32)

    def test_the_loss_is_the_mean_over_the_hidden_tokens_of_the_batch(self, observed, model, attention, implementation):
        hidden = torch.cat([reference(model, row, attention)[torch.tensor(row.mask)] for row in ROWS])
        assert observed[attention, implementation]["loss"] == pytest.approx(-hidden.mean().item(), abs=FP32)

    def test_inverse_ratio_is_the_mean_of_the_sequences_means(self, observed, model, attention, implementation):
        means = [
            reference(model, row, attention)[torch.tensor(row.mask)].mean().item() if any(row.mask) else 0.0
            for row in ROWS
        ]
        expected = -sum(means) / len(means)
        assert observed[attention, implementation]["inverse_ratio"] == pytest.approx(expected, abs=FP32)

    def test_a_step_lowers_the_loss(self, observed, attention, implementation):
        seen = observed[attention, implementation]
        assert seen["after_step"] < seen["loss"] - 0.01  # at learning rate 1e-2 a step takes off tenths

    def test_a_batch_without_a_hidden_token_costs_and_teaches_nothing(self, observed, attention, implementation):
        seen = observed[attention, implementation]
        assert seen["nothing"] == 0.0
        assert seen["after_nothing"] == seen["loss"]


@pytest.mark.parametrize(
    "mistake, remedy",
    [
        ("attention", "attn_implementation to sdpa"),
        ("mask token", "no mask_token_id: set it in model.override_config"),
        ("block size", "diffusion_block_size: set it in model.override_config"),
        ("kind", "choose one of full, block"),
        ("vocabulary", "the id with which the model was trained"),
    ],
)
def test_a_model_that_cannot_be_trained_so_is_refused_with_a_remedy(observed, mistake, remedy):
    assert remedy in observed[mistake]


def test_two_ranks_take_the_same_step_as_one(models, observed):
    for on_one_of_two in run_ranks(2, models, _step):
        for weighting, alone in observed["step"].items():
            assert on_one_of_two[weighting] == pytest.approx(alone, rel=FP32)
