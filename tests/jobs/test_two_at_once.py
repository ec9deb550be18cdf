# SPDX-License-Identifier: Apache-2.0
"""Two equal commands at once on one output both end well, and a command that fails leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.write import write_checkpoint
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.lock import lock, locked
from tests.command_line import Refmoe
from tests.models import SMALL

ROOT = Path(__file__).parents[2]
unix = pytest.mark.skipif(os.name != "posix", reason="there are no such locks")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model."""
    write_checkpoint(tmp_path / "model", SMALL, synthetic_checkpoint(SMALL, 3).parameters)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def together(words: str, folder: Path, count: int = 2) -> None:
    """Run equal commands at once. Each must end well and say nothing on standard error."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "refmoe", *words.split()], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )
        for _ in range(count)
    ]  # fmt: skip
    for each in started:
        _, said = each.communicate()
        assert (each.returncode, said) == (0, b"")


@unix
def test_two_emissions_of_one_trace(refmoe: Refmoe, here: Path) -> None:
    words = "emit --checkpoint model --tokens 1,2,3,4,5 --decode 6,7,8,9 --out"
    assert refmoe(*words.split(), "alone")[0] == 0
    together(f"{words} trace", here, 3)
    alone, trace = (hashlib.sha256((here / name).read_bytes()).digest() for name in ("alone", "trace"))
    assert trace == alone
    assert {path.name for path in here.iterdir()} == {"model", "alone", "trace"}


@unix
def test_two_emissions_of_one_golden_folder(refmoe: Refmoe, here: Path) -> None:
    for name in ("one-pair", "top-1"):
        (here / "golden" / name).mkdir(parents=True)
        shutil.copy(ROOT / "golden" / name / "case.toml", here / "golden" / name)
    together("suite emit --golden golden --executor processes:1", here)
    assert refmoe("suite", "check", "--golden", here / "golden", "--executor", "processes:1")[0] == 0


@unix
def test_two_checkpoints_in_one_folder(refmoe: Refmoe, here: Path) -> None:
    together("materialise one-pair out", here)
    assert refmoe("info", here / "out")[0] == 0
    assert len([*(here / "out").iterdir()]) == 2


FAILING = {
    "no dask": "emit --checkpoint model --tokens 1 --executor dask:tcp://127.0.0.1:9 --out t",
    "no such token": "emit --checkpoint model --tokens 1000 --out t",
    "no such tap": "emit --checkpoint model --tokens 1 --taps none --out t",
    "no such layer": "emit --checkpoint model --tokens 1 --layers 0:9 --out t",
    "no such dtype": "materialise one-pair a/b --dtype none",
    "no such case": "materialise none a/b",
}


@pytest.mark.parametrize("name", FAILING)
def test_a_command_that_fails_leaves_nothing(
    refmoe: Refmoe, here: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert refmoe(*FAILING[name].split())[0] == 2
    assert {path.name for path in here.iterdir()} == {"model"}


def test_a_checkpoint_that_cannot_be_written_leaves_no_folder(here: Path) -> None:
    """The weights do not fit into float16."""
    parameters = synthetic_checkpoint(SMALL, 3, {"embedding": 30}).parameters
    with pytest.raises(InputError, match="float16"):
        write_checkpoint(here / "a" / "b", SMALL, parameters, "float16")
    assert {path.name for path in here.iterdir()} == {"model"}


@unix
def test_an_abandoned_temporary_file_is_removed_and_one_in_use_is_not(tmp_path: Path) -> None:
    path, other = tmp_path / "x[1].json", tmp_path / ".x[1].json.longer-name.tmp"
    abandoned = tmp_path / ".x[1].json.abcd1234.tmp"
    for each in (abandoned, other):
        each.write_text("half")
    with replacing(path) as first:
        assert not abandoned.exists()
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
            assert first.exists()
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert {each.name for each in tmp_path.iterdir()} == {path.name, other.name}


@unix
def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    """A folder that its holder removes is made again by the next."""
    folder = tmp_path / "folder"
    with locked(folder):
        handle = os.open(folder, os.O_RDONLY)
        assert not lock(handle, wait=False)
        os.close(handle)
        folder.rmdir()
        with locked(folder):
            assert folder.is_dir()
    with locked(folder):
        assert folder.is_dir()
