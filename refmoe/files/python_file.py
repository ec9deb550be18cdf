# SPDX-License-Identifier: Apache-2.0
"""A Python file of the user's, executed as a module. Only commands that say so in their help do this."""

from __future__ import annotations

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from refmoe.files.reading import read_bytes


class SourceLoader(SourceFileLoader):
    """Reads a file, and writes no bytecode: nothing appears in a folder of the user's."""

    def set_data(self, path: Any, data: Any, *, _mode: int = 0) -> None:
        pass


LARGEST_PROGRAM = 4 << 20
"""The most bytes of a file that is executed. Python takes memory, and time, for a file of any size."""


def module_from_file(path: Path, name: str, expected: str) -> ModuleType:
    """Execute an ordinary file whose name ends in ``.py``, with the user's rights.

    name: of the module in `sys.modules`   expected: the kind of file, as "a Python file with a router"

    Raises InputError for a file that cannot be read or is too large, and whatever the file itself raises.
    """
    read_bytes(path, expected, LARGEST_PROGRAM)
    spec = spec_from_file_location(name, path, loader=SourceLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
