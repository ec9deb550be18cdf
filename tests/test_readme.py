# SPDX-License-Identifier: Apache-2.0
"""README.md fits a screen or two, its two commands work, and CI runs the second of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.tour import ROOT, clone, marked, run_tour

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(TEXT.split()) < 700


def test_the_main_command_works(tmp_path: Path) -> None:
    """The part that follows the installation. The tests of the package install it."""
    install, *rest = marked(TEXT, "main").split(" && ")
    assert install.startswith("python -m pip install")
    assert rest
    clone(tmp_path)
    run_tour("```console\n" + "".join(f"$ {command}\n" for command in rest) + "```\n", tmp_path)


def test_ci_runs_the_command_of_the_tests() -> None:
    """CI takes the command out of the README with sed."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (line,) = [line for line in script.splitlines() if "sed -n" in line]
    cut = line.split('"', 1)[1].rsplit('"', 1)[0].removeprefix("$(").removesuffix(")")
    done = subprocess.run(cut, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == marked(TEXT, "tests")
    assert "python -m pytest" in done.stdout
