# SPDX-License-Identifier: Apache-2.0
"""Contracts of verl's FSDP engine, on a real one: FSDP2 over gloo with one rank and half a million weights."""

import dataclasses
import math
import types
from unittest.mock import Mock

import pytest
import torch
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine.base import BaseEngine, EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import prepare_micro_batches

from .seams import bare, says, seam

FSDP = "verl.workers.engine.fsdp.transformer_impl:FSDPEngine."
HEAD = "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead"
ROWS = [[3, 4, 5, 6], [7, 8, 9], [10, 11]]


def _batch(jagged, rows=ROWS, budget=100, **non_tensors):
    """What the engine needs of a batch; every sequence is trained from its second token on."""
    return tu.get_tensordict(
        {
            "input_ids": jagged(rows),
            "position_ids": jagged([list(range(len(row))) for row in rows]),
            "loss_mask": jagged([[0] + [1] * (len(row) - 1) for row in rows]),
            "row": torch.arange(len(rows)),
        },
        {"temperature": 1.0, "use_dynamic_bsz": True, "max_token_len_per_gpu": budget, **non_tensors},
    )


def _loss(model_output, data, dp_group=None):
    return -model_output["log_probs"].values().mean(), {"seen": len(data)}


@seam("bridge/engine.py", pins={"verl.workers.engine.base:EngineRegistry.register": None})
def registry(monkeypatch):
    """A class for a device and vendor wins over the one for the device; a key that is taken is refused."""
    monkeypatch.setattr(EngineRegistry, "_engines", {})
    kinds = [type(name, (BaseEngine,), {}) for name in ("Stock", "Ours", "OnCPU")]
    EngineRegistry.register(model_type="m", backend=["fsdp", "fsdp2"], device=["cuda", "npu"])(kinds[0])
    EngineRegistry.register(model_type="m", backend=["fsdp", "fsdp2"], device="cuda", vendor="nvidia")(kinds[1])
    EngineRegistry.register(model_type="m", backend=["fsdp", "fsdp2"], device="cpu")(kinds[2])
    assert EngineRegistry.get_engine_cls("m", "fsdp2") is kinds[2]
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    for vendor, kind in (("nvidia", kinds[1]), ("amd", kinds[0])):
        monkeypatch.setenv("VERL_ENGINE_VENDOR", vendor)
        assert EngineRegistry.get_engine_cls("m", "fsdp2") is kind
    with pytest.raises(AssertionError):
        EngineRegistry.register(model_type="m", backend="fsdp2", device="cpu")(kinds[0])


@seam(
    "bridge/engine.py",
    pins={"verl.workers.engine.base:EngineRegistry": None},
)
def stock_keys():
    """verl itself has no language-model engine for ``cpu`` nor for ``cuda, nvidia``: these keys are free for ours."""
    from opd_ext.bridge.diffusion import MODEL_TYPE, MaskedDiffusionEngine
    from opd_ext.bridge.engine import OPDEngine

    found = EngineRegistry._engines["language_model"]["fsdp2"]
    assert found["cuda"] is FSDPEngineWithLMHead
    assert found["cpu"] is found["cuda", "nvidia"] is OPDEngine
    assert EngineRegistry._engines[MODEL_TYPE]["fsdp2"]["cpu"] is MaskedDiffusionEngine


@seam(
    "bridge/engine.py",
    covers="OPDEngine._build_module OPDEngine.module lm_head.head_fn lm_head.fp32 lm_head.forward "
    "self._lm_head.head_fn worker.engine.module.get_output_embeddings().fp32",
    pins={f"{FSDP}_build_module": "self", HEAD: None},
)
def head(engine, jagged):
    """``lm_head`` runs as a module, with its weight gathered, on every row of a pass."""
    lm_head, seen = engine.module.get_output_embeddings(), []
    assert isinstance(lm_head.weight, DTensor) and getattr(lm_head, "bias", None) is None
    project = lm_head.forward

    def forward(self, hidden):
        seen.append((hidden.shape, isinstance(self.weight, DTensor), tuple(self.weight.shape)))
        return hidden.sum()

    lm_head.forward = types.MethodType(forward, lm_head)
    try:
        inputs, _ = engine.prepare_model_inputs(_batch(jagged))
        out = engine.module(**inputs, use_cache=False)
    finally:
        lm_head.forward = project
    size = engine.module.config.hidden_size
    assert seen == [(torch.Size([1, 9, size]), False, (engine.module.config.vocab_size, size))]
    assert out.logits.ndim == 0, "whatever the head returns comes out as logits"


@seam(
    "bridge/engine.py",
    covers="OPDEngine._build_fsdp_module OPDEngine.engine_config transformer_impl.CPUOffloadPolicy",
    pins={
        f"{FSDP}_build_fsdp_module": "self module",
        "verl.workers.engine.fsdp.transformer_impl:CPUOffloadPolicy": None,
    },
)
def forward_only(engine):
    """A forward-only module is streamed from pinned host memory, decided by ``engine_config.forward_only`` there."""
    # Pinned memory needs an accelerator, so this is read. Our override clears the flag while the module is wrapped.
    # Where the config asks for offload, but there is no accelerator, a policy that does not pin stands under that name.
    says(
        f"{FSDP}_build_fsdp_module",
        "if self.engine_config.offload_policy or self.engine_config.forward_only:",
        "offload_policy = CPUOffloadPolicy(pin_memory=True)",
        "self._autocast_dtype = param_dtype",
    )
    assert dataclasses.replace(engine.engine_config, forward_only=True).forward_only is True
    assert engine.engine_config.param_offload is engine.engine_config.offload_policy is False
    assert engine.engine_config.strategy == "fsdp2"


@seam(
    "bridge/engine.py",
    covers="OPDEngine.prepare_model_inputs OPDEngine.use_ulysses_sp",
    pins={f"{HEAD}.prepare_model_inputs": "self micro_batch"},
)
def packing(engine, jagged):
    """Sequences are laid end to end without padding; labels are the ids, one place to the left."""
    inputs, outputs = engine.prepare_model_inputs(_batch(jagged))
    flat = [token for row in ROWS for token in row]
    assert inputs["input_ids"].tolist() == [flat] and inputs["attention_mask"] is None
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert outputs["input_ids_rmpad_rolled"].tolist() == flat[1:] + flat[:1]
    assert engine.use_ulysses_sp is False and not outputs.get("pad_size"), "else ranks share these sequences"


@seam(
    "bridge/diffusion.py",
    covers="MaskedDiffusionEngine.prepare_model_inputs _attn_implementation",
    pins={f"{HEAD}.prepare_model_outputs": "self output output_args micro_batch logits_processor_func"},
)
def labels(engine, jagged):
    """Log-probs are those of ``input_ids_rmpad_rolled`` under the logits of the same rows, whatever stands there."""
    batch = _batch(jagged)
    _, arguments = engine.prepare_model_inputs(batch)
    arguments["input_ids_rmpad_rolled"] = clean = torch.full((9,), 5)
    logits = torch.randn(1, 9, 7)
    found = engine.prepare_model_outputs(types.SimpleNamespace(logits=logits), arguments, batch, None)["log_probs"]
    expected = logits[0].log_softmax(-1).gather(-1, clean[:, None])[:, 0]
    assert found.offsets().tolist() == [0, 4, 7, 9]
    torch.testing.assert_close(found.values(), expected)
    assert engine.model_config.hf_config._attn_implementation == "sdpa", "set by model.override_config"


@seam("bridge/engine.py", pins={"verl.workers.engine.utils:prepare_micro_batches": None})
def splitting(jagged, one_rank):
    """Micro-batches hold every sample once within the budget of tokens, or a fixed number of them in order."""
    batch = _batch(jagged, budget=5)
    parts, _ = prepare_micro_batches(batch, dp_group=torch.distributed.group.WORLD)
    assert len(parts) == 2 and sorted(row for part in parts for row in part["row"].tolist()) == [0, 1, 2]
    assert all(part["temperature"] == 1.0 for part in parts)
    fixed = _batch(jagged, use_dynamic_bsz=False, micro_batch_size_per_gpu=1)
    assert [part["row"].tolist() for part in prepare_micro_batches(fixed)[0]] == [[0], [1], [2]]


@seam(
    "bridge/engine.py",
    covers="OPDEngine.forward_backward_batch OPDEngine.forward_step OPDEngine.get_data_parallel_group",
    pins={
        f"{FSDP}forward_backward_batch": "self data loss_function forward_only=",
        f"{HEAD}.forward_step": "self micro_batch loss_function forward_only",
        f"{FSDP}get_data_parallel_group": "self",
    },
)
def micro_batches(engine, jagged, monkeypatch):
    """``forward_step`` is called per micro-batch, ``backward`` on the loss it returns; its numbers become lists."""
    calls = []

    def forward_step(micro_batch, loss_function, forward_only):
        calls.append((len(micro_batch), micro_batch["dp_size"], micro_batch["batch_num_tokens"], forward_only))
        loss = engine.module(**engine.prepare_model_inputs(micro_batch)[0], use_cache=False).logits.mean()
        return loss, {"model_output": {}, "loss": 0.5, "metrics": {"opd": 1.0}}

    monkeypatch.setattr(engine, "forward_step", forward_step)
    with engine.train_mode():
        output = engine.forward_backward_batch(_batch(jagged, budget=5), loss_function=_loss)
        assert all(p.grad is not None for p in engine.module.parameters())
    assert [call[1:] for call in calls] == [(1, 6, False)] * 2 and sum(call[0] for call in calls) == 3
    assert output["loss"] == [0.5, 0.5] and output["metrics"] == {"opd": [1.0, 1.0]}
    assert torch.distributed.get_world_size(engine.get_data_parallel_group()) == 1


@seam(
    "bridge/engine.py",
    covers="OPDEngine.prepare_model_outputs",
    pins={f"{HEAD}.prepare_model_outputs": "self output output_args micro_batch logits_processor_func"},
)
def model_outputs(engine, jagged, monkeypatch):
    """Outputs are made of whole logits and a temperature per row; an update gives them back in order if it is asked."""
    seen, theirs = [], engine.prepare_model_outputs

    def outputs(output, output_args, micro_batch, logits_processor_func):
        seen.append((output.logits.shape[1], len(output_args["temperature_rmpad"])))
        return theirs(output, output_args, micro_batch, logits_processor_func)

    monkeypatch.setattr(engine, "prepare_model_outputs", outputs)
    with engine.train_mode():
        asked = engine.forward_backward_batch(_batch(jagged, budget=5, return_model_output=True), loss_function=_loss)
        plain = engine.forward_backward_batch(_batch(jagged, budget=5), loss_function=_loss)
    assert [len(row) for row in asked["model_output"]["log_probs"].unbind()] == [len(row) for row in ROWS]
    assert plain["model_output"] == {} and sorted(seen[:2]) == [(4, 4), (5, 5)]


@seam("bridge/engine.py", pins={f"{FSDP}_gradient_sync_context": "self * is_last_micro_batch"})
def gradient_sync(engine, jagged, monkeypatch):
    """With ``use_no_sync_for_gradient_accumulation: false`` gradients are sharded after every micro-batch."""
    seen, switched = [], []
    loss_of = engine.forward_step

    def forward_step(micro_batch, loss_function, forward_only):
        seen.append([p.grad is not None for p in engine.module.parameters()])
        return loss_of(micro_batch, loss_function, forward_only)

    monkeypatch.setattr(engine, "forward_step", forward_step)
    switch = engine.module.set_requires_gradient_sync
    monkeypatch.setattr(engine.module, "set_requires_gradient_sync", lambda on: switched.append(on) or switch(on))
    for deferred in (False, True):
        changed = dataclasses.replace(engine.engine_config, use_no_sync_for_gradient_accumulation=deferred)
        monkeypatch.setattr(engine, "engine_config", changed)
        with engine.train_mode():
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(_batch(jagged, budget=5), loss_function=_loss)
    assert all(seen[1]), "the first micro-batch has left sharded gradients"
    assert not any(seen[3]) and switched == [False, True], "what the default of verl's dataclass would do"


@seam(
    "bridge/engine.py",
    covers="OPDEngine.optimizer_step",
    pins={f"{FSDP}optimizer_step": "self"},
)
def optimiser(engine, jagged):
    """``optimizer_step`` gives the norm before the clip at ``optim.clip_grad``, and makes no step if it is infinite."""

    def weights():
        return torch.cat([p.detach().full_tensor().flatten() for p in engine.module.parameters()])

    def step(clip_grad, spoil=1.0):
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(_batch(jagged), loss_function=_loss)
        with torch.no_grad():
            for p in engine.module.parameters():
                p.grad.mul_(spoil)
        engine.optimizer_config.clip_grad, before = clip_grad, weights()
        norm = engine.optimizer_step()
        left = [p.grad.full_tensor().norm() ** 2 for p in engine.module.parameters() if p.grad is not None]
        return norm, sum(left) ** 0.5, (weights() - before).abs().max()

    with engine.train_mode():
        norm, clipped, moved = step(clip_grad=1e-3)
        assert isinstance(norm, float) and norm > 1e-2 and clipped == pytest.approx(1e-3, rel=1e-2) and moved > 0
        norm, _, moved = step(clip_grad=1.0, spoil=float("inf"))
        assert not math.isfinite(norm) and moved == 0


@seam(
    "bridge/engine.py",
    covers="OPDEngine.eval_mode OPDEngine._autocast_dtype",
    pins={f"{FSDP}eval_mode": "self **kwargs", f"{FSDP}train_mode": "self **kwargs"},
)
def modes(engine, jagged):
    """``eval_mode`` and ``train_mode`` switch the module; leaving ``train_mode`` clears gradients."""
    assert engine._autocast_dtype == torch.float32
    with engine.eval_mode():
        assert not engine.module.training
    with engine.train_mode():
        assert engine.module.training
        engine.forward_backward_batch(_batch(jagged), loss_function=_loss)
    assert all(p.grad is None or not p.grad.full_tensor().any() for p in engine.module.parameters())


@seam(
    "bridge/engine.py",
    covers="OPDEngine.disable_adapter",
    pins={f"{FSDP}disable_adapter": "self"},
)
def adapters():
    """``disable_adapter`` is the module's own context, in which a LoRA student is the model that it was before."""
    module = Mock()
    assert bare(FSDPEngineWithLMHead, module=module).disable_adapter() is module.disable_adapter.return_value
    from peft import PeftModel

    assert callable(PeftModel.disable_adapter)


@seam(
    "bridge/engine.py",
    covers="OPDEngine._build_lora_module",
    pins={f"{FSDP}_build_lora_module": "self module"},
)
def first_adapter(model):
    """``_build_lora_module`` puts an adapter on the model, whose A it draws on the CPU; B is 0, nothing else trains."""
    from transformers import AutoModelForCausalLM
    from verl.workers.config import HFModelConfig

    settings = HFModelConfig(path=model, lora_rank=2, lora_alpha=4, target_modules="all-linear", lora={"merge": True})

    def adapter(seed):
        engine = bare(FSDPEngineWithLMHead, model_config=settings)
        torch.default_generator.manual_seed(seed)
        built = engine._build_lora_module(AutoModelForCausalLM.from_pretrained(model))
        return {name: p.detach() for name, p in built.named_parameters() if p.requires_grad}

    first, again, other = adapter(1), adapter(1), adapter(2)
    assert all("lora_" in name for name in first) and not any(w.any() for n, w in first.items() if "lora_B" in n)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


@seam(
    "bridge/diffusion.py",
    covers="MaskedDiffusionEngine.__init__ MaskedDiffusionEngine._build_module MaskedDiffusionEngine.model_config "
    "MaskedDiffusionEngine.use_ulysses_sp MaskedDiffusionEngine.use_remove_padding MaskedDiffusionEngine.pad_to_length "
    "MaskedDiffusionEngine.engine_config MaskedDiffusionEngine._autocast_dtype self.model_config.model_type",
    pins={f"{FSDP}__init__": "self model_config engine_config optimizer_config checkpoint_config"},
)
def diffusion_engine(engine):
    """The class to load follows ``model_config.model_type``, which may be changed while the module is built."""
    assert engine.model_config.model_type == "language_model"
    assert engine.use_remove_padding and not engine.use_ulysses_sp and not engine.pad_to_length
    assert engine.engine_config.use_fused_kernels is False
    engine.model_config.model_type = "masked_diffusion"
    try:
        with pytest.raises(AssertionError, match="Unsupported model type"):
            engine._build_module()
    finally:
        engine.model_config.model_type = "language_model"
    assert isinstance(engine.module, type(engine._build_module()))


@seam(
    "bridge/engine.py",
    pins={"verl.utils.device:get_device_id": "", "verl.utils.device:get_device_name": ""},
)
def device():
    """Tensors move to ``get_device_id()``, on the CPU too; autocast is told ``get_device_name()``."""
    assert get_device_name() == "cpu" and torch.zeros(1).to(get_device_id()).device.type == "cpu"
