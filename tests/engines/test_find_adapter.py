# SPDX-License-Identifier: Apache-2.0
"""An adapter's name: a shipped one, a module, a file; and the error for any other name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from refmoe.engines import adapters
from refmoe.engines.adapter import adapter_class
from refmoe.engines.adapters import SHIPPED
from refmoe.errors import InputError
from tests.command_line import Refmoe

GOLDEN = Path(__file__).parents[2] / "golden"
ADAPTER = """
from helper import NAME

class Adapter:
    name, version, dtypes, taps, abilities, policies = NAME, "1", ("float32",), ("logits",), (), {}
"""


def test_the_shipped_adapters_are_the_modules_with_a_class_adapter() -> None:
    folder = Path(adapters.__path__[0])
    having = [path.stem for path in folder.glob("*.py") if "\nclass Adapter:" in path.read_text()]
    assert sorted(having) == list(SHIPPED)


def test_an_adapter_is_found_by_name() -> None:
    assert adapter_class("transformers").__module__ == "refmoe.engines.adapters.transformers"


def test_an_adapter_is_found_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "by_module").mkdir()
    (tmp_path / "by_module/engine.py").write_text("class Adapter: pass")
    assert adapter_class("by_module.engine").__module__ == "by_module.engine"


def test_an_adapter_is_found_by_file_as_python_finds_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can import modules that lie beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    (tmp_path / "my-engine.py").write_text(ADAPTER)
    (tmp_path / "helper.py").write_text("NAME = 'beside it'")
    for name in ("my-engine.py", "./my-engine.py", str(tmp_path / "my-engine.py")):
        assert adapter_class(name).name == "beside it"  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "helper")


@pytest.mark.parametrize("name", ["nonesuch", "mixtral", "onnx_export"])
def test_a_name_without_a_dot_must_ship(name: str) -> None:
    with pytest.raises(InputError) as raised:
        adapter_class(name)
    for words in (f"adapter '{name}'", *SHIPPED, f"./{name}.py", "a dot", "PYTHONPATH=."):
        assert words in str(raised.value)


@pytest.mark.parametrize("name", ["tests.engines.nonesuch", "no_package.at_all"])
def test_a_module_that_is_not_there_is_sought_on_pythonpath(name: str) -> None:
    with pytest.raises(InputError, match=f"adapter '{name}': there is no module {name} .*PYTHONPATH=\\."):
        adapter_class(name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        adapter_class(f"{tmp_path}/mine.py")


def test_a_module_without_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("Adaptor = 3")
    for name in (f"{tmp_path}/mine.py", "tests.engines.running"):
        with pytest.raises(InputError, match=f"adapter '{name}': has no class Adapter"):
            adapter_class(name)


def test_the_engines_own_missing_package_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import no_such_engine")
    with pytest.raises(ModuleNotFoundError, match="no_such_engine"):
        adapter_class(f"{tmp_path}/mine.py")


def test_the_command_takes_a_file(refmoe: Refmoe, tmp_path: Path) -> None:
    """It needs no PYTHONPATH. Every case is skipped, because the adapter lacks abilities."""
    (tmp_path / "mine.py").write_text(ADAPTER)
    (tmp_path / "helper.py").write_text("NAME = 'beside it'")
    status, out, err = refmoe("conform", "--golden", GOLDEN, "--case", "top-1", "--adapter", tmp_path / "mine.py")
    assert status == 3, err
    assert "beside it 1" in out
    assert "skipped: needs decode" in out
