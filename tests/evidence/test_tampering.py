# SPDX-License-Identifier: Apache-2.0
"""Every kind of tampering with a package is found, and the file is named.

A package that nobody touched passes all checks: `test_package.py` says so. So each finding here is of the tampering.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from refmoe.evidence.certificates import NONE, SOME
from refmoe.evidence.own import Own
from refmoe.evidence.verify import CHECKS, Checked, Package, verify_package, verify_seals
from tests.evidence.conftest import Made
from tests.evidence.tamperings import SEALS, TAMPERINGS, Tampering, seals_again


def found_by(checks: Sequence[Checked], file: str) -> set[str]:
    """The checks that name the file in a fault."""
    return {each.name for each in checks if any(file in fault for fault in each.faults)}


def of(kinds: list[Tampering]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", kinds, ids=[kind.name for kind in kinds])


@of(TAMPERINGS)
def test_a_change_is_found(kind: Tampering, package: Path, own: Own, made: Made) -> None:
    """First by the digests alone. Then the tamperer makes digests and statement anew, and the values themselves tell.

    With a key of his own he can sign them, too. Then the key tells, if one knows that of the author.
    """
    if kind.found_by == "certificates":
        pytest.importorskip("flint")
    kind.act(package)
    before = verify_seals(Package(package, own, made.public))
    assert found_by(before, kind.file), before
    seals_again(package, made.other)
    proof = SOME if kind.found_by == "certificates" else NONE
    after = verify_package(package, own, made.public, certificates=proof)
    assert "signature" in {each.name for each in after.checks if each.faults}, "the key is another, or there is none"
    assert kind.found_by in found_by(after.checks, kind.named), after.faults


@of(SEALS)
def test_a_change_of_the_seals_is_found(kind: Tampering, package: Path, own: Own, made: Made) -> None:
    kind.act(package)
    found = verify_package(package, own, made.public, certificates=NONE)
    assert kind.found_by in found_by(found.checks, kind.file), found.faults


def test_there_is_a_tampering_for_every_check() -> None:
    assert len(TAMPERINGS) + len(SEALS) >= 20
    assert {kind.found_by for kind in [*TAMPERINGS, *SEALS]} == {*CHECKS}
