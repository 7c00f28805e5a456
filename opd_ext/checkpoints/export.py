# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder from a checkpoint of any number of ranks, read back before it gets its name.

verl's own merger would do for one case of these: it rounds to bfloat16, holds every shard in memory, leaves an adapter
beside the base weights, and does not look at what it wrote.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opd_ext.checkpoints.layout import MODEL, TEACHER, CheckpointError
from opd_ext.checkpoints.shards import Sharded, Shards
from opd_ext.checkpoints.source import Source, find, record
from opd_ext.files import beside, put_in_place, write_whole
from opd_ext.terminal import terminal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

RECORD = "opd_export.json"
DTYPES = ("bfloat16", "float16", "float32")
_KERNEL = "eager"  # no attention is computed here, and the trainer's kernel may not be installed
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")


def export(
    run: Path,
    step: str | None = None,
    out: Path | None = None,
    teacher: bool | str | None = None,
    adapter: bool = False,
    dtype: str | None = None,
    force: bool = False,
) -> Path:
    """Write the student of a checkpoint, or its teacher, as a folder that transformers and vLLM load.

    Args:
        run: a run folder, or that of one fine-tuning of a pipeline.
        step: a number or ``best`` (validation); None: the newest.
        out: the folder to make; by default ``<run>/export/step_<N>``.
        teacher: a teacher's weights in place of the student's: the name of one of several; empty, or true: of the one.
        adapter: what a LoRA run trained, or its teacher, as a PEFT adapter; else it is merged into its base, in fp32.
        dtype: of the weights, one of :data:`DTYPES`; None: as vLLM had them in training, of a fine-tuning as saved.
        force: replace what ``out`` holds.

    Returns:
        The folder, absolute.

    Raises:
        CheckpointError: one sentence: no such checkpoint, an incomplete one, a folder that holds something else.
    """
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype} does not exist; choose one of: {', '.join(DTYPES)}.")
    source = find(run, step)
    lora = is_lora(source)
    name = "" if teacher is True else teacher if teacher is not False else None
    if adapter and not lora:
        raise CheckpointError("--adapter needs a LoRA adapter, and this run has none: leave it out.")
    shards = None if name is None else source.check_teacher(name)
    whose = None if name is None else f"teacher {name}".rstrip()
    what = " ".join(filter(None, (whose, "adapter"))) if adapter else whose or "student"
    dtype = dtype or _rollout_dtype(source) or _saved_dtype(source)
    folder_name = f"step_{source.step}" + ("" if what == "student" else f"-{what.replace(' ', '-')}")
    out = (out or run / "export" / folder_name).expanduser().absolute()
    said = record(source, what, dtype)
    console = terminal()
    if out.exists() and not force:
        if (out / RECORD).is_file() and (out / RECORD).read_text() == said:
            console.print(f"{out} is complete, nothing to do", highlight=False, soft_wrap=True)
            return out
        raise CheckpointError(f"{out} holds something else: choose another --out, or replace it with --force.")
    with redirect_stderr(StringIO()), beside(out) as folder:
        shutil.copytree(source.template, folder, ignore=shutil.ignore_patterns(*_WEIGHTS), dirs_exist_ok=True)
        if adapter:
            count = _write_adapter(source, shards, folder, getattr(torch, dtype))
        else:
            count = _write_model(source, shards, lora, folder, getattr(torch, dtype))
        write_whole(folder / RECORD, said)
        for file in folder.iterdir():
            file.chmod(0o644 if file.is_file() else 0o755)  # safetensors keeps files to their owner
        put_in_place(folder, out)
    told = f"{what} of step {source.step}, {count:,} weights in {dtype}, read back and equal"
    console.print(f"model: {out} ({told})", highlight=False, soft_wrap=True)
    return out


def is_lora(source: Source) -> bool:
    return bool(source.model.get("lora_rank") or source.model.get("lora_adapter_path"))


# ---------------------------------------------------------------------- what is written


def _write_model(source: Source, teacher: Path | None, lora: bool, folder: Path, dtype: torch.dtype) -> int:
    if source.fine_tuned:
        model = _auto_class(source).from_pretrained(
            source.template, dtype=dtype, trust_remote_code=_trusted(source), attn_implementation=_KERNEL
        )
    else:
        shards = _shards(source, teacher, lora)
        model = _peft_model(source, shards).merge_and_unload() if lora else _model(source, shards, dtype)
    model.to(dtype)
    model.config.dtype = dtype
    with _own_file(folder / "generation_config.json"):
        model.save_pretrained(folder)
    _drop_attention(folder / "config.json")
    return _read_back(source, model, folder, dtype)


def _shards(source: Source, teacher: Path | None, lora: bool) -> Mapping[str, Sharded]:
    """The student's weights, or a teacher's: of a LoRA run an adapter, whose base is the student's."""
    student = Shards(source.folder / "actor", MODEL)
    if teacher is None:
        return student
    own = Shards(teacher, TEACHER, {name: (student[name].shape, student[name].dim) for name in student})
    return {**student, **own} if lora else own


def _write_adapter(source: Source, teacher: Path | None, folder: Path, dtype: torch.dtype) -> int:
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    model = _peft_model(source, _shards(source, teacher, lora=True))
    model.to(dtype)
    model.peft_config["default"].base_model_name_or_path = source.model.get("path")
    model.save_pretrained(folder, save_embedding_layers=False)  # verl adapts none; `auto` would ask the hub
    (folder / "config.json").unlink(missing_ok=True)  # of the base, which is elsewhere
    (folder / "README.md").unlink(missing_ok=True)
    return _compare(
        get_peft_model_state_dict(model, save_embedding_layers=False), load_file(folder / "adapter_model.safetensors")
    )


def _model(source: Source, shards: Mapping[str, Sharded], dtype: torch.dtype | None) -> PreTrainedModel:
    """The architecture of the checkpoint with its weights."""
    model = _empty(source)
    _fill(model, shards, dtype)
    return model


def _peft_model(source: Source, shards: Mapping[str, Sharded]) -> Any:
    """The same with a LoRA adapter, built as verl builds it, so that all names are the checkpoint's."""
    from peft import LoraConfig, PeftConfig, TaskType, get_peft_model

    said = source.model
    if path := said.get("lora_adapter_path"):
        if not Path(path).is_dir():
            raise CheckpointError(f"{path}, the adapter that the run began with, is gone: its settings are needed.")
        config = PeftConfig.from_pretrained(path)
        config.inference_mode = False
    else:
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=said["lora_rank"],
            lora_alpha=said["lora_alpha"],
            target_modules=said.get("target_modules"),
            target_parameters=said.get("target_parameters"),
            exclude_modules=said.get("exclude_modules"),
            bias="none",
        )
    if all("lora_" in name for name in shards):  # checkpoint.save_lora_only
        base = _auto_class(source).from_pretrained(
            said["path"], dtype=torch.float32, trust_remote_code=_trusted(source)
        )
        model = get_peft_model(base, config)
    else:
        model = get_peft_model(_empty(source), config, low_cpu_mem_usage=True)
    _fill(model, shards, torch.float32)
    return model


def _fill(model: Any, shards: Mapping[str, Sharded], dtype: torch.dtype | None) -> None:
    """Whole tensors in the place of the model's own; what is tied may be there once.

    Raises:
        CheckpointError: a weight is missing, or belongs to nothing.
    """
    wanted = model.state_dict(keep_vars=True)
    if strange := sorted(shards.keys() - wanted.keys()):
        raise CheckpointError(f"The checkpoint holds '{strange[0]}', which its own config does not know.")
    weights = {}
    for name in shards:
        saved, shape = shards[name].shape, tuple(wanted[name].shape)
        if saved != shape:
            raise CheckpointError(f"'{name}' has shape {saved} in the checkpoint and {shape} by its config.")
        tensor = shards[name].whole()
        weights[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if empty := sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta):
        raise CheckpointError(f"The checkpoint lacks '{empty[0]}' ({len(empty)} weights in all).")


# ---------------------------------------------------------------------- what is read back


def _read_back(source: Source, model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> int:
    """Load what was written, as a user would; the number of its weights.

    Raises:
        CheckpointError: a weight is missing or another.
    """
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder, trust_remote_code=_trusted(source))
    loaded, report = _auto_class(source).from_pretrained(
        folder, dtype=dtype, trust_remote_code=_trusted(source), output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, report.get(kind) or ())):
            raise CheckpointError(f"The exported model does not load as a whole: {kind} {', '.join(found[:3])}.")
    return _compare(model.state_dict(), loaded.state_dict())


def _compare(written: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> int:
    for name, tensor in written.items():
        if name not in found or not torch.equal(found[name].to(tensor.dtype), tensor):
            raise CheckpointError(f"The exported '{name}' is not what was written: is the disk full?")
    return sum(tensor.numel() for tensor in {t.data_ptr(): t for t in found.values()}.values())


# ---------------------------------------------------------------------- transformers


def _trusted(source: Source) -> bool:
    return bool(source.model.get("trust_remote_code"))


def _auto_class(source: Source) -> Any:
    """What loads the architecture: text alone, or text and images."""
    import transformers

    architectures = json.loads((source.template / "config.json").read_text()).get("architectures") or [""]
    several = architectures[0].endswith("ForConditionalGeneration")
    return transformers.AutoModelForImageTextToText if several else transformers.AutoModelForCausalLM


def _empty(source: Source) -> PreTrainedModel:
    """The model without weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.template, trust_remote_code=_trusted(source))
    with torch.device("meta"):
        return _auto_class(source).from_config(config, trust_remote_code=_trusted(source), attn_implementation=_KERNEL)


def _rollout_dtype(source: Source) -> str | None:
    said = source.config.get("actor_rollout_ref", {}).get("rollout", {}).get("dtype")
    return said if said in DTYPES else None


def _saved_dtype(source: Source) -> str:
    """That of the weights where they are a file already, whose config verl lets say bfloat16; else the config's."""
    if stored := sorted(source.template.glob("*.safetensors")):
        from safetensors import safe_open

        with safe_open(stored[0], "pt") as file:
            return str(file.get_tensor(next(iter(file.keys()))).dtype).removeprefix("torch.")
    config = json.loads((source.template / "config.json").read_text())
    said = config.get("dtype") or config.get("torch_dtype")
    return said if said in DTYPES else "bfloat16"


def _drop_attention(path: Path) -> None:
    """The attention kernel of the trainer is not the user's: the machine that loads the model may not have it."""
    said = json.loads(path.read_text())
    for key in ("attn_implementation", "_attn_implementation"):
        said.pop(key, None)
    write_whole(path, json.dumps(said, indent=2, sort_keys=True) + "\n")


@contextmanager
def _own_file(path: Path) -> Iterator[None]:
    """A file stays as it was, whatever is written in its place meanwhile."""
    before: bytes | None = path.read_bytes() if path.is_file() else None
    yield
    if before is not None:
        write_whole(path, before)
