# SPDX-License-Identifier: Apache-2.0
"""Names that programs use without importing them, as LiveCodeBench's harness lets them.

It puts these imports before every program. Here a program runs as it is, and again with the names that it uses if it
stops at one that is missing: none of its own is hidden, and nothing is imported for programs that do without.
"""

import builtins
import re
from functools import cache
from importlib import import_module

_MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
).split()


def names_in(program: str) -> dict[str, str]:
    """{name: module} of the words in a program that LiveCodeBench's imports define; a module stands for itself."""
    table = _table()
    return {word: table[word] for word in sorted(set(re.findall(r"[A-Za-z_]\w*", program))) if word in table}


@cache
def _table() -> dict[str, str]:
    found: dict[str, str] = {}
    for module in (*_MODULES, "typing"):
        members = import_module(module)
        public = getattr(members, "__all__", None) or [name for name in vars(members) if not name.startswith("_")]
        found |= dict.fromkeys(public, module)
    for name in dir(builtins):
        found.pop(name, None)
    return found | {module: module for module in _MODULES}
