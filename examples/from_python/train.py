# SPDX-License-Identifier: Apache-2.0
"""The whole stack from a script: what `opd train` does, called as a function.

opd data tinymath                            # once: the miniature world
python examples/from_python/train.py         # CRISP on it, then what came of it
python examples/from_python/train.py trainer.total_training_steps=10 opd.teacher.interval=5
"""

import sys

from opd_ext.errors import ConfigError
from opd_ext.files import read_jsonl
from opd_ext.train import run


def main(overrides: list[str]) -> int:
    """Train, and say where the run lies and how it ended; returns the exit status (2: refused settings)."""
    try:
        folder = run(["method=crisp", "scale=cpu_tiny", *overrides])
    except ConfigError as error:  # one sentence: which key is wrong and what it may be
        print(f"refused: {error}", file=sys.stderr)
        return 2
    *_, last = read_jsonl(folder / "metrics.jsonl")
    print(f"{folder} holds {last['step']} steps; `opd report {folder}` prints its table")
    return 0


# A process that Python spawns imports this file anew; without the condition it would start a run of its own.
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
