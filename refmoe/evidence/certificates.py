# SPDX-License-Identifier: Apache-2.0
"""The certificates of a package's goldens, proven again by ball arithmetic where python-flint is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate

from refmoe.evidence.given import Given
from refmoe.evidence.layout import CASES
from refmoe.suite import MANIFEST_FILE, Case, read_manifest
from refmoe.suite.certify import DOUBLED, certify, unproven_claims
from refmoe.suite.work import work

ALL, SOME, NONE = CHOICES = ("all", "some", "none")
"""The certificates to prove again."""
ENOUGH = 1 << 28
"""`SOME` are the smallest cases whose work together, parameters times tokens, is at most this."""
OPTION = "--certificates all"


@dataclass(frozen=True)
class Certified:
    """The certificates of a package after ball arithmetic: proven again, or only read."""

    proven: tuple[str, ...] = ()
    """The cases whose certificate was proven again, and those in which a claim of it could not be."""
    read: Mapping[str, str] = field(default_factory=dict)
    """The other cases, each with the reason why its certificate was only read."""
    faults: tuple[str, ...] = ()
    """The claims that could not be proven, a sentence each."""


def certify_again(given: Given, which: str = SOME, advance: Callable[[], None] = lambda: None) -> Certified:
    """Prove certificates again.

    which: one of `CHOICES`   advance: called after each case
    Raises InputError for a golden that cannot be read.
    """
    read = {name: reason for name, case in given.stored.items() if (reason := why_not(given, case))}
    left = {name: case for name, case in given.stored.items() if name not in read}
    if which == NONE:
        read |= dict.fromkeys(left, "no proof was asked for")
    elif find_spec("flint") is None:
        read |= dict.fromkeys(left, "python-flint is not installed (pip install 'refmoe[certify]')")
    else:
        wanted = {*left} if which == ALL else smallest(left)
        read |= {name: f"it takes longer; {OPTION} proves it" for name in left if name not in wanted}
    proven: list[str] = []
    faults: list[str] = []
    for name, case in given.stored.items():
        if name not in read:
            faults += claims_without_proof(name, case)
            proven.append(name)
        advance()
    return Certified(tuple(proven), read, tuple(faults))


def why_not(given: Given, case: Case) -> str:
    """The reason why no machine proves the certificate of a case; empty where one can."""
    if given.results.fresh is not None:
        return "no figure rests on it, since fresh cases were run"
    if case.full_size:
        return "at full size ball arithmetic takes days"
    return "" if read_manifest(case.folder)["certificate"] else "there is none"


def smallest(cases: Mapping[str, Case]) -> set[str]:
    """The smallest cases whose work together is at most `ENOUGH`, and at least one."""
    ordered = sorted(cases, key=lambda name: (work(cases[name]), name))
    totals = accumulate(work(cases[name]) for name in ordered)
    return {name for i, (name, total) in enumerate(zip(ordered, totals, strict=True)) if total <= ENOUGH or i == 0}


def claims_without_proof(name: str, case: Case) -> list[str]:
    """The claims of a certificate that are not proven, a sentence each."""
    stated = read_manifest(case.folder)["certificate"]
    return [f"{CASES}/{name}/{MANIFEST_FILE}: {each}" for each in unproven_claims(stated, certify(case, DOUBLED))]
