# SPDX-License-Identifier: Apache-2.0
"""Options and environments of adapters: declared once, listed, refused in one sentence, installed by one command."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

from refmoe.engines.adapter import adapter_class
from refmoe.engines.adapters import SHIPPED
from refmoe.engines.environment import NEEDED, requirements
from refmoe.engines.options import declared_options, listed, made
from refmoe.errors import InputError
from tests.command_line import Refmoe

ROOT = Path(__file__).parents[2]
OWN = '''
"""An engine of mine. More of it."""
class Adapter:
    name, version, dtypes, taps, abilities, policies = "mine", "1", ("float32",), ("logits",), (), {}
    requirements = ("myengine==3", "extra==1")
    unwanted = ("extra",)
    def __init__(self, speed, colour="red"):
        self.name = f"mine {speed} {colour}"
'''


@pytest.mark.parametrize("name", SHIPPED)
def test_every_parameter_of_an_adapter_is_declared_with_its_default_among_the_choices(name: str) -> None:
    make = adapter_class(name)
    assert [*declared_options(make)] == [*inspect.signature(make).parameters]
    for each in listed(make):
        option = declared_options(make)[each.name]
        assert each.default is not None
        assert option.text or each.default in option.choices or (not option.choices and int(each.default) >= 1)
        assert option.about


@pytest.mark.parametrize("name", SHIPPED)
def test_help_lists_every_option(name: str, refmoe: Refmoe) -> None:
    for arguments in (("conform", "--adapter", name, "--help"), ("engines", name), ("engines", name, "--json")):
        status, out, err = refmoe(*arguments)
        assert status == 0, err
        words = " ".join(out.split())
        for each in listed(adapter_class(name)):
            assert each.name in words
            assert str(each.default) in words
    own = {option["name"] for option in json.loads(out)["options"]}
    assert own == {each.name for each in listed(adapter_class(name))}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_wrong_option_is_one_sentence_that_names_what_is_expected(name: str, refmoe: Refmoe) -> None:
    """Before the engine is looked for: it need not be installed."""
    make = adapter_class(name)
    for key, option in declared_options(make).items():
        with pytest.raises(InputError) as raised:
            made(name, make, {key: "no such value"})
        expected = [*option.choices] or [option.text or "an integer from 1"]
        assert all(word in str(raised.value) for word in (key, *expected))
    status, out, err = refmoe("conform", "--adapter", name, "--option", "nonesuch=1", "--case", "top-1")
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert all(word in err for word in ("nonesuch", *declared_options(make)))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_adapter_pins_what_it_needs(name: str) -> None:
    pinned = requirements(adapter_class(name))
    assert pinned
    assert all("==" in each for each in pinned)


def test_the_extras_of_the_package_pin_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    extras = {name: {each.partition(";")[0].strip() for each in listed} for name, listed in extras.items()}
    expected = {"transformers": "engines", "llama_cpp": "llama-cpp", "mlx_lm": "mlx", "onnx": "onnx"}
    for name, extra in expected.items():
        own = extras[extra] - {"refmoe[engines]"} | (extras["engines"] if "refmoe[engines]" in extras[extra] else set())
        assert own == {*requirements(adapter_class(name))}, name
    assert {*NEEDED} <= {each.partition("#")[0].strip() for each in project["dependencies"]}


def test_an_adapter_without_declarations_has_its_options_listed_and_checked(refmoe: Refmoe, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(OWN)
    status, out, _ = refmoe("engines", mine)
    assert status == 0
    assert "An engine of mine" in out
    assert "More of it" not in out
    for word in ("speed", "it has to be given", "colour", "red", "myengine==3", "extra==1"):
        assert word in out
    make = adapter_class(str(mine))
    assert made("mine", make, {"speed": "3"}).name == "mine 3 red"
    for given, words in (({}, "needs it"), ({"speed": "3", "size": "2"}, "only speed, colour was expected")):
        with pytest.raises(InputError, match=words):
            made("mine", make, given)


def test_an_adapter_that_takes_any_option_gets_it() -> None:
    class Free:
        def __init__(self, **options: str) -> None:
            self.options = options

    assert made("free", Free, {"a": "b"}).options == {"a": "b"}  # type: ignore[arg-type, attr-defined]


def test_a_module_that_cannot_be_imported_here_is_one_sentence(refmoe: Refmoe, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import no_such_engine")
    for arguments in (("engines", tmp_path / "mine.py"), ("conform", "--adapter", tmp_path / "mine.py", "--help")):
        status, _, err = refmoe(*arguments)
        assert status == 2
        assert "cannot be imported by this Python: ModuleNotFoundError" in err


# ---- environments


def wheel(folder: Path, name: str, version: str) -> None:
    """Write the wheel of a package with one module."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"version = '{version}'\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip finds: two versions of an engine, and stand-ins for what the protocol needs."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, version in (
        ("myengine", "3"),
        ("myengine", "4"),
        ("extra", "1"),
        ("numpy", "9"),
        ("ml_dtypes", "9"),
        ("safetensors", "9"),
    ):
        wheel(folder, name, version)
    for key, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(folder)), ("PIP_CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(key, value)
    return folder


@pytest.mark.slow
def test_one_command_makes_an_environment_with_the_pinned_engine(refmoe: Refmoe, tmp_path: Path, wheels: Path) -> None:
    mine, folder = tmp_path / "mine.py", tmp_path / "environment"
    mine.write_text(OWN)
    status, out, err = refmoe("engines", mine, "--install", folder)
    assert status == 0, err
    python = folder / "bin" / "python"
    assert out == f"refmoe conform --adapter {mine} --python {python}\n"
    script = "import myengine, numpy, ml_dtypes, safetensors; print(myengine.version)"
    assert subprocess.run([python, "-c", "import extra"], capture_output=True, check=False).returncode == 1
    said = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout == "3\n"
    status, _, err = refmoe("engines", mine, "--install", folder)
    assert status == 2
    assert "is in use" in err


@pytest.mark.slow
def test_what_pip_cannot_find_is_one_sentence(refmoe: Refmoe, tmp_path: Path, wheels: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(OWN.replace("myengine==3", "myengine==5"))
    status, _, err = refmoe("engines", mine, "--install", tmp_path / "environment")
    assert status == 2
    assert "pip could not install" in err
    assert "myengine==5" in err
    assert not (tmp_path / "environment").exists(), "else a second try would find the folder in use"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--install", "x"), "--install needs the name of an adapter"),
        (("nonesuch",), "adapter 'nonesuch': refmoe has none of this name"),
        (("tests/engines/running.py",), "has no class Adapter"),
    ],
)
def test_a_mistake_is_one_sentence(refmoe: Refmoe, arguments: tuple[str, ...], words: str) -> None:
    status, out, err = refmoe("engines", *arguments)
    assert (status, out) == (2, "")
    assert words in err


def test_an_adapter_without_requirements_cannot_be_installed(refmoe: Refmoe, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN.replace("requirements", "needs"))
    status, _, err = refmoe("engines", tmp_path / "mine.py", "--install", tmp_path / "environment")
    assert status == 2
    assert "declares no requirements" in err
    assert not (tmp_path / "environment").exists()
