# SPDX-License-Identifier: Apache-2.0
"""A Python file of the user's is executed, and nothing appears beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from refmoe.errors import InputError
from refmoe.files.python_file import module_from_file


def test_a_file_is_executed_and_no_bytecode_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python keeps the bytecode of what it imports, unless an environment forbids it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    place = tmp_path / "router.py"
    for value in (1, 2):
        place.write_text(f"value = {value}\nplace = __file__\n")
        module = module_from_file(place, "refmoe_test_router", "a Python file with a router")
        assert (module.value, module.place) == (value, str(place))
    assert [*tmp_path.iterdir()] == [place]
    assert sys.modules.pop("refmoe_test_router") is module


def test_what_a_file_raises_is_raised(tmp_path: Path) -> None:
    place = tmp_path / "router.py"
    place.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        module_from_file(place, "refmoe_test_router", "a Python file with a router")
    with pytest.raises(InputError, match="no such file"):
        module_from_file(tmp_path / "gone.py", "refmoe_test_router", "a Python file with a router")
