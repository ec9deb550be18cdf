# SPDX-License-Identifier: Apache-2.0
"""Goldens are recomputed to the bit, and every change on disk is reported."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe import suite as golden
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.errors import InputError
from refmoe.spec.model import Model, Steps
from refmoe.suite.certify import certify
from refmoe.traces.trace import Header, read_trace, write_trace

REPOSITORY = Path(__file__).parent.parent / "golden"
CASE = "walking-skeleton"
SOON_PROVEN = 1000
"""The tokens of a case up to which ball arithmetic takes seconds."""


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A copy of the first case, for a test to damage."""
    return Path(shutil.copytree(REPOSITORY / CASE, tmp_path / CASE))


def slow_if_long(folder: Path) -> Any:
    """The case as a parameter of a test in ball arithmetic, whose time grows with the square of a sequence."""
    tokens = sum(len(run.tokens) for run in golden.read_case(folder).runs())
    return pytest.param(folder, id=folder.name, marks=[pytest.mark.slow] if tokens > SOON_PROVEN else [])


def edit(case: Path, old: str, new: str) -> None:
    """Replace a piece of a case's case.toml."""
    text = (case / golden.CASE_FILE).read_text()
    assert old in text
    (case / golden.CASE_FILE).write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("folder", golden.find_cases(REPOSITORY, golden.FAMILIES), ids=lambda path: path.name)
def test_every_golden_is_recomputed_to_the_bit(folder: Path) -> None:
    """P2."""
    assert golden.check(folder) == []


def test_emitting_a_case_again_changes_no_byte(case: Path) -> None:
    """The certificate stays, as the values are equal."""
    before = {path.name: path.read_bytes() for path in case.iterdir()}
    assert golden.read_manifest(case)["certificate"] is not None
    golden.emit(golden.read_case(case))
    assert {path.name: path.read_bytes() for path in case.iterdir()} == before


def test_a_changed_case_loses_its_certificate_and_the_old_trace(case: Path) -> None:
    old = golden.trace_path(case)
    edit(case, "seed = 1", "seed = 2")
    golden.emit(golden.read_case(case))
    assert golden.read_manifest(case)["certificate"] is None
    assert not old.exists()
    assert golden.check(case) == []


def test_a_changed_element_is_named_with_its_tensor_and_index(case: Path) -> None:
    """Change one bit of one value in a whole trace."""
    path = golden.trace_path(case)
    trace = read_trace(path)
    arrays = {key: tensor.map().copy() for key, tensor in trace.tensors.items()}
    value = arrays["decode1/logits"]
    value[0, 7] = np.nextafter(value[0, 7], np.inf)
    write_trace(path, Header(trace.header.runs, trace.header.case, policy="exact"), arrays)
    (digest, tensor) = (difference.what for difference in golden.check(case))
    assert "SHA-256" in digest
    assert "'decode1/logits' differs at [0, 7]" in tensor


def test_what_is_missing_or_too_much_is_named(case: Path) -> None:
    (case / "notes.txt").write_text("hello")
    golden.trace_path(case).unlink()
    found = [difference.what for difference in golden.check(case)]
    assert len(found) == 2
    assert "notes.txt: an unexpected file" in found[0]
    assert ".safetensors: is missing" in found[1]


def test_another_seed_is_another_model(case: Path) -> None:
    """The case file is the definition: the trace and the digests no longer fit it."""
    edit(case, "seed = 1", "seed = 2")
    found = [difference.what for difference in golden.check(case)]
    assert any("case.toml: SHA-256 differs" in what for what in found)
    assert any("'prefill/embedding' differs at [0, 0] and" in what for what in found)


def test_a_case_under_another_name_is_another_case(case: Path) -> None:
    other = case.rename(case.parent / "other")
    assert "is that of case 'walking-skeleton'" in golden.check(other)[0].what


CHANGES = {
    "format_version": ('format_version = "1"', 'format_version = "9"', "'format_version'"),
    "not toml": ("[config]", "[config", "not valid TOML"),
    "no why": ("why =", "reason =", "'why' is missing"),
    "no conditions": ("conditions =", "terms =", "'conditions' is missing"),
    "not strings": ("conditions = [", "conditions = [1, ", "not a list of strings"),
    "bad store": ("[config]", 'store = "picture"\n[config]', "'store' is missing or not one of trace, fingerprint"),
    "bad start": ("[config]", "start = -1\n[config]", "'start' is missing or not an integer from 0"),
    "unknown field": ("[config]", "colour = 3\n[config]", "unknown field 'colour'"),
    "bad dimension": ("heads = 6", "heads = 7", "kv_heads = 3 does not divide heads = 7"),
    "unknown dimension": ("heads = 6", "heads = 6\nears = 2", "ears"),
    "no seed": ("seed = 1", "sede = 1", "'seed'"),
    "bad edits": ("seed = 1", "seed = 1\nedits = [1]", "'edits' is not a list of tables"),
    "unknown edit": ("seed = 1", "seed = 1\nedits = [{}]", "edits[0]"),
    "bad tokens": ("tokens = [32, 79]", 'tokens = "32"', "script[2]: 'tokens'"),
    "token too large": ("tokens = [32, 79]", "tokens = [97]", "token 97 is outside the vocabulary of 97"),
    "keeps too much": ("tokens = [32, 79]", "tokens = [32]\nkeep = 99", "keeps 99 tokens"),
    "bad segments": ('op = "decode"', 'op = "packed"', "script[2]: packed must have 'segments'"),
    "bad call": ('op = "chunk"', 'oop = "chunk"', "script[1]"),
    "unknown kind": ("seed = 1", "seed = 1\nexponents = {wx = 3}", "'wx'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_case_that_cannot_be_read_is_refused_by_its_field(case: Path, name: str) -> None:
    old, new, words = CHANGES[name]
    edit(case, old, new)
    with pytest.raises(InputError) as caught:
        golden.read_case(case).checkpoint()
    assert words in str(caught.value)
    assert golden.CASE_FILE in str(caught.value) or name in ("unknown kind", "unknown edit")
    assert any(words in difference.what for difference in golden.check(case))


def test_an_empty_folder_has_no_case(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no case"):
        golden.find_cases(tmp_path)


@pytest.mark.parametrize("folder", [*map(slow_if_long, golden.find_cases(REPOSITORY, golden.FAMILIES))])
def test_every_golden_is_certified(folder: Path) -> None:
    """P3: within 1e-12 of each tap's RMS, proven by Arb; and every decision, but for logits that are exactly equal."""
    case = golden.read_case(folder)
    certificate = certify(case)
    assert golden.read_manifest(folder)["certificate"] == certificate.to_json()
    assert max(certificate.relative.values()) < 1e-12
    arrays = golden.compute(case) if certificate.unproven else {}
    for decision in certificate.unproven:
        key, _, token = decision.removesuffix("]").rpartition("[")
        logits = np.sort(arrays[key.replace("router.experts", "router.logits")][int(token)])[::-1]
        assert 0 in np.diff(logits[: case.config.experts_per_token + 1]), decision


def test_a_golden_that_is_off_is_not_certified(case: Path) -> None:
    """The certificate can fail: one value moved by 1e-9 shows in its bound."""
    path = golden.trace_path(case)
    trace = read_trace(path)
    arrays = {key: tensor.map().copy() for key, tensor in trace.tensors.items()}
    arrays["prefill/layers.1.expert.up"][3, 1, 5] += 1e-9
    write_trace(path, trace.header, arrays)
    certificate = certify(golden.read_case(case))
    assert certificate.bounds["prefill/layers.1.expert.up"] > 0.99e-9
    assert certificate.bounds["prefill/layers.1.expert.gate"] < 1e-13


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    exact = np.frompyfunc(lambda x, y, z: float(Fraction(x) * Fraction(y) + Fraction(z)), 3, 1)
    return exact(a, b, c).astype(np.float64)


def rotate_fused(ops: Any, x: Any, table: Any) -> Any:
    """ROPE-4 as a compiler that contracts a * b + c would compute it."""
    cos, sin = (part[:, None, :] for part in table)
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([fused(a, cos, -(b * sin)), fused(b, cos, a * sin)], axis=-1)


MISTAKES = {
    "a product of NumPy's": ("matmul", lambda self, a, b: a @ b),
    "a linear map of NumPy's": ("linear", lambda self, x, w: x @ np.asarray(w.read(), np.float64).T),
    "a sum of NumPy's": ("sum", lambda self, x, axis: x.sum(axis=axis)),
    "angles rounded before their cosine": ("unit_circle", NativeOps.unit_circle),
    "a sigmoid from its formula": ("sigmoid", lambda self, x: 1 / (1 + self.exp(-x))),
}


def assert_seen(found: list[golden.Difference]) -> None:
    assert found
    assert all("differs at" in difference.what for difference in found)


@pytest.mark.parametrize("name", MISTAKES)
def test_arithmetic_that_is_only_nearly_right_changes_the_golden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: each of these mistakes is about an ulp, and each is reported."""
    monkeypatch.setattr(ExactOps, *MISTAKES[name])
    assert_seen(golden.check(REPOSITORY / CASE))


def test_a_fused_multiply_add_changes_the_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(rotate=rotate_fused)
    monkeypatch.setattr("refmoe.suite.activations.Model", lambda config, parameters: Model(config, parameters, steps))
    assert_seen(golden.check(REPOSITORY / CASE))
