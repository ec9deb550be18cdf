# SPDX-License-Identifier: Apache-2.0
"""The inputs of the example of every command."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from refmoe.api.conforming import Conformance, conform, write_results, write_scaffold
from refmoe.api.evidence import Wanted, write_evidence
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.write import write_checkpoint
from refmoe.jobs.emission import Emission, emit
from refmoe.jobs.source import Folder
from refmoe.traces.script import Call, plan
from tests.cli.every_command import ROOT
from tests.models import SMALL
from tests.refmoe_once import read_once

KERNEL = "from refmoe.bugs.kernels.honest import mixture\n"
ROUTER = """\
import numpy as np


def route(x):
    ids = np.argsort(-x, axis=1, kind="stable")[:, :2]
    e = np.exp(np.take_along_axis(x, ids, 1) - x.max(axis=1, keepdims=True))
    return ids, e / e.sum(axis=1, keepdims=True)
"""


@pytest.fixture(scope="package", autouse=True)
def refmoe_once() -> Iterator[None]:
    """Many tests write or check an evidence package."""
    with read_once():
        yield


@pytest.fixture(scope="package")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder {in}: a model, its trace, a harness, results, their package, a router and a folder of tests."""
    folder = tmp_path_factory.mktemp("given")
    write_checkpoint(folder / "model", SMALL, synthetic_checkpoint(SMALL, 3).parameters)
    runs = plan([Call("prefill", 0, (1, 2, 3))], SMALL.vocab)
    emit(Emission(Folder(folder / "model"), runs, folder / "trace", arithmetic="float32"))
    write_scaffold("python", folder / "skips.py")
    harness = (__import__("sys").executable, str(folder / "skips.py"))
    results, _ = conform(Conformance(harness=harness, cases=("one-pair",), dtypes=("float32",), diagnose=False))
    write_results(folder / "results", results)
    if importlib.util.find_spec("cyclonedx") is not None:
        wanted = Wanted(results=folder / "results", traces=folder, golden=ROOT / "golden")
        write_evidence(folder / "package", wanted)
    (folder / "router.py").write_text(ROUTER)
    (folder / "kernel.py").write_text(KERNEL)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder {out}: a golden folder of one case."""
    folder = tmp_path / "out"
    shutil.copytree(ROOT / "golden" / "one-pair", folder / "golden" / "one-pair")
    return folder
