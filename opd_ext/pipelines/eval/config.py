# SPDX-License-Identifier: Apache-2.0
"""The settings of an evaluation."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from opd_ext.data.catalogue import SETS, of_folder, set_name
from opd_ext.errors import ConfigError, did_you_mean, positive
from opd_ext.pipelines.settings import RewardConfig, SampledConfig, check_decoding
from opd_ext.sampling.config import SamplingConfig


@dataclass
class EvalConfig(SampledConfig):
    """Problems, and how models answer them."""

    model: str | None = None  # what is evaluated: a run folder, a folder with a model, or its hub id
    step: str | None = None  # of a run: a step that was saved, or best; null: the newest
    against: str | None = None  # another model that it is compared with, problem by problem
    against_step: str | None = None  # as step
    sets: list[str] = field(default_factory=list)
    """Names in data_dir, of sets (`sciknoweval`), their splits (`sciknoweval/physics_test`) or parquet files; or paths
    of such files."""
    data_dir: str = "."  # where the files lie that sets names without a path
    count: int | None = None  # the first so many problems of every set; null: all
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # how a problem is answered, and how often
    samples: dict[str, int] = field(default_factory=dict)  # set -> samples per problem, where not sampling.n
    system: str | None = None  # a system message put before the conversation
    template: dict[str, Any] = field(default_factory=dict)  # options of the chat template
    graders: dict[str, RewardConfig] = field(default_factory=dict)
    """Data source, or a pattern of sources -> its grader: the source itself, else the first pattern that fits;
    `reward.path` stands above them all."""

    def check(self) -> None:
        super().check()
        if not self.sets:
            raise ConfigError("sets=[] must name what is evaluated on: --on NAME, or --on FILE.parquet.")
        positive("sampling.n", self.sampling.n)
        check_decoding("sampling", self.sampling)
        positive("sampling.max_tokens", self.sampling.max_tokens)
        if self.count is not None:
            positive("count", self.count)
        names = [self._name(entry) for entry in self.sets]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"sets has {twice[0]} twice: give the files different names.")
        for name, n in self.samples.items():
            positive(f"samples.{name}", n)
        if self.against == self.model and self.against_step == self.step:
            raise ConfigError(f"against={self.against} is the model itself: name another one, or another step.")

    @property
    def files(self) -> dict[str, Path]:
        """Name of a set -> its file."""
        return {self._name(entry): self._file(entry) for entry in self.sets}

    def _name(self, entry: str) -> str:
        bare = Path(entry).name == entry and not Path(entry).suffix
        return entry if bare else set_name(self._file(entry))

    def _file(self, entry: str) -> Path:
        """A path, or a name in ``data_dir``: ``aime24.parquet`` or, as `opd data` has it, ``aime24/test.parquet``."""
        path, folder = Path(entry).expanduser(), Path(self.data_dir).expanduser().absolute()
        if path.suffix:
            return path.absolute()
        published, alone = of_folder(entry), folder / f"{entry}.parquet"
        of_set = folder / entry / f"{published.evaluated if published else 'test'}.parquet"
        return of_set if of_set.is_file() and not alone.is_file() else alone

    def samples_of(self, name: str) -> int:
        """Samples per problem of a set."""
        return self.samples.get(name, self.sampling.n)

    def grader_of(self, source: str) -> RewardConfig:
        """The grader of the rows of a data source.

        Raises:
            ConfigError: nothing says which.
        """
        if self.reward.path:
            return self.reward
        if source in self.graders:
            return self.graders[source]
        for pattern, grader in self.graders.items():
            if fnmatchcase(source, pattern):
                return grader
        raise ConfigError(f"Nothing says how {source} is graded: set reward.path, or graders.{source}.path.")

    def check_files(self) -> None:
        """Raises ConfigError for a set whose file is not there, and says how it is made."""
        folder = Path(self.data_dir).expanduser()
        for entry, (name, file) in zip(self.sets, self.files.items(), strict=True):
            if file.is_file():
                continue
            if splits := sorted(path.stem for path in (folder / entry).glob("*.parquet")):
                raise ConfigError(
                    f"{entry} has no split that is evaluated on by its name alone: name one, "
                    f"{' or '.join(f'--on {entry}/{split}' for split in splits)}."
                )
            made = [path for path in folder.glob("*/*.parquet") if of_folder(path.parent.name)]
            there = sorted({*map(set_name, folder.glob("*.parquet")), *map(_called, made)})
            listed = f" There are {', '.join(there)}.{did_you_mean(name, there)}" if there else ""
            raise ConfigError(
                f"{file} is not there, so nothing can be evaluated on {name}: make it (`{_maker(entry)}`), or name a "
                f"parquet file with its path.{listed}"
            )


def _maker(entry: str) -> str:
    """The command that makes what was named, if one does."""
    name, _, split = entry.partition("/")
    if name not in SETS:
        return "opd data list"
    known = any(each.name == split for each in SETS[name].splits)
    return f"opd data {name}{f' --split {split}' if known else ''}"


def _called(file: Path) -> str:
    """How a split that `opd data` has made is named: by its set alone, or with it."""
    published, folder = of_folder(file.parent.name), file.parent.name
    return folder if published and file.stem == published.evaluated else f"{folder}/{file.stem}"
