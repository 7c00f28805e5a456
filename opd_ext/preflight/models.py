# SPDX-License-Identifier: Apache-2.0
"""What a run needs of its models: a config, a tokenizer with a chat template, weights that arrive at vLLM."""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd_ext.config import checks
from opd_ext.config.architecture import check_architecture, check_offload, stateful_layer
from opd_ext.config.schema import OPDConfig
from opd_ext.config.sequence_parallel import check_shared, sequence_parallel
from opd_ext.context.sequence import render
from opd_ext.errors import ConfigError
from opd_ext.plan.shapes import model_shape
from opd_ext.preflight.findings import Findings, refuse
from opd_ext.tokens.byte_spans import Foreign, Reader
from opd_ext.tokens.ends import stop_ids

STUDENT = "actor_rollout_ref.model.path"
MiB = 2**20
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_HUB = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def check_models(config: DictConfig, opd: OPDConfig, starting: bool, findings: Findings) -> Any:
    """The student's folder and the teacher's, each on its own and against the other; returns the student's tokenizer.

    None where the student is not on this machine. A run that starts must find its models here or at the hub.

    Raises:
        ConfigError: one sentence.
    """
    model = config.actor_rollout_ref.model
    trusted = bool(model.get("trust_remote_code"))
    student = find_model(STUDENT, model.path, starting)
    if student is None:
        if opd.distils and (shape := model_shape(model.path)) is not None:
            check_offload(shape.tied, model, f"{STUDENT}={model.path}")
        findings.fact("model files", "not on this machine: not looked at")
        return None
    found = check_config(STUDENT, student, config, findings)
    if any(view.opd.teacher.path is None for view in opd.teacher_servers.values()):
        check_length(found, f"{STUDENT}={student}", "opd.max_pair_length", config)
    if opd.distils:  # verl's own loss finds logits both times
        tied = bool(getattr(found.get_text_config(), "tie_word_embeddings", False))
        check_offload(tied, model, f"{STUDENT}={student}")
    if sizes := check_weights(STUDENT, student):
        check_adapters(model, sizes)
        largest = max(sizes, key=sizes.__getitem__)
        check_bucket(config, opd, largest, sizes[largest])
    tokenizer = load_tokenizer(STUDENT, model.get("tokenizer_path") or student, trusted)
    if model.custom_chat_template:
        tokenizer.chat_template = model.custom_chat_template
    check_template(tokenizer, config, opd, findings)
    foreign = checks.external_models(opd, foreign=True).values()
    for key, path in checks.external_models(opd).items():
        if (teacher := find_model(key, path, starting)) is None:
            continue
        backends = {view.opd.teacher.backend for view in opd.views if view.opd.teacher.path == path}
        described = check_config(key, teacher, config, findings, served=backends == {"server"})
        for view in opd.views:
            if view.opd.teacher.path == path and view.opd.teacher.backend == "server":
                check_heads(found, described, key, view.opd)
        headers = check_weights(key, teacher)
        if "vllm" in backends:
            check_length(described, f"{key}={teacher}", "opd.max_pair_length", config)
            if trusted and getattr(described, "auto_map", None):
                raise ConfigError(
                    f"{key}={teacher} is built by code of its own, in which backend=vllm does not look for the "
                    "projection: take backend=engine, the teacher beside the student."
                )
            if not headers and Path(teacher).is_dir():
                raise ConfigError(
                    f"{key}={teacher} has no safetensors, of which backend=vllm reads the projection alone: save the "
                    "model in that format (save_pretrained does)."
                )
        teachers = load_tokenizer(key, teacher, trusted)
        if path not in foreign:
            compare_ends(tokenizer, teachers, student, teacher, findings)
            continue
        check_foreign(tokenizer, stop_ids(student, tokenizer), key, teachers, findings)
    checks.check_vocabularies(config, opd)
    return tokenizer


def check_heads(student: Any, teacher: Any, key: str, opd: OPDConfig) -> None:
    """Projections of both have the rows that a divergence on the teacher's likeliest tokens rests on.

    Models of one tokenizer may be padded differently. Beside the student both are cut to the rows that they have in
    common, of which a server's log-probs know nothing; on the renormalised support it makes no difference.

    Args:
        student, teacher: configs of transformers.
        opd: as a run with this teacher alone would have it.

    Raises:
        ConfigError: one sentence.
    """
    own, theirs = (found.get_text_config().vocab_size for found in (student, teacher))
    for term in opd.divergence.compared:
        if term.support != "topk":
            continue
        if (term.k or 0) > theirs:
            raise ConfigError(
                f"opd.divergence.k={term.k} is more than the {theirs} tokens that {key} has: lower it, or set "
                "opd.teacher.backend=engine and support=full."
            )
        if own != theirs and term.tail != "renorm":
            raise ConfigError(
                f"{key} has {theirs} rows of logits and the student {own}, and opd.teacher.backend=server with "
                f"opd.divergence.tail={term.tail} cannot tell how likely the others are: set tail=renorm, or "
                "backend=vllm."
            )


def check_length(found: Any, model: str, key: str, config: DictConfig) -> None:
    """vLLM is not asked for longer sequences than the model has positions for: verl would start no server.

    Raises:
        ConfigError: it is, or the model does not say.
    """
    from opd_ext.bridge.inputs import longest_sequence

    wanted = OmegaConf.select(config, key)
    changed = (config.actor_rollout_ref.model.override_config or {}).get("max_position_embeddings")
    try:
        longest = changed or longest_sequence(found)
    except ValueError:
        raise ConfigError(
            f"{model} names no max_position_embeddings, which verl asks for: add it to its config.json."
        ) from None
    if wanted is not None and wanted > longest:
        raise ConfigError(
            f"{key}={wanted} is more than the {longest} positions of {model}: shorten prompts or responses, or raise "
            "the model's max_position_embeddings, with its rope scaling, if it was trained for that."
        )


def check_adapters(model: DictConfig, tensors: Iterable[str]) -> None:
    """Every module that an adapter is asked for is one of the model's.

    Raises:
        ConfigError: naming the first that is not.
    """
    names = model.target_modules
    if model.lora_rank == 0 or names is None or names == "all-linear" or isinstance(names, str):
        return  # a single text is a regular expression
    modules = {tensor.rpartition(".")[0].rpartition(".")[2] for tensor in tensors}
    for name in names:
        if name.rpartition(".")[2] not in modules:
            listed = ", ".join(sorted(modules))
            raise ConfigError(
                f"actor_rollout_ref.model.target_modules names {name}, and the model has no such module: choose of "
                f"{listed}, or all-linear."
            )


def find_model(key: str, path: str, starting: bool) -> str | None:
    """A folder of this machine, or the name of a hub model whose config is at hand; None: neither, for a plan.

    Raises:
        ConfigError: a file, or a hub model that a run cannot get.
    """
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser())
    if Path(path).expanduser().is_file():
        raise ConfigError(f"{key}={path} is a file: name the folder that holds it.")
    if not _HUB.fullmatch(path):
        return None
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return path
    if not starting:
        return None
    try:
        get_hf_file_metadata(hf_hub_url(path, "config.json"), timeout=5)
    except Exception as error:
        raise refuse(f"{key}={path} is no folder here, and no model that the Hugging Face hub gives", error) from None
    return path


def check_config(key: str, path: str, config: DictConfig, findings: Findings, served: bool = False) -> Any:
    """The architecture is one whose logits the loss can compute; layers that forbid packing are told.

    What is ``served`` is vLLM's, and only has to have a config.

    Returns:
        The config, of transformers.
    """
    from transformers import AutoConfig

    from opd_ext.bridge.empty_model import fault

    model = config.actor_rollout_ref.model
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise ConfigError(f"{key}={path} holds no config.json: name a folder of transformers' format.")
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=bool(model.get("trust_remote_code")))
    except Exception as error:
        raise refuse(f"{key}={path} has no config.json that transformers can read", error) from None
    served_by = "distillation.teacher_models.teacher_model.inference" if served else "actor_rollout_ref.rollout"
    if served or key == STUDENT:
        check_length(found, f"{key}={path}", f"{served_by}.max_model_len", config)
    if served:
        return found
    check_architecture(found, f"{key}={path}")
    check_shared(found, f"{key}={path}", sequence_parallel(config.actor_rollout_ref.actor))
    if why := fault(found, (model.override_config or {}).get("attn_implementation", "flash_attention_2")):
        raise ConfigError(f"{key}={path} ({found.model_type}) {why}, or choose another model.")
    if kind := stateful_layer(found):
        findings.note(
            f"{key}={path} has {kind} layers, which would carry one sequence of a pack into the next: every sequence "
            "takes a pass of its own, which is exact and slower."
        )
    return found


def load_tokenizer(key: str, path: str, trusted: bool) -> Any:
    """The tokenizer of a model folder; ConfigError where there is none, or an empty one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)
    except Exception as error:
        raise refuse(f"{key}={path} has no tokenizer that loads: copy its files beside the weights", error) from None
    if len(tokenizer) < 2:  # transformers makes an empty one of a folder without tokenizer files
        raise ConfigError(f"{key}={path} has no tokenizer: copy tokenizer.json and tokenizer_config.json beside it.")
    tokenizer.model_max_length = sys.maxsize  # nothing is cut here, and transformers need not warn of what is long
    return tokenizer


def check_weights(key: str, path: str) -> dict[str, int]:
    """Every file of the weights is there and whole; returns the entries of each tensor, as far as headers tell."""
    folder = Path(path)
    if not folder.is_dir():
        return {}
    for index in folder.glob("*.index.json"):
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise refuse(f"{key}: {index} is no index of weights", error) from None
        if missing := sorted(name for name in named if not (folder / name).exists()):
            raise ConfigError(f"{key}={path} misses {len(missing)} of {len(named)} weight files, first {missing[0]}.")
    files = [file for pattern in _WEIGHTS for file in sorted(folder.glob(pattern))]
    if not files:
        raise ConfigError(f"{key}={path} holds no weights (*.safetensors): copy them beside config.json.")
    if empty := next((file for file in files if file.stat().st_size == 0), None):
        raise ConfigError(f"{key}: {empty} is empty: copy it again.")
    sizes = dict(_tensors(key, files))
    if "lm_head.bias" in sizes:
        raise ConfigError(
            f"{key}={path} has a bias in its lm_head, which the chunked head does not add: choose another."
        )
    return sizes


def _tensors(key: str, files: list[Path]) -> Iterator[tuple[str, int]]:
    from safetensors import safe_open

    for file in files:
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118 (no mapping)
                    yield name, math.prod(content.get_slice(name).get_shape())
        except Exception as error:
            raise refuse(f"{key}: {file} is no whole file of weights: copy it again", error) from None


def check_bucket(config: DictConfig, opd: OPDConfig, name: str, entries: int) -> None:
    """Through shared memory, as on a CPU, a weight must fit one transfer bucket; between GPUs verl sends it apart."""
    key = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
    bucket = config.actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes
    size = entries * _BYTES[config.actor_rollout_ref.actor.fsdp_config.model_dtype]
    if opd.device == "cpu" and size > bucket * MiB:
        raise ConfigError(
            f"{key}={bucket} cannot hold {name}, which has {size / MiB:.0f} MiB: set it to {-(-size // MiB)} or more."
        )


def check_template(tokenizer: Any, config: DictConfig, opd: OPDConfig, findings: Findings) -> None:
    """There is a chat template, it can render a question, and it knows the switch that the settings turn."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{STUDENT}={config.actor_rollout_ref.model.path} has no chat template, as base models have none: set "
            "actor_rollout_ref.model.custom_chat_template."
        )
    question = [{"role": "user", "content": "1 + 1 = ?"}]
    given = dict(config.data.apply_chat_template_kwargs or {})
    try:
        off, on = (render(tokenizer, question, {**given, "enable_thinking": thinks}) for thinks in (False, True))
    except Exception as error:
        raise refuse(f"{STUDENT}: the chat template cannot render a question", error) from None
    if question[0]["content"] not in tokenizer.decode(off):
        raise ConfigError(
            f"{STUDENT}: the chat template renders a question without its text, so that every prompt would be the "
            "same: correct custom_chat_template, or the tokenizer's."
        )
    switch = "" if off != on else "; enable_thinking changes nothing in its template"
    findings.fact("tokenizer", f"{len(tokenizer):,} tokens, a turn ends with {tokenizer.eos_token}{switch}")
    told = any(view.opd.context.args.get("thinking") is not None for view in opd.views)
    if off == on and (told or given.get("enable_thinking") is False):
        findings.note("The chat template has no enable_thinking: what the settings say of thinking changes nothing.")


def check_foreign(student: Any, stops: list[int], key: str, teacher: Any, findings: Findings) -> None:
    """A teacher of another tokenizer reads every text that the student's tokens write, and answers in turns.

    Raises:
        ConfigError: one sentence.
    """
    apart = Foreign(Reader(student, "The student"), Reader(teacher, key), tuple(stops))
    if not teacher.chat_template:
        raise ConfigError(f"{key} has no chat template, by which it would be asked: add chat_template.jinja to it.")
    apart.check()
    end = teacher.convert_ids_to_tokens(apart.teacher.end)
    findings.fact("teacher's tokens", f"its own, {len(teacher):,}; compared by spans of text, a turn ends with {end}")


def compare_ends(student: Any, teacher: Any, student_path: str, teacher_path: str, findings: Findings) -> None:
    """A teacher that ends its turns otherwise than the student teaches it not to end, or to end elsewhere."""
    ends = [_ends(tokenizer, path) for tokenizer, path in ((student, student_path), (teacher, teacher_path))]
    if ends[0] and ends[1] and not ends[0] & ends[1]:
        shown = [
            ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(ids))))
            for tokenizer, ids in zip((student, teacher), ends, strict=True)
        ]
        findings.note(
            f"The student ends with {shown[0]}, the teacher with {shown[1]}: responses may grow until they are cut; "
            "choose a teacher that ends as the student does."
        )


def _ends(tokenizer: Any, path: str) -> set[int]:
    file = Path(path) / "generation_config.json"
    try:
        found = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    except ValueError:
        found = None
    found = tokenizer.eos_token_id if found is None else found
    return set(found) if isinstance(found, list) else {found} - {None}
