# SPDX-License-Identifier: Apache-2.0
"""docs/router-contract.md is true: its files are written, its commands run, and their output compared."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from refmoe.routers.contract import LAWS
from tests.routers.router_mutants import MUTANTS
from tests.tour import environment_in

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "router-contract.md").read_text()
FILES = {body.split("\n", 1)[0][2:]: body for body in re.findall(r"```python\n(# \w+\.py\n.*?)```", PAGE, re.DOTALL)}
COMMANDS = re.findall(r"```console\n\$ (.*?)\n(.*?)```", PAGE, re.DOTALL)


def matches(shown: str, printed: str) -> bool:
    """Whether the page shows the printed text. Spaces at line ends do not count; … matches part of a line or lines."""
    lines = "".join(line.rstrip() + "\n" for line in printed.strip().splitlines())
    pattern = ""
    for line in shown.strip().splitlines():
        parts = (re.escape(part) for part in line.split("…"))
        pattern += r"(?:[^\n]*\n)*" if line == "…" else r"[^\n]*".join(parts) + r"\n"
    return re.fullmatch(pattern, lines) is not None


@pytest.mark.parametrize(("command", "shown"), COMMANDS, ids=[command[:60] for command, _ in COMMANDS])
def test_the_page_shows_what_is_printed(command: str, shown: str, tmp_path: Path) -> None:
    if "torch" in command and importlib.util.find_spec("torch") is None:
        pytest.skip("torch not installed: pip install -e '.[engines]'")
    for name, body in FILES.items():
        (tmp_path / name).write_text(body)
    environment = {**environment_in(tmp_path, columns=118), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )  # fmt: skip
    assert matches(shown, done.stdout + done.stderr), done.stdout + done.stderr


def test_the_page_has_all_files_and_commands() -> None:
    assert list(FILES) == ["my_router.py", "fixed_router.py", "torch_router.py", "test_mine.py", "test_model.py"]
    assert len(COMMANDS) == 5


def test_the_table_of_laws_is_the_laws() -> None:
    """The table lists every law with its own mutant."""
    own = {mutant.name: mutant.only for mutant in MUTANTS if mutant.only}
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \| (.*?) \| (.*?) \| ([\w-]+) \|$", PAGE, re.MULTILINE)
    assert [row[0] for row in rows] == list(LAWS)
    for name, words, source, needs, mutant in rows:
        law = LAWS[name]
        assert (words, source) == (law.words, law.source)
        assert needs == ("; ".join(need.words for need in law.needs) or "nothing")
        assert own[mutant] == name
