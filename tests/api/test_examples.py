# SPDX-License-Identifier: Apache-2.0
"""The example engine, the quickstart and the notebook."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MOST_LINES = 70
"""Of code, in the engine that is called short."""


def test_the_engine_is_short() -> None:
    lines = (EXAMPLES / "first_engine.py").read_text().split('"""', 2)[2].splitlines()
    assert sum(bool(line.strip()) for line in lines) <= MOST_LINES


def test_the_engine_needs_nothing_of_refmoe() -> None:
    code = (EXAMPLES / "first_engine.py").read_text().split('"""', 2)[2]
    assert "refmoe" not in code


def test_the_quickstart_reaches_its_verdicts(tmp_path: Path) -> None:
    """From another folder, with the two files and the package alone."""
    for name in ("quickstart.py", "first_engine.py"):
        (tmp_path / name).write_text((EXAMPLES / name).read_text())
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "quickstart.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    verdicts = [line for line in done.stdout.splitlines() if line.startswith(("CONFORMANT", "NOT CONFORMANT"))]
    assert [line.partition("CONFORMANT")[0] for line in verdicts] == ["", "NOT "]
    assert done.stdout.splitlines()[-1].endswith("rope-theta-default")


@pytest.mark.engines
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells have assertions. Those of JAX do nothing where it is not installed."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("jinja2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "first_verdict.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    place = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pages = [output.data["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert len(pages) == 1
    assert "layers.0.attention.q_rope" in pages[0]
