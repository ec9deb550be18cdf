# SPDX-License-Identifier: Apache-2.0
"""Every page is true: its commands run, in order, and print what it shows; every block of code on it is run."""

from __future__ import annotations

import importlib.util
import math
import re
import resource
import shutil
from pathlib import Path

import pytest

import refmoe
from tests.tour import BLOCK, ROOT, clone, console, files, run_tour, steps, write_files

IN_A_CLONE = ("README.md", "docs/engine-in-c.md", "docs/ci.md", "docs/audit.md", "docs/pack.md")
"""Pages that begin in a clone of the repository. The others begin in an empty folder."""
AFTER_THE_QUICKSTART = ("docs/adapters.md", "docs/unit-tests.md", "docs/evidence.md")
"""Pages that continue in the folder of the quickstart."""
OTHERS = ("docs/routers.md", "docs/router-contract.md", "docs/kernel-contract.md")
"""Pages that tests/routers and tests/kernels run."""
PAGES = [
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if steps(path.read_text(encoding="utf-8"))
]
NEEDS = {
    "docs/pytorch.md": ["torch", "transformers"],
    "docs/engine-in-c.md": ["cc"],
    "docs/pack.md": ["cc", "node", "rustc"],
    "docs/audit.md": ["flint"],
    "docs/servers.md": ["gguf"],
    "docs/evidence.md": ["cryptography", "cyclonedx", "in_toto_attestation"],
}
PROGRAMS = ("cc", "node", "rustc")
FROM_NOTHING = {"docs/pack.md": (30, 60.0)}
"""Pages that promise a verdict soon: the most commands, and the most seconds of a core."""
SHOWN = {
    "README.md": ("main", "tests"),
    "docs/adapters.md": None,
    "docs/install.md": None,
    "docs/pytorch.md": None,
    "CONTRIBUTING.md": None,
    "docs/router-contract.md": None,
    "docs/kernel-contract.md": None,
}
"""Pages with commands that a test does not run, since they install something or run the tests themselves."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def missing(page: str) -> list[str]:
    """The programs and modules that a page needs and this machine lacks."""
    return [
        name
        for name in NEEDS.get(page, [])
        if not (shutil.which(name) if name in PROGRAMS else importlib.util.find_spec(name))
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OTHERS])
def test_the_page_runs_and_prints_what_it_shows(page: str, tmp_path: Path) -> None:
    if absent := missing(page):
        pytest.skip(f"{page} needs {' and '.join(absent)}")
    if page in IN_A_CLONE:
        clone(tmp_path)
    if page in AFTER_THE_QUICKSTART:
        write_files(text_of("docs/quickstart.md"), tmp_path)
    before = seconds_of_commands()
    run_tour(text_of(page), tmp_path)
    commands, seconds = FROM_NOTHING.get(page, (math.inf, math.inf))
    assert len(console(text_of(page))) < commands
    assert seconds_of_commands() - before < seconds


def seconds_of_commands() -> float:
    """The seconds that a core has worked for the commands so far. A machine may be busy with others meanwhile."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_no_command_is_left_out() -> None:
    """A block of shell is a console block, which is run, or it is one that installs or tests."""
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        page = str(path.relative_to(ROOT))
        for mark, _, language, block in BLOCK.findall(path.read_text(encoding="utf-8")):
            if language == "bash":
                assert page in SHOWN, page
                assert SHOWN[page] is None or mark in SHOWN[page], page
            elif language == "python" and page not in OTHERS:
                assert mark in ("file", "shown") or ">>> " in block, (page, block)


def test_the_engine_of_the_quickstart_is_the_example() -> None:
    """A reader who has the package alone copies it from the page."""
    licence, _, engine = text_of("examples/first_engine.py").partition("\n")
    assert licence.startswith("# SPDX")
    assert files(text_of("docs/quickstart.md"))["first_engine.py"] == engine


def test_the_version_is_the_same_everywhere() -> None:
    assert f"version: {refmoe.__version__}\n" in text_of("CITATION.cff")
    assert f"\n## {refmoe.__version__}" in text_of("CHANGELOG.md")


def test_every_extra_is_on_the_page_about_installing() -> None:
    import tomllib

    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    told = {
        name
        for row in re.findall(r"^\| (`.*?) \|", text_of("docs/install.md"), re.MULTILINE)
        for name in re.findall(r"`([\w-]+)`", row)
    }
    assert told == {*extras}


def test_functions_that_a_page_names_are_in_the_c_example() -> None:
    source = text_of("examples/mixtral.c")
    for cell in re.findall(r"^\|[^|]*\|[^|]*\|([^|]*)\|$", text_of("docs/engine-in-c.md"), re.MULTILINE):
        for name in re.findall(r"`(\w+)`", cell):
            assert re.search(rf"\b{name}\(", source), name
