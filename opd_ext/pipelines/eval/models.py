# SPDX-License-Identifier: Apache-2.0
"""What somebody who says ``opd eval X`` means by X: weights that vLLM loads, and a name for tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_ext.checkpoints.export import RECORD, export
from opd_ext.checkpoints.layout import CheckpointError
from opd_ext.checkpoints.source import Source, find
from opd_ext.errors import ConfigError
from opd_ext.pipelines.problems import fingerprint


@dataclass(frozen=True)
class Evaluated:
    """A model.

    Attributes:
        name: for tables.
        path: a Hugging Face folder, which an export has still to make, or a hub id.
        source: the checkpoint of a run that it is; None for a model.
    """

    name: str
    path: str
    source: Source | None = None

    @property
    def readable(self) -> str:
        """Where its config and tokenizer can be read, before and after an export."""
        return str(self.source.template) if self.source else self.path

    @property
    def config(self) -> dict[str, Any]:
        """Of the run of `opd train` that it is of; empty for any other model."""
        found = self.source.config if self.source else {}
        return found if "opd" in found else {}

    @property
    def identity(self) -> str:
        """What its weights are, before and after an export."""
        if self.source and not self.source.fine_tuned:
            return fingerprint(str(self.source.folder / "actor"), suffixes=(".pt",))
        return fingerprint(self.path)

    def have(self) -> None:
        """Export the checkpoint, if it is one that was not exported so far.

        Raises:
            CheckpointError: it cannot be.
        """
        if self.source and not self.source.fine_tuned and not (Path(self.path) / RECORD).is_file():
            export(self.source.run, str(self.source.step), Path(self.path))


def evaluated(key: str, value: str, step: str | None) -> Evaluated:
    """The model that ``value`` names.

    Args:
        key: the setting, for the sentence of a refusal.
        step: of a run.

    Raises:
        ConfigError: there is no such model, run or step.
    """
    folder = Path(value).expanduser()
    is_model = (folder / "config.json").is_file()
    if is_model or not folder.exists():
        if step is not None:
            raise ConfigError(f"{key}={value} is no run folder and has no steps: leave the step out.")
        if not is_model and (value.startswith(("/", ".", "~")) or value.count("/") != 1):
            raise ConfigError(f"{key}={value} is neither a run folder, nor a folder with a model, nor a hub id.")
        return Evaluated(folder.name if is_model else value, str(folder.absolute()) if is_model else value)
    try:
        source = find(folder.absolute(), step)
    except CheckpointError as error:
        raise ConfigError(f"{key}={value} is no model, and no run that could become one: {error}") from None
    path = source.template if source.fine_tuned else source.run / "export" / f"step_{source.step}"
    return Evaluated(f"{source.run.name}, step {source.step}", str(path), source)
