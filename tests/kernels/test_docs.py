# SPDX-License-Identifier: Apache-2.0
"""docs/kernel-contract.md is true: its files are written, its commands run, and its tables are those of the laws."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

from refmoe.bugs.kernels.catalogue import KERNEL_BUGS
from refmoe.bugs.kernels.cheats import CHEATS
from tests.kernels.wrong_kernels import EVERY, bugs_table, laws_table
from tests.routers.test_contract_docs import matches
from tests.tour import environment_in

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kernel-contract.md").read_text(encoding="utf-8")
FILES = {body.split("\n", 1)[0][2:]: body for body in re.findall(r"```python\n(# \w+\.py\n.*?)```", PAGE, re.DOTALL)}
COMMANDS = re.findall(r"```console\n\$ (.*?)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("command", "shown"), COMMANDS, ids=[command[:60] for command, _ in COMMANDS])
def test_the_page_shows_what_is_printed(command: str, shown: str, tmp_path: Path) -> None:
    for name, body in FILES.items():
        (tmp_path / name).write_text(body, encoding="utf-8")
    environment = {**environment_in(tmp_path, columns=118), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )  # fmt: skip
    assert matches(shown, done.stdout + done.stderr), done.stdout + done.stderr


def test_the_page_has_all_files_and_commands() -> None:
    assert list(FILES) == ["my_kernel.py", "test_mine.py"]
    assert len(COMMANDS) == 3


@pytest.mark.parametrize("contract", EVERY)
def test_the_tables_of_laws_are_the_laws(contract: str) -> None:
    assert laws_table(contract) in PAGE


def test_the_table_of_bugs_is_the_catalogue() -> None:
    assert bugs_table() in PAGE
    assert f"{len(KERNEL_BUGS)} bugs" in PAGE
    assert f"{len(CHEATS)} cheats" in PAGE
