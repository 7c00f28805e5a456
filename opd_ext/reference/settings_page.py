# SPDX-License-Identifier: Apache-2.0
"""``docs/reference/settings.md``: every key, its type, default and meaning, who reads it, and what can be chosen."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from opd_ext.config.schema import OPDConfig
from opd_ext.context import context_names, get_context
from opd_ext.credit.annotate import annotator_names, get_annotator
from opd_ext.credit.credits import credit_names, get_credit
from opd_ext.divergence.divergences import divergence_names, get_divergence
from opd_ext.pipelines.eval.config import EvalConfig
from opd_ext.pipelines.settings import PipelineConfig, TracedConfig
from opd_ext.pipelines.ssd.config import SSDConfig
from opd_ext.pipelines.t3s.config import T3SConfig
from opd_ext.policy.shapings import get_policy, policy_names
from opd_ext.reference import fields
from opd_ext.reference.fields import PACKAGE
from opd_ext.reference.readers import package
from opd_ext.reference.text import names, wrap
from opd_ext.teacher import get_teacher, teacher_names

CHECKED_ONLY = {
    "opd.credit.annotator.args": "holds the options of an annotator of your own, which reads them",
    "opd.divergence.gradient": "states what `support` implies, and is refused where it contradicts it",
    "opd.policy.anchor": "states what `algorithm.rollout_correction.bypass_mode` decides, and must agree with it",
}
"""Keys that nothing in the package acts on, and why they are there."""

# Section -> noun, names, lookup, parameters that are no options. The options of a divergence are keys by other names.
_REGISTRIES = {
    "opd.teacher": ("weights", teacher_names, get_teacher, 0),
    "opd.context": ("kind", context_names, get_context, 0),
    "opd.divergence": ("kind", divergence_names, get_divergence, 2),
    "opd.credit": ("kind", credit_names, get_credit, 1),
    "opd.credit.annotator": ("kind", annotator_names, get_annotator, None),
    "opd.policy": ("gate", policy_names, get_policy, 1),
}
_DIVERGENCE_KEYS = {"entry_clip": "clip", "entry_clip_mode": "clip_mode", "support": "topk_by"}

_INTRO = """\
# Settings

Made by `python -m opd_ext.reference` from the dataclasses; do not edit.
Files are relative to `opd_ext/`.

A key is set on the command line, `opd train method=crisp opd.teacher.interval=30`, or in a YAML
file of your own. The default holds where neither the method, the recipe nor the scale sets the key;
`opd train method=... --cfg` prints what a run would have, the keys of verl (`data`,
`actor_rollout_ref`, `algorithm`, `trainer` and so on) included. *Read by* names the files that use
a value, those that a dataclass hands it on to included; checks, which read everything, are left out.
"""


@dataclass(frozen=True)
class Key:
    """One settings key.

    Attributes:
        path: as it is written on the command line.
        kind, name: the dataclass that defines the field, and the field.
        section: dataclass of the keys below it, if there are any; ``same_as``: prefix of the section that shows them.
    """

    path: str
    kind: type
    name: str
    type: Any
    meaning: str
    section: type | None = None
    same_as: str | None = None

    @property
    def readers(self) -> list[str]:
        """Files that use it, YAML files of the configuration included."""
        return package().readers(self.kind, self.name) + _yaml_readers(self.path)


@dataclass(frozen=True)
class Section:
    """The keys of one dataclass. ``prefix`` ends with a dot, or is empty; ``defaults`` is an instance."""

    prefix: str
    defaults: Any
    keys: list[Key]


def sections(defaults: Any, prefix: str, own: bool = False, seen: dict[type, str] | None = None) -> Iterator[Section]:
    """A dataclass and those inside it, each class once.

    Args:
        defaults: an instance with the default of every field.
        own: without the fields that its class inherits.
        seen: classes that have a section already, and its prefix.
    """
    kind, seen = type(defaults), {} if seen is None else seen
    seen[kind] = prefix
    said = fields.meanings(kind)
    keys, inner = [], []
    for name, annotation in fields.field_types(kind).items():
        owner = fields.owner_of(kind, name)
        if own and owner is not kind:
            continue
        sub, by_name = fields.nested(annotation)
        keys.append(Key(prefix + name, owner, name, annotation, said.get(name, ""), sub, seen.get(sub)))
        if sub is not None and sub not in seen and not issubclass(kind, sub):
            value = getattr(defaults, name)
            # What a place is where a method leaves it empty is no default of its keys.
            given = isinstance(value, sub) and not isinstance(defaults, OPDConfig)
            inner.append((value if given else sub(), f"{prefix}{name}.{'<name>.' if by_name else ''}"))
    yield Section(prefix, defaults, keys)
    for value, place in inner:
        if type(value) not in seen:
            yield from sections(value, place, any(base in seen for base in type(value).__mro__[1:]), seen)


def trainer_sections() -> list[Section]:
    """Everything under ``opd``."""
    return list(sections(OPDConfig(), "opd."))


def pipeline_sections() -> dict[str, list[Section]]:
    """Title -> the keys that all pipelines have, and those of each."""
    seen: dict[type, str] = {}
    return {
        "Keys of all pipelines": list(sections(PipelineConfig(), "", seen=seen)),
        "Keys of `opd sft` and `opd t3s`": list(sections(TracedConfig(), "", own=True, seen=seen)),
        "Keys of `opd ssd`": list(sections(SSDConfig(), "", own=True, seen=seen)),
        "Keys of `opd t3s`": list(sections(T3SConfig(), "", own=True, seen=seen)),
        "Keys of `opd eval`": list(sections(EvalConfig(), "", own=True, seen=seen)),
    }


def page() -> str:
    """The whole page."""
    lines = [_INTRO]
    for section in trainer_sections():
        title = section.prefix.rstrip(".")
        lines += [f"## `{title}`", "", _summary(type(section.defaults)), ""]
        lines += [*_entries(section), ""]
        if title in _REGISTRIES:
            lines += [*_choices(title), ""]
    lines += ["# Settings of the pipelines", "", _PIPELINES, ""]
    for title, parts in pipeline_sections().items():
        lines += [f"## {title}", ""]
        for section in parts:
            if section.prefix:
                lines += [f"### `{section.prefix.rstrip('.')}`", ""]
            lines += [_summary(type(section.defaults)), "", *_entries(section), ""]
    return "\n".join(lines).rstrip() + "\n"


_PIPELINES = wrap(
    "`opd sft`, `opd ssd`, `opd t3s` and `opd eval` are not under `opd`: their keys stand at the top, "
    "`opd ssd model=... train.steps=200`. `opd eval` has none that train. The defaults are those of the dataclasses; "
    "`opd_ext/config/pipelines` sets what a pipeline, a scale or a published preset needs."
)


def _summary(kind: type) -> str:
    """The first paragraph of a docstring, wrapped."""
    first = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0]
    return wrap(" ".join(_plain(first).split()))


def _plain(text: str) -> str:
    """Without the roles and double backticks of docstrings."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


# ---------------------------------------------------------------------- keys


def _entries(section: Section) -> Iterator[str]:
    shared = _from_yaml(section)
    for key in section.keys:
        yield from _entry(key, section, shared.get(key.name, getattr(section.defaults, key.name)))


def _from_yaml(section: Section) -> dict[str, Any]:
    """What ``config/opd.yaml`` sets beyond the dataclass, as it is written there."""
    if not section.prefix.startswith("opd."):
        return {}
    found: Any = _opd_yaml()
    for part in section.prefix.split(".")[:-1]:
        found = (found or {}).get(part)
    return found or {}


@cache
def _opd_yaml() -> dict[str, Any]:
    return yaml.safe_load((PACKAGE / "config" / "opd.yaml").read_text(encoding="utf-8"))


def _entry(key: Key, section: Section, default: Any) -> Iterator[str]:
    meaning = re.sub(r", \.\.\.$", " and so on", _plain(key.meaning)).rstrip(".")
    if key.section is not None:
        keys = "its keys are below"
        if issubclass(type(section.defaults), key.section):
            keys = f"keys as `{section.prefix}kind` to `.temperature`"
        elif key.same_as:
            keys = f"keys as `{key.same_as.rstrip('.')}`"
        yield wrap(f"`{key.path}` (mapping): {meaning}; {keys}.", "- ")
        return
    shown = "set by the scale" if default == "???" else f"default `{fields.value_words(default)}`"
    yield wrap(f"`{key.path}` ({fields.type_words(key.type)}, {shown}): {meaning}.", "- ")
    if key.path in CHECKED_ONLY:
        yield wrap(f"Read by checks alone: it {CHECKED_ONLY[key.path]}.", "  ")
    else:
        yield wrap(f"*Read by* {names(key.readers)}.", "  ")


def _yaml_readers(path: str) -> list[str]:
    """Files of the configuration that interpolate a key; of several in one folder, the folder."""
    pipelines = PACKAGE / "config" / "pipelines"
    root = PACKAGE / "config" if path.startswith("opd.") else pipelines
    found: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.yaml")):
        in_pipelines = file.is_relative_to(pipelines)
        if in_pipelines != (root == pipelines) or f"${{{path}}}" not in file.read_text(encoding="utf-8"):
            continue
        found.setdefault(str(file.parent.relative_to(PACKAGE)), []).append(file.name)
    return [f"{folder}/{files[0] if len(files) == 1 else ''}" for folder, files in found.items()]


# ---------------------------------------------------------------------- choices


def _choices(title: str) -> Iterator[str]:
    noun, registered, get, skip = _REGISTRIES[title]
    _import_worlds()
    yield f"Registered choices of `{title}.{noun}`:"
    yield ""
    if title == "opd.policy":
        yield wrap("`none`: advantages stay as verl makes them.", "- ")
    shown = [name for name in registered() if not (title == "opd.divergence" and name.startswith("topk_"))]
    for name in shown:
        entry = get(name)
        if entry.__module__.partition(".")[0] != "opd_ext":
            continue  # of a module that somebody else has imported into this process
        said = _plain(" ".join(inspect.cleandoc(inspect.getdoc(entry) or "").split("\n\n")[0].split()))
        yield wrap(f"`{name}` (`{fields.source_file(entry)}`): {said}{_options(title, entry, skip)}", "- ")


def _options(title: str, entry: Any, skip: int | None) -> str:
    """What a registered choice takes, with defaults and, where its docstring has them, meanings."""
    if skip is None:
        return ""
    if inspect.isclass(entry):
        given = [(f.name, f.default) for f in dataclasses.fields(entry) if f.name != "tokenizer"]
    else:
        given = [(p.name, p.default) for p in list(inspect.signature(entry).parameters.values())[skip:]]
    if not given:
        return ""
    if title == "opd.divergence":
        return " Takes " + ", ".join(f"`{_DIVERGENCE_KEYS.get(name, name)}`" for name, _ in given) + "."
    said = fields.described_parameters(inspect.getdoc(entry))
    parts = []
    for name, default in given:
        meaning = f": {_plain(said[name]).rstrip('.')}" if name in said else ""
        parts.append(f"`{name}` (default `{fields.value_words(default)}`){meaning}")
    return f" Options: {'; '.join(parts)}."


@cache
def _import_worlds() -> None:
    """What the worlds register, as a run in such a world does."""
    for file in sorted((PACKAGE / "config" / "world").glob("*.yaml")):
        if library := yaml.safe_load(file.read_text(encoding="utf-8")).get("opd", {}).get("world_lib"):
            importlib.import_module(library)
