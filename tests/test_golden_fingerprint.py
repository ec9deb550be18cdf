# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: a case that is too large to keep is recomputed and compared with digests of each tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe import suite as golden
from refmoe.checkpoints.weight_formula import mix, stream_key
from refmoe.errors import InputError
from refmoe.suite.certify import certify
from refmoe.suite.fingerprint import fingerprint, fingerprint_difference
from refmoe.suite.manifest import content_file, digest
from tests.golden_cases import write_case


@pytest.fixture
def case(tmp_path: Path) -> Path:
    folder = write_case(tmp_path / "large", more='store = "fingerprint"')
    golden.emit(golden.read_case(folder))
    return folder


def content(case: Path) -> Path:
    return case / content_file(golden.read_manifest(case))


def reseal(case: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the fingerprints and every digest of them, so that only the recomputation can tell."""
    stored, manifest = json.loads(content(case).read_bytes()), golden.read_manifest(case)
    change(stored["tensors"])
    old = content(case)
    data = json.dumps(stored).encode()
    name = f"fingerprint-{digest(data)[:16]}.json"
    old.unlink()
    (case / name).write_bytes(data)
    manifest["files"] = {"case.toml": manifest["files"]["case.toml"], name: digest(data)}
    golden.write_manifest(case, manifest)


def test_a_fingerprint_case_is_emitted_and_checked(case: Path) -> None:
    assert golden.check(case) == []
    assert {path.name for path in case.iterdir()} == {"case.toml", "manifest.json", content(case).name}
    assert golden.is_emitted(golden.read_case(case))
    assert max(certify(golden.read_case(case)).relative.values()) < 1e-12


def test_it_holds_what_the_format_says(case: Path) -> None:
    """The projection by the formula of FORMAT.md, in integers and fractions."""
    arrays = golden.compute(golden.read_case(case))
    stored = json.loads(content(case).read_bytes())
    assert [run["run"] for run in stored["runs"]] == ["prefill", "decode1"]
    assert stored["tensors"].keys() == arrays.keys()
    for key, array in arrays.items():
        entry, flat = stored["tensors"][key], array.reshape(-1).tolist()
        assert entry["dtype"] == array.dtype
        assert entry["shape"] == [*array.shape]
        assert entry["sha256"] == golden.tensor_digest(array) == golden.read_manifest(case)["tensors"][key]
        assert entry["leading"] == [value.hex() if array.dtype == float else value for value in flat[:8]]
        for j, projection in enumerate(entry["projections"]):
            stream = stream_key(0, f"fingerprint.{j}/{key}")
            hashes = [mix((stream + (i + 1) * 0x9E3779B97F4A7C15) % 2**64) for i in range(len(flat))]
            exact = sum(Fraction(x) * (1 if h >> 63 else -1) for x, h in zip(flat, hashes, strict=True))
            assert float.fromhex(projection) == float(exact)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a leading value": (
        lambda tensors: tensors["prefill/logits"]["leading"].__setitem__(5, "0x1.0p-2"),
        "tensor 'prefill/logits' differs at [0, 5]: stored 0x1.0p-2",
    ),
    "a projection": (
        lambda tensors: tensors["prefill/logits"]["projections"].__setitem__(2, "0x1.0p-2"),
        "tensor 'prefill/logits' differs beyond its first 8 elements: projection 2 is 0x1.0p-2",
    ),
    "the digest": (
        lambda tensors: tensors["prefill/logits"].update(sha256="0" * 64),
        "tensor 'prefill/logits' has another SHA-256",
    ),
    "the shape": (
        lambda tensors: tensors["prefill/logits"].update(shape=[11, 3]),
        "tensor 'prefill/logits' is float64 [11, 3], but float64 [3, 11] was computed",
    ),
    "a tensor less": (lambda tensors: tensors.pop("prefill/logits"), "tensor 'prefill/logits' is missing"),
    "a tensor more": (
        lambda tensors: tensors.update(more=tensors["prefill/logits"]),
        "tensor 'more' is unexpected",
    ),
    "no fingerprints": (lambda tensors: tensors.update(more=3), "'tensors' is not an object of fingerprints"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_fingerprint_that_is_not_the_computed_one_is_named(case: Path, name: str) -> None:
    change, words = CHANGES[name]
    reseal(case, change)
    (difference,) = golden.check(case)
    assert words in difference.what


def test_a_case_whose_weights_change_no_longer_fits(case: Path) -> None:
    write_case(case, seed=2, more='store = "fingerprint"')
    found = [difference.what for difference in golden.check(case)]
    assert any("tensor 'prefill/embedding' differs at [0, 0]: stored" in what for what in found)


def test_a_changed_element_changes_digest_and_projections() -> None:
    """A change among the first elements is reported with its index; the sign of a zero counts too."""
    values = np.arange(60.0).reshape(5, 12)
    whole = fingerprint("a/b", values)
    for at, words in (((0, 3), "differs at [0, 3]"), ((4, 7), "beyond its first 8 elements: projection 0")):
        other = values.copy()
        other[at] += 1
        assert words in str(fingerprint_difference(fingerprint("a/b", other), whole))
    negative = np.where(values == 0, -0.0, values)
    assert "differs at [0, 0]: stored -0x0.0p+0" in str(fingerprint_difference(fingerprint("a/b", negative), whole))
    assert fingerprint("a/c", values).projections != whole.projections
    assert fingerprint_difference(whole, whole) is None


def test_the_way_a_case_is_stored_follows_its_definition(case: Path) -> None:
    with pytest.raises(InputError, match="stores a fingerprint, but one with a trace was expected"):
        golden.trace_path(case)
    write_case(case)
    assert any('has store = "trace"' in difference.what for difference in golden.check(case))
    golden.emit(golden.read_case(case))
    assert golden.trace_path(case).exists()
    assert golden.check(case) == []
    assert len([*case.iterdir()]) == 3
