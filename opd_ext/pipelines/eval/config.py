# SPDX-License-Identifier: Apache-2.0
"""The settings of an evaluation."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from opd_ext.data.catalogue import SETS, set_name
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
    sets: list[str] = field(default_factory=list)  # names of parquet files in data_dir, or paths of such files
    data_dir: str = "."  # where the files lie that sets names without a path
    count: int | None = None  # the first so many problems of every set; null: all
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # how a problem is answered, and how often
    samples: dict[str, int] = field(default_factory=dict)  # set -> samples per problem, where not sampling.n
    system: str | None = None  # a system message put before the conversation
    template: dict[str, Any] = field(default_factory=dict)  # options of the chat template
    graders: dict[str, RewardConfig] = field(default_factory=dict)
    """Data source, or a pattern of sources -> its grader, the first that fits; `reward.path` stands above them all."""

    def check(self) -> None:
        super().check()
        if not self.sets:
            raise ConfigError("sets=[] must name what is evaluated on: --on NAME, or --on FILE.parquet.")
        positive("sampling.n", self.sampling.n)
        check_decoding("sampling", self.sampling)
        positive("sampling.max_tokens", self.sampling.max_tokens)
        if self.count is not None:
            positive("count", self.count)
        names = [set_name(self._file(entry)) for entry in self.sets]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"sets has {twice[0]} twice: give the files different names.")
        for name, n in self.samples.items():
            positive(f"samples.{name}", n)
        if self.against == self.model and self.against_step == self.step:
            raise ConfigError(f"against={self.against} is the model itself: name another one, or another step.")

    @property
    def files(self) -> dict[str, Path]:
        """Name of a set -> its file."""
        files = map(self._file, self.sets)
        return {set_name(file): file for file in files}

    def _file(self, entry: str) -> Path:
        """A path, or a name in ``data_dir``: ``aime24.parquet`` or, as `opd data` has it, ``aime24/test.parquet``."""
        path, folder = Path(entry).expanduser(), Path(self.data_dir).expanduser().absolute()
        if path.suffix:
            return path.absolute()
        of_set, alone = folder / entry / "test.parquet", folder / f"{entry}.parquet"
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
        for pattern, grader in self.graders.items():
            if fnmatchcase(source, pattern):
                return grader
        raise ConfigError(f"Nothing says how {source} is graded: set reward.path, or graders.{source}.path.")

    def check_files(self) -> None:
        """Raises ConfigError for a set whose file is not there, and says how it is made."""
        for name, file in self.files.items():
            if file.is_file():
                continue
            folder = Path(self.data_dir).expanduser()
            there = sorted(set_name(path) for path in (*folder.glob("*.parquet"), *folder.glob("*/test.parquet")))
            listed = f" There are {', '.join(there)}.{did_you_mean(name, there)}" if there else ""
            known = name if name in SETS else "list"
            raise ConfigError(
                f"{file} is not there, so nothing can be evaluated on {name}: make it (`opd data {known}`), or name a "
                f"parquet file with its path.{listed}"
            )
