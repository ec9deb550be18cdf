# SPDX-License-Identifier: Apache-2.0
"""The names of the package: which there are, when they are imported, what their documentation says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import pydoc
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import refmoe
import refmoe.api

NAMES = {
    "load", "case", "cases", "verify", "capture", "policy", "policies", "Model", "Trace", "Report", "InputError",
    "testing",
}  # fmt: skip
HEAVY = ("numpy", "torch", "jax", "click", "rich", "transformers", "hypothesis", "pytest", "refmoe.bugs", "refmoe.api")
DOCUMENTED = [
    "refmoe", "refmoe.testing", "refmoe.errors",
    *(f"refmoe.api.{each.name}" for each in pkgutil.iter_modules(refmoe.api.__path__)),
]  # fmt: skip
ROOT = Path(refmoe.__file__).parents[1]


def python(code: str) -> str:
    """The output of a new process that has imported nothing yet."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_has_twelve_names() -> None:
    assert {*refmoe.__all__} == NAMES
    assert {*dir(refmoe)} == NAMES | {"__version__"}


def test_an_import_imports_nothing_else() -> None:
    loaded = python(f"import sys, refmoe; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert loaded == "[]"


def test_no_name_imports_another_engine() -> None:
    """They are imported when one of their arrays, or a module, is given."""
    code = "import sys, refmoe; [getattr(refmoe, n) for n in refmoe.__all__]; print('torch' in sys.modules, end=' ')"
    assert python(f"{code}; print('jax' in sys.modules)") == "False False"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_name_can_be_the_first_to_be_used(name: str) -> None:
    assert python(f"import refmoe; print(refmoe.{name}.__name__)").rpartition(".")[2] == name


@pytest.mark.parametrize(
    "first",
    [
        "import refmoe.testing", "import refmoe.verifier.verify, refmoe.profiles.policy", "import refmoe.cli",
        "from refmoe import *", "import refmoe.engines.capture, refmoe.api.policies, refmoe.suite.case",
    ],
)  # fmt: skip
def test_functions_stay_functions_whatever_was_imported(first: str) -> None:
    """A module of the same name would take their place."""
    names = ["verify", "policy", "policies", "case", "cases", "capture", "load"]
    code = f"{first}\nimport refmoe\nprint([n for n in {names} if type(getattr(refmoe, n)).__name__ != 'function'])"
    assert python(code) == "[]"
    assert python(f"import refmoe\nrefmoe.verify, refmoe.policy\n{first}\nprint(callable(refmoe.verify))") == "True"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(refmoe, "nonsense")  # noqa: B009


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_examples_are_true(name: str) -> None:
    module = importlib.import_module(name)
    if name == "refmoe.api.capturing":
        pytest.importorskip("torch")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_name_has_an_example(name: str) -> None:
    documented = getattr(refmoe, name)
    assert ">>> " in (documented.__doc__ or "")


def test_the_page_of_the_package_has_an_example_that_runs() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    assert sum(len(test.examples) for test in finder.find(refmoe, "refmoe")) > 5


def test_help_shows_every_name() -> None:
    page = pydoc.plain(pydoc.render_doc(refmoe))
    for name in NAMES:
        assert name in page
        assert isinstance(getattr(refmoe, name), ModuleType) or f"{name}(" in page or f"class {name}" in page
