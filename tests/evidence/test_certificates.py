# SPDX-License-Identifier: Apache-2.0
"""Certificates, proven again: a true one always, a false one never, and what was not proven is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from refmoe.errors import InputError
from refmoe.evidence import certificates
from refmoe.evidence.certificates import ALL, NONE, SOME
from refmoe.evidence.given import read_given
from refmoe.evidence.own import Own
from refmoe.evidence.verify import verify_package
from refmoe.suite import read_case, read_manifest
from refmoe.suite.certify import DOUBLED, Certificate, certify, unproven_claims
from tests.engines.running import GOLDEN
from tests.evidence.conftest import CASES, WRONG, Made

TIED = "tie-first-second"
"""A case with decisions that no ball decides."""
KEY = "prefill/logits"

pytest.importorskip("flint")


@pytest.fixture(scope="module")
def proof() -> Certificate:
    """The certificate of the case, by twice as many bits."""
    return certify(read_case(GOLDEN / TIED), DOUBLED)


def stated() -> Any:
    """The certificate that the case has."""
    return read_manifest(GOLDEN / TIED)["certificate"]


def test_a_true_certificate_is_proven_again(proof: Certificate) -> None:
    assert [*unproven_claims(stated(), proof)] == []


def test_a_proof_by_other_bits_makes_the_same_claims(proof: Certificate) -> None:
    """Another version of Arb may give balls of another size. Bounds from larger balls are proven as well."""
    coarse = certify(read_case(GOLDEN / TIED), 96)
    assert coarse.bounds != proof.bounds
    assert [*unproven_claims(coarse.to_json(), proof)] == []


def scaled(name: str, factor: float) -> Callable[[Any], object]:
    def change(claims: Any) -> None:
        claims[name][KEY] *= factor

    return change


FALSE: dict[str, tuple[Callable[[Any], object], str]] = {
    "a smaller bound": (scaled("bounds", 1 - 1e-9), f"certificate.bounds.{KEY}"),
    "no error at all": (scaled("bounds", 0.0), f"certificate.bounds.{KEY}"),
    "a smaller relative bound": (scaled("relative", 0.99), f"certificate.relative.{KEY}"),
    "a bound too few": (lambda claims: claims["bounds"].pop(KEY), f"lacks {KEY}"),
    "a bound too many": (lambda claims: claims["bounds"].update({"prefill/none": 1.0}), "has prefill/none"),
    "a decision too many": (lambda claims: claims["decisions"].update(all=10**6), "decisions.all"),
    "decisions that are not proven": (lambda claims: claims["decisions"].update(unproven=[]), "decisions.unproven"),
    "another worst": (lambda claims: claims["worst"].update(relative=0.0), "certificate.worst"),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_false_claim_is_named(proof: Certificate, name: str) -> None:
    change, named = FALSE[name]
    claims = stated()
    change(claims)
    found = [*unproven_claims(claims, proof)]
    assert found
    assert any(named in each for each in found), found


def test_a_weaker_claim_is_true(proof: Certificate) -> None:
    claims = stated()
    scaled("bounds", 2.0)(claims)
    claims["bounds"]["prefill/layers.0.residual"] = None
    assert [*unproven_claims(claims, proof)] == []


# ---- in a package


def test_what_is_not_proven_is_said_with_its_reason(made: Made, own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    def reasons(which: str) -> list[str]:
        found = verify_package(made.package, own, made.public, certificates=which)
        (check,) = [each for each in found.checks if each.name == "certificates"]
        assert (found.faults, check.skipped, found.certified.proven) == ([], True, ())
        assert {*found.certified.read} == {*CASES}
        (note,) = check.notes
        assert all(case in note for case in CASES)
        return [*found.certified.read.values()]

    assert "flint" not in reasons(NONE)[0]
    monkeypatch.setattr(certificates, "find_spec", lambda _: None)
    assert "flint" in reasons(SOME)[0]


def test_all_without_flint_is_refused(made: Made, own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flint", None)
    with pytest.raises(InputError, match="flint"):
        verify_package(made.package, own, made.public, certificates=ALL)


def test_some_are_the_smallest(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one, whatever its size. The others are named."""
    monkeypatch.setattr(certificates, "ENOUGH", 1)
    found = certificates.certify_again(read_given(made.package))
    assert (found.proven, {*found.read}) == ((WRONG,), {*CASES} - {WRONG}), "it has the fewest parameters"
    assert all(certificates.OPTION in reason for reason in found.read.values())
