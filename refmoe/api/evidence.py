# SPDX-License-Identifier: Apache-2.0
"""Evidence packages: write one from the results of an engine, and check one without the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refmoe.api.progress import Bars, silent
from refmoe.engines.results import read_results
from refmoe.errors import InputError
from refmoe.evidence.certificates import CHOICES as CERTIFICATES
from refmoe.evidence.certificates import SOME
from refmoe.evidence.documents import result_of
from refmoe.evidence.layout import EPSILON, RESULTS, document, files_of
from refmoe.evidence.own import this_refmoe
from refmoe.evidence.pages import figure
from refmoe.evidence.statement import is_signed
from refmoe.evidence.verify import CHECKS, Verification, usable, verify_package
from refmoe.evidence.write import Wanted, write_package
from refmoe.suite.golden_folder import golden_folder


def write_evidence(folder: Path, wanted: Wanted, bars: Bars = silent) -> dict[str, Any]:
    """Write an evidence package into a new or empty folder, and return its facts.

    Raises InputError when the folder is in use, or the results are not a finished run of this suite. Raises it too when
    the trace of a verdict is missing, or gives another verdict.
    """
    with bars("evidence", len(read_results(wanted.results).outcomes)) as advance:
        given = write_package(folder, wanted, advance)
    return {
        "folder": str(folder),
        "result": result_of(given),
        "files": files_of(folder),
        "signed": is_signed(folder),
        "end_to_end": {
            dtype: found["end_to_end"] for dtype, found in document(folder, EPSILON)["dtypes"].items()
        },
    }  # fmt: skip


def verify_evidence(
    folder: Path, golden: Path | None = None, key: Path | None = None, bars: Bars = silent, certificates: str = SOME
) -> Verification:  # fmt: skip
    """Check an evidence package.

    golden: the suite of this refmoe; None: the package's own   key: the public key that must have signed; None: any
    certificates: those to prove again by ball arithmetic, of `CERTIFICATES`; python-flint does it
    Raises InputError where there is no such folder, or the file of the key holds none.
    """
    usable(folder, key, certificates)  # before this refmoe is read, which takes seconds
    own = this_refmoe(golden_folder(golden))
    with bars("evidence", _steps(folder)) as advance:
        return verify_package(folder, own, key, advance, certificates)


def _steps(folder: Path) -> int:
    """The number of traces and certificates in a package, 0 where its results cannot be read."""
    try:
        results = read_results(folder / RESULTS)
    except InputError:
        return 0  # the checks say what is wrong
    return len(results.outcomes) + len(results.cases)


def verification_facts(found: Verification) -> dict[str, Any]:
    """A verification as plain values."""
    return {
        "verified": not found.faults,
        "faults": found.faults,
        "unchecked": found.unchecked,
        "notes": found.notes,
        "signed_by": found.signed_by or None,
        "trusted": found.trusted,
        "certificates": {"proven_again": [*found.certified.proven], "only_read": {**found.certified.read}},
        "checks": {
            each.name: {
                "about": CHECKS[each.name],
                "faults": list(each.faults),
                "unchecked": list(each.unchecked),
                "notes": list(each.notes),
                "skipped": each.skipped,
            }
            for each in found.checks
        },
    }  # fmt: skip


__all__ = [
    "CERTIFICATES", "CHECKS", "SOME", "Verification", "Wanted", "figure", "verification_facts", "verify_evidence",
    "write_evidence",
]  # fmt: skip
