# SPDX-License-Identifier: Apache-2.0
"""A grader by its path, as verl finds it, without verl: importing that takes seconds."""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def load_function(path: str, name: str) -> Callable[..., Any]:
    """The function ``name`` of a module.

    Args:
        path: ``pkg://package.module``, ``file://FILE`` or a Python file.

    Raises:
        Exception: whatever the module raises when it is run; ``OSError`` and ``ImportError`` where there is none,
            ``AttributeError`` where it has no such function.
    """
    function: Callable[..., Any] = getattr(_load_module(path), name)
    return function


def _load_module(path: str) -> ModuleType:
    if path.startswith("pkg://"):
        return importlib.import_module(path.removeprefix("pkg://").replace("/", "."))
    file = Path(path.removeprefix("file://"))
    spec = importlib.util.spec_from_file_location(f"custom_module_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
