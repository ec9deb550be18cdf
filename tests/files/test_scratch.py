# SPDX-License-Identifier: Apache-2.0
"""Temporary folders: whatever an engine does to them, the run has one, and nothing is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from refmoe.files import scratch
from refmoe.files.scratch import Scratch, remove_tree


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_nothing_is_left(tmp_path: Path) -> None:
    with Scratch("test") as made, made.folder("one") as one:
        (one / "file").touch()
        assert tmp_path in one.parents
    assert not [*tmp_path.iterdir()]


def _remove(path: Path) -> None:
    shutil.rmtree(path)


def _replace_by_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("a file")


def _replace_by_a_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("/usr", target_is_directory=True)


def _replace_by_another_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _close(path: Path) -> None:
    path.chmod(0)


def _remove_above(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize(
    "damage", [_remove, _replace_by_a_file, _replace_by_a_link, _replace_by_another_folder, _close, _remove_above]
)
def test_a_folder_that_was_damaged_is_made_anew(damage: object, tmp_path: Path) -> None:
    assert callable(damage)
    with Scratch("test") as made:
        with made.folder("one"):
            damage(made.path)
        with made.folder("two") as two:
            (two / "file").write_text("there is room")
            assert made.whole
            assert two.parent == made.path
    assert not [*tmp_path.glob("refmoe-*/*")]
    assert Path("/usr/bin").is_dir()


def test_removal_copes_with_depth_links_and_closed_folders(tmp_path: Path) -> None:
    root, kept = tmp_path / "root", tmp_path / "kept"
    for folder in (root, kept):
        folder.mkdir()
    (kept / "file").write_text("of the user")
    (root / "link").symlink_to(kept, target_is_directory=True)
    (root / "closed").mkdir()
    (root / "closed" / "file").touch()
    (root / "closed").chmod(0)
    os.mkfifo(root / "pipe")
    here = os.open(".", os.O_RDONLY)
    os.chdir(root)
    try:
        for _ in range(2500):  # 12,500 characters, three times what a path can have
            os.mkdir("deep")
            os.chdir("deep")
    finally:
        os.chdir(here)
        os.close(here)
    remove_tree(root)
    assert not root.exists()
    assert (kept / "file").read_text() == "of the user"


KILLED = """
import os, signal, sys, tempfile
tempfile.tempdir = sys.argv[1]
from refmoe.files.scratch import Scratch
made = Scratch("test")
(made.path / "file").touch()
print(made.path, flush=True)
sys.stdin.read() if sys.argv[2] == "lives" else os.kill(os.getpid(), signal.SIGKILL)
"""


def start(tmp_path: Path, what: str) -> tuple[subprocess.Popen[bytes], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), what], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().decode().strip())


def test_only_a_folder_that_a_kill_left_is_removed_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, left = start(tmp_path, "dies")
    assert dead.wait() == -signal.SIGKILL
    living, used = start(tmp_path, "lives")
    try:
        with Scratch("test"):
            assert left.exists(), "it is not old enough: its process might be about to lock it"
        monkeypatch.setattr(scratch, "YOUNGEST", 0.0)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with Scratch("test"):
            assert left.exists(), "it is of another user"
        monkeypatch.undo()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(scratch, "YOUNGEST", 0.0)
        with Scratch("another"):
            assert left.exists(), "it has another purpose"
        with Scratch("test"):
            assert not left.exists()
            assert (used / "file").exists(), "its run is alive"
    finally:
        living.kill()
        living.communicate()
