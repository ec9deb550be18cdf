# SPDX-License-Identifier: Apache-2.0
"""A small part of the campaign of kills: a command that starts processes and writes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.fuzz import kills

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def test_a_kill_loses_nothing_and_leaves_nothing() -> None:
    _, faults = kills.Trial("emit processes", 0).run()
    assert faults == []


@pytest.mark.slow
@pytest.mark.parametrize("name", kills.COMMANDS)
def test_no_kill_of_any_command_does(name: str) -> None:
    pytest.importorskip("flint" if "certify" in name else "numpy")
    for seed in range(3):
        _, faults = kills.Trial(name, seed).run()
        assert faults == []


def test_the_campaign_sees_what_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that starts a process which outlives it, and one that leaves a file, are faults."""
    command = kills.Command("cases", kills.nothing, writes=False)
    monkeypatch.setitem(kills.COMMANDS, "leaves", command)
    script = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); open('left', 'w'); time.sleep(1)"
    monkeypatch.setattr(kills, "program", lambda _words: [sys.executable, "-c", script])
    monkeypatch.setattr(kills, "undisturbed", lambda _name: (0.5, {}))
    monkeypatch.setattr(kills, "GRACE", 0.5)

    def until_left(_process: object, folder: Path, *_: object) -> None:
        while not (folder / "left").exists():
            time.sleep(0.01)

    monkeypatch.setattr(kills, "wait_for_moment", until_left)
    _, faults = kills.Trial("leaves", 1).run()
    assert [fault for fault in faults if "outlive" in fault]
    assert "left is left over" in faults
