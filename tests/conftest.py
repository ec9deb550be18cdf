# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

import pytest
from hypothesis import settings

from refmoe.cli import main
from refmoe.cuda.device import gpu_problem
from tests.command_line import Refmoe

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask a hub for anything
for library in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(library, "1")  # read by processes that pytest-xdist starts: a core each, not all cores each

settings.register_profile("refmoe", deadline=None, derandomize=True)
settings.load_profile("refmoe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    reasons = {}
    if missing:
        reasons["engines"] = f"{' and '.join(missing)} not installed: pip install -e '.[engines]'"
    if problem := gpu_problem():
        reasons["gpu"] = problem
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def refmoe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refmoe:
    """Run a command: status, standard output, standard error."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refmoe", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run
