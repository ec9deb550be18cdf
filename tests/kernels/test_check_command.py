# SPDX-License-Identifier: Apache-2.0
"""`refmoe kernel check`: exit statuses, JSON, claims as options, and kernels that do what no kernel should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Refmoe

pytest.importorskip("hypothesis")

KERNELS = """
import os
import numpy as np
from refmoe.bugs.kernels.honest import align, attend, mixture

def zeros(x, *_): return np.zeros_like(x)
def leaves(x, *_): os._exit(0)
def halves(x, w, w_down, ids, weights):
    half = w.shape[1] // 2
    return mixture(x, w[:, :half], w[:, half:], w_down, ids, weights)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(KERNELS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked(refmoe: Refmoe, kernel: str, *options: Any) -> tuple[int, dict[str, Any], str]:
    status, printed, said = refmoe("kernel", "check", f"mine.py:{kernel}", "--examples", 3, "--json", *options)
    return status, json.loads(printed), said


@pytest.mark.parametrize(
    ("kernel", "options", "status"),
    [
        ("mixture", ("--law", "exact-sums", "--law", "legal-values"), 0),
        ("halves", ("--layout", "halves", "--law", "exact-sums"), 0),
        ("halves", ("--layout", "interleaved", "--law", "exact-sums"), 1),
        ("zeros", ("--law", "exact-sums"), 1),
        ("leaves", ("--law", "form", "--law", "exact-sums"), 1),
        ("align", ("--contract", "plan", "--law", "every-slot-once"), 0),
        ("attend", ("--contract", "attention", "--law", "picks-a-key", "--law", "legal-values"), 0),
    ],
)
def test_the_exit_status_says_whether_a_law_is_broken(
    here: Path, refmoe: Refmoe, kernel: str, options: tuple[Any, ...], status: int
) -> None:
    found, printed, _ = checked(refmoe, kernel, *options)
    assert found == status
    outcomes = {each["outcome"] for each in printed["laws"]}
    assert outcomes == ({"pass"} if status == 0 else outcomes & {"fail", "not judged"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--law", "no-such"), "no such law"),
        (("--routing", "offsets", "--padding"), "offsets have no"),
        (("--contract", "plan", "--buffer"), "has no claim 'buffer'"),
        (("--policy", "no-such"), "no-such"),
    ],
)
def test_options_that_cannot_be_get_a_sentence(
    here: Path, refmoe: Refmoe, options: tuple[Any, ...], words: str
) -> None:
    status, printed, said = checked(refmoe, "mixture", *options)
    assert status == 2
    assert words in printed["error"]
    assert "Traceback" not in said
