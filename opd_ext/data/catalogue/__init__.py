# SPDX-License-Identifier: Apache-2.0
"""The data sets that the recipes name.

One row of :data:`SETS` says all of one: ``opd data NAME`` follows it, and ``docs/data.md`` is made of it.

Where the names of columns come from:

* cards on the hub (``dataset_info``): DeepMath-103K, OpenMathReasoning, OpenThoughts-114k (its config ``metadata``),
  s1K-1.1, HMMT February 2025, MBPP (both configs), HumanEval, rStar-Coder, SciKnowEval;
* the files themselves: MATH-500, AIME 2024 and 2025, DAPO-Math-17k, the questions that SDPO released;
* programs that read them: AMC 2023 and GPQA in public evaluation code, OpenThoughts-math-30k in OPSD's training script
  (``problem``, ``solution``) and what followed it (``Answer``), LiveCodeBench in its own loader, HumanEval+ and MBPP+
  in EvalPlus;
* BOBA-200 has no documented columns. Those here are what AReaL's loader of fine-tuning data asks for, ``prompt`` and
  ``answer``, and ``solutions``, which the other files of its repository have.
"""

from pathlib import Path

from opd_ext.data.catalogue import maths, others
from opd_ext.data.published import Published
from opd_ext.errors import ConfigError, did_you_mean

SETS: dict[str, Published] = {published.name: published for published in (*maths.SETS, *others.SETS)}


def set_name(path: Path) -> str:
    """What the set in a file is called: the folder's name of ``aime24/test.parquet``, else the file's."""
    folder = path.parent.name
    return folder if of_folder(folder) and path.stem == "test" else path.stem


def of_folder(name: str) -> Published | None:
    """The set that `opd data` writes into a folder of that name, ``aime24`` or another wording's ``aime24-boxed``."""
    if name in SETS:
        return SETS[name]
    begun = [known for known in SETS if name.startswith((f"{known}-", f"{known}_"))]
    return SETS[max(begun, key=len)] if begun else None


def find(name: str) -> Published:
    """A set by its name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SETS:
        raise ConfigError(f"{name} is no data set of `opd data list`.{did_you_mean(name, SETS)}")
    return SETS[name]
