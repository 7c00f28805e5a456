# SPDX-License-Identifier: Apache-2.0
"""Sizes of models, from their configs: parameters exactly, and the widths that memory and time follow from."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_HUB = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
DTYPE_BYTES = {"fp32": 4, "float32": 4, "32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "16": 2}
"""Every name that verl takes for a dtype (its ``PrecisionType``) -> bytes."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer; counts are parameters, widths elements per token.

    Attributes:
        parameters: all of them, a tied head once.
        active: those of the layers that a token passes; fewer than there are in a mixture of experts.
        vocabulary, hidden: rows and columns of the head.
        tied: head and embedding are one matrix.
        inner: of the MLP, of all experts that a token passes.
        query, key: heads times their width.
        heads: of queries, and of keys.
        normed: queries and keys have norms of their own.
        tensors: parameter tensors, for each of which an optimiser counts its steps.
        linear: (inputs, outputs) of the linear maps of one layer, by name.
        source: where all this comes from.
        guessed: by the name of a folder that is not here.
    """

    name: str
    parameters: int
    active: int
    layers: int
    hidden: int
    vocabulary: int
    tied: bool
    inner: int
    query: int
    key: int
    heads: tuple[int, int]
    normed: bool
    tensors: int
    linear: tuple[tuple[str, int, int], ...]
    source: str
    guessed: bool = False

    @property
    def head(self) -> int:
        """Elements of the vocabulary projection."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> float:
        """Parameters of one layer, all experts included."""
        return (self.parameters - self.head * (1 if self.tied else 2)) / self.layers

    def shared_by(self, ranks: int) -> bool:
        """Whether that many ranks can share its heads (Ulysses)."""
        queries, keys = self.heads
        return queries % ranks == 0 and (keys % ranks == 0 or ranks % keys == 0)

    def adapter(self, rank: int, targets: str | Sequence[str] | None) -> tuple[int, int]:
        """Parameters and tensors of a LoRA adapter on ``targets``; all-linear: on every map of a layer."""
        if not rank:
            return 0, 0
        everything = targets is None or targets == "all-linear"
        names = [targets] if isinstance(targets, str) else list(targets or ())
        chosen = [(i, o) for name, i, o in self.linear if everything or name in names]
        return self.layers * sum(rank * (i + o) for i, o in chosen), 2 * self.layers * len(chosen)

    def saved(self, width: int) -> float:
        """Bytes per token that a layer keeps for its backward pass, computing in ``width`` bytes per element.

        Counted from what autograd saves of a layer of transformers: two norms that compute in fp32, residuals, rotary
        embeddings, attention that keeps inputs, output and a log-sum per head, and a gated MLP of four tensors.
        """
        attention = (4 + 3 * width) if self.normed else 2 * width
        return (8 + 4 * width) * self.hidden + attention * (self.query + self.key) + 4 * width * self.inner

    @property
    def cache(self) -> float:
        """Bytes per token of keys and values in bf16."""
        return self.layers * self.key * 2 * 2


def of_config(config: Any, name: str, source: str) -> ModelShape:
    """The shape that a config of transformers describes, by arithmetic: the family of Llama, Qwen and their experts."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind, hidden, layers = text.model_type, text.hidden_size, text.num_hidden_layers
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or hidden // heads
    query, key = heads * width, (getattr(text, "num_key_value_heads", None) or heads) * width
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 0
    inner = (getattr(text, "moe_intermediate_size", None) if experts else None) or text.intermediate_size
    per_token = getattr(text, "num_experts_per_tok", 1) if experts else 1
    shared = (getattr(text, "num_shared_experts", None) or 0) if experts else 0  # that every token passes
    dense = (getattr(text, "first_k_dense_replace", None) or 0) if experts else 0  # first layers without experts
    normed, oss = kind.startswith("qwen3") or bool(getattr(text, "use_qk_norm", False)), kind == "gpt_oss"
    bias = kind == "qwen2" or bool(getattr(text, "attention_bias", False) and not normed)
    linear = [("q_proj", hidden, query), ("k_proj", hidden, key), ("v_proj", hidden, key), ("o_proj", query, hidden)]
    if not experts:
        linear += [("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden)]
    attention = 2 * hidden * (query + key) + (query + 2 * key if bias else 0) + (2 * width if normed else 0)
    attention += hidden + heads if oss else 0  # a bias of the output, and a sink per head
    mlp, router = 3 * hidden * inner + (2 * inner + hidden if oss else 0), experts * (hidden + oss)
    layer = attention + 2 * hidden + router + mlp * (max(1, experts) + shared)
    passed = attention + 2 * hidden + router + mlp * (per_token + shared)
    whole = attention + 2 * hidden + 3 * hidden * text.intermediate_size  # one of the first layers
    head, tied = text.vocab_size * hidden, bool(config.tie_word_embeddings)
    return ModelShape(
        name=name,
        parameters=(layers - dense) * layer + dense * whole + hidden + head * (1 if tied else 2),
        active=(layers - dense) * passed + dense * whole,
        layers=layers,
        hidden=hidden,
        vocabulary=text.vocab_size,
        tied=tied,
        inner=inner * (per_token + shared),
        query=query,
        key=key,
        heads=(heads, key // width),
        normed=normed,
        tensors=layers * (6 + (3 if bias else 0) + (2 if normed else 0) + (5 if oss else 0) + 3) + 2 + (not tied),
        linear=tuple(linear),
        source=source,
    )


def of_folder(path: Path) -> ModelShape:
    """The shape of a model folder; its parameters are counted on the meta device, whatever the architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    with torch.device("meta"):
        parameters = list(AutoModelForCausalLM.from_config(config).parameters())
    shape, count = of_config(config, str(path), "its config.json"), sum(p.numel() for p in parameters)
    other = count - shape.parameters  # of an architecture that the arithmetic does not know
    return replace(shape, parameters=count, active=shape.active + other, tensors=len(parameters))


def _known(kind: str, layers: int, hidden: int, inner: int, heads: tuple[int, int], tied: bool, **more: Any) -> Any:
    defaults = {"head_dim": 128, "vocab_size": 151_936, "intermediate_size": inner, "model_type": kind}
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "tie_word_embeddings": tied}
    sizes |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    return SimpleNamespace(**defaults | sizes | more)


_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
_LLAMA = {"vocab_size": 128_256}
_LING = {"vocab_size": 157_184, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
         "num_shared_experts": 1, "first_k_dense_replace": 1, "use_qk_norm": True}  # fmt: skip
_OSS = {"vocab_size": 201_088, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
        "attention_bias": True}  # fmt: skip
_SMOLLM2 = _known("llama", 30, 576, 1536, (9, 3), True, vocab_size=49_152, head_dim=64)


def _tiny(layers: int, hidden: int, inner: int, heads: tuple[int, int], words: int) -> Any:
    return _known("qwen3", layers, hidden, inner, heads, False, vocab_size=words, head_dim=32)


# config.json of the models in the recipes, as published on the hub: layers, hidden, MLP, heads, tied. What `opd data`
# makes is known by the end of its path.
_KNOWN = {
    "qwen3-0.6b": _known("qwen3", 28, 1024, 3072, (16, 8), True),
    "qwen3-1.7b": _known("qwen3", 28, 2048, 6144, (16, 8), True),
    "qwen3-4b": _known("qwen3", 36, 2560, 9728, (32, 8), True),
    "qwen3-8b": _known("qwen3", 36, 4096, 12288, (32, 8), False),
    "qwen3-14b": _known("qwen3", 40, 5120, 17408, (40, 8), False),
    "qwen3-32b": _known("qwen3", 64, 5120, 25600, (64, 8), False),
    "qwen3-30b-a3b": _known("qwen3_moe", 48, 2048, 6144, (32, 4), False, **_EXPERTS),
    "deepseek-r1-distill-llama-8b": _known("llama", 32, 4096, 14336, (32, 8), False, **_LLAMA),
    "llama-3.1-8b": _known("llama", 32, 4096, 14336, (32, 8), False, **_LLAMA),
    "ling-mini-2.0": _known("bailing_moe", 20, 2048, 5120, (16, 4), False, **_LING),
    "llada2.0-mini": _known("llada2_moe", 20, 2048, 5120, (16, 4), False, **_LING),
    "gpt-oss-20b": _known("gpt_oss", 24, 2880, 2880, (64, 8), False, **_OSS),
    "smollm2-135m": _SMOLLM2,
    "smollm2": _SMOLLM2,
    "tinymath/base": _tiny(3, 128, 256, (4, 2), 373),
    "tinymath/large": _tiny(4, 192, 384, (6, 2), 373),
    "tinymath/diffusion": _tiny(3, 128, 256, (4, 2), 374),
    "tinymath_long/base": _tiny(3, 128, 256, (4, 2), 407),
    "tinymath_long/large": _tiny(4, 128, 256, (4, 2), 407),
    "tinymath_tools/base": _tiny(3, 128, 256, (4, 2), 421),
}
_SUFFIX = r"(-base|-instruct|-thinking)?(-\d{4})?"  # Qwen3-4B-Instruct-2507


def known_config(name: str) -> Any:
    """The sizes of a model that is known by name, as its config.json has them; None of any other."""
    known = next((key for key in _KNOWN if re.fullmatch(re.escape(key) + _SUFFIX, name.lower())), None)
    return None if known is None else _KNOWN[known]


UNKNOWN = "is neither a folder here, nor in the hub's cache, nor known by name"
"""Of a model without a shape, in words that go on from its name."""


def model_shape(path: str | None) -> ModelShape | None:
    """The shape of a model folder, of a model that is known here by name, or of one in the hub's cache; else None.

    A folder that is not here yet, as of a teacher that is still to be trained, may have its name from a known model:
    ``runs/sft-smollm2_cpu/.../huggingface``. That is a guess.
    """
    if path is None:
        return None
    folder = Path(path).expanduser()
    if (folder / "config.json").exists():
        return of_folder(folder)
    for name in (folder.name.lower(), "/".join(folder.parts[-2:]).lower()):
        if (config := known_config(name)) is not None:
            return of_config(config, path, "its public config")
    return _cached(path) if _HUB.fullmatch(path) else _named_after(path, folder)


def _cached(name: str) -> ModelShape | None:
    """Of a hub model whose config has been fetched; None of one whose code would have to come with it."""
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(name, "config.json")
        return replace(of_folder(Path(file).parent), name=name) if isinstance(file, str) else None
    except (AttributeError, KeyError, OSError, TypeError, ValueError):  # no language model, or an unknown one
        return None


def _named_after(path: str, folder: Path) -> ModelShape | None:
    """The known model whose name stands in that of a folder, the last one first; the longest of several names."""
    keys = sorted((key for key in _KNOWN if "/" not in key), key=len, reverse=True)
    for part in reversed(folder.parts):
        for key in keys:
            if re.search(rf"(?<![a-z0-9.]){re.escape(key)}(?![a-z0-9.])", part.lower()):
                return replace(of_config(_KNOWN[key], path, f"{key}, after which a folder is named"), guessed=True)
    return None
