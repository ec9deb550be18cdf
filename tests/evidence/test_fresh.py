# SPDX-License-Identifier: Apache-2.0
"""Packages of a run with ``--fresh``: each fresh case is drawn again from its seed, and judged on that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.checkpoints.load import checkpoint_digest, load_checkpoint
from refmoe.checkpoints.write import write_checkpoint
from refmoe.engines.conform import Suite, conform
from refmoe.engines.harness import Harness
from refmoe.engines.judge import Judge
from refmoe.engines.results import write_results
from refmoe.evidence import layout
from refmoe.evidence.own import Own
from refmoe.evidence.verify import Verification, verify_package
from refmoe.evidence.write import Wanted, write_package
from refmoe.suite import compute
from refmoe.suite.fresh import fresh_case
from refmoe.traces.trace import read_trace
from tests.engines.running import GOLDEN, HONEST, LIMIT, case_named
from tests.evidence.conftest import DATE
from tests.evidence.tamperings import edit, put, seals_again

CASE, SEED = "one-pair", 7
TRACE = layout.trace_file(CASE, "float32")


@pytest.fixture(scope="package")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of an honest engine on a fresh case."""
    for module in ("cyclonedx", "in_toto_attestation", "cryptography"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "traces").mkdir()
    suite = Suite(
        cases=[fresh_case(case_named(CASE), SEED)], smoke=[], dtypes=("float32",), judge=Judge(diagnosing=False),
        keep=folder / "traces", fresh=SEED,
    )  # fmt: skip
    results = conform(Harness(HONEST, LIMIT), {"command": "test"}, suite)
    write_results(folder / "results.json", results)
    write_package(
        folder / "package",
        Wanted(results=folder / "results.json", traces=folder / "traces", golden=GOLDEN, date=DATE),
    )
    return folder / "package"


@pytest.fixture
def package(fresh: Path, tmp_path: Path) -> Path:
    """A copy of the package."""
    return Path(shutil.copytree(fresh, tmp_path / "package"))


def of(package: Path, name: str) -> Any:
    return json.loads((package / name).read_text())


def verified(package: Path, own: Own) -> Verification:
    return verify_package(package, own)


def test_nothing_is_wrong_with_it(fresh: Path, own: Own) -> None:
    """No figure rests on the certificate of the golden case, so that none is proven."""
    found = verified(fresh, own)
    assert (found.faults, found.unchecked, found.certified.proven) == ([], [], ())
    assert of(fresh, layout.SUMMARY)["result"] == "PASSED"
    assert of(fresh, layout.SUMMARY)["fresh"] == SEED
    assert of(fresh, layout.STATEMENT)["predicate"]["passedTests"] == [f"{CASE} fresh {SEED} float32"]


def test_its_model_is_the_fresh_one(fresh: Path, tmp_path: Path) -> None:
    digests = {}
    for name, case in (("golden", case_named(CASE)), ("fresh", fresh_case(case_named(CASE), SEED))):
        write_checkpoint(tmp_path / name, case.config, case.checkpoint().parameters)
        digests[name] = checkpoint_digest(load_checkpoint(tmp_path / name))
    assert of(fresh, layout.CHECKPOINTS)[CASE]["digest"] == digests["fresh"] != digests["golden"]


def test_its_distances_are_from_the_exact_values_of_the_fresh_case(fresh: Path) -> None:
    """And nothing is said about the distance from the real numbers, since nothing proves it."""
    bounds = of(fresh, layout.EPSILON)["cases"][CASE]["float32"]["steps"]["logits"]
    exact, found = compute(fresh_case(case_named(CASE), SEED)), read_trace(fresh / TRACE)
    keys = [key for key in found.tensors if key.endswith("/logits")]
    worst = max(float(np.max(np.abs(found.tensors[key].map().astype(np.float64) - exact[key]))) for key in keys)
    assert bounds["reached"] == pytest.approx(worst, rel=1e-12)
    assert (bounds["proven"], bounds["total"]) == (None, None)


def test_no_bug_is_called_absent(fresh: Path) -> None:
    """The matrix is of the golden case, and other weights may hide what its weights show."""
    power = of(fresh, layout.POWER)["float32"]
    assert power["absent"] == {}
    assert power["not_excluded"]


def faults(package: Path, own: Own) -> dict[str, tuple[str, ...]]:
    seals_again(package)
    return {each.name: each.faults for each in verified(package, own).checks if each.faults}


def test_another_seed_is_found(package: Path, own: Own) -> None:
    edit(package, layout.RESULTS, put("fresh", value=SEED + 1))
    found = faults(package, own)
    assert any(layout.RESULTS in each and str(SEED + 1) in each for each in found["goldens"])
    assert any(TRACE in each for each in found["inputs"])


def test_a_fresh_case_as_the_golden_one_is_found(package: Path, own: Own) -> None:
    edit(package, layout.RESULTS, lambda results: results.pop("fresh") and None)
    found = faults(package, own)
    assert any(layout.RESULTS in each for each in found["goldens"])
    assert any(TRACE in each for each in found["inputs"])
