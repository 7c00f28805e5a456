# SPDX-License-Identifier: Apache-2.0
"""Cut the miniature world's training problems by family, one file for each specialist.

python examples/several_teachers/families.py ~/.cache/opd_ext/tinymath runs/specialists
"""

import sys
from pathlib import Path

import pandas as pd

FAMILIES = {"sums": (1, 2, 4), "products": (3,), "chains": (5,)}
"""Difficulties of the miniature world: sums and differences of two, three and four digits; products; two operations."""


def main(world: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        rows = pd.read_parquet(world / f"{split}.parquet")
        difficulty = rows["extra_info"].map(lambda info: info["difficulty"])
        for family, levels in FAMILIES.items():
            rows[difficulty.isin(levels)].to_parquet(out / f"{family}-{split}.parquet", index=False)
    print(f"{out}: {', '.join(FAMILIES)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).expanduser(), Path(sys.argv[2]))
