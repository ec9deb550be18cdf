# SPDX-License-Identifier: Apache-2.0
"""Write an evidence package. What it says follows from its own files, so it is derived from those that were written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refmoe.engines.conform import UNFINISHED
from refmoe.engines.results import Results, read_results, to_json
from refmoe.engines.run_case import kept_name
from refmoe.errors import InputError
from refmoe.evidence.declared import Declared, declare
from refmoe.evidence.documents import Derived, derive
from refmoe.evidence.given import FROM_A_TRACE, WITHOUT_A_TRACE, Given, as_run, read_given
from refmoe.evidence.layout import (
    CASES,
    DECLARED,
    ENVELOPE,
    KEY,
    MATERIALS,
    POLICIES,
    RESULTS,
    STATEMENT,
    sealed_text,
    to_text,
    trace_file,
    write_file,
)
from refmoe.evidence.materials import materials
from refmoe.evidence.own import this_refmoe
from refmoe.evidence.pages import pages
from refmoe.evidence.statement import private_key, signed, statement
from refmoe.evidence.verdicts import verdict_faults
from refmoe.files.reading import exists, is_folder, read_bytes
from refmoe.profiles.load import policy as named_policy
from refmoe.suite import CASE_FILE, read_case, read_manifest
from refmoe.suite.golden_folder import case_folder
from refmoe.suite.manifest import DIGESTS, LARGEST, MANIFEST_FILE


@dataclass(frozen=True)
class Wanted:
    """The package to write."""

    results: Path
    """The file of ``refmoe conform --out``."""
    traces: Path
    """The folder of ``refmoe conform --keep``."""
    golden: Path
    """The suite of the run."""
    policies: Sequence[str] = ()
    """Files of policies by which the run was judged, beside refmoe's own."""
    build: str = ""
    artifacts: tuple[Path, ...] = ()
    """Files of the engine."""
    date: str | None = None
    """``YYYY-MM-DD``; None: today."""
    key: Path | None = None
    """A private key to sign with."""


def write_package(folder: Path, wanted: Wanted, advance: Callable[[], None] = lambda: None) -> Given:
    """Write a package into a new or empty folder.   advance: called after each trace

    The seals are written last, so that a package that was not finished does not pass for one.
    Raises InputError when the folder is in use, or the results are not a finished run of this suite. Raises it too when
    the trace of a verdict is missing, or gives another verdict.
    """
    if exists(folder) and not (is_folder(folder) and not any(folder.iterdir())):
        raise InputError(f"{folder}: is in use, but a new or empty folder was expected")
    key = None if wanted.key is None else private_key(wanted.key)
    results = checked_results(wanted)
    _write_inputs(folder, wanted, results, declare(wanted.golden, wanted.date, wanted.build, wanted.artifacts))
    given = read_given(folder)
    derived = derive(given, this_refmoe(wanted.golden), advance)
    faults = verdict_faults(given, derived.judged)
    if faults:
        raise InputError(f"{faults[0]}, so the traces in {wanted.traces} are not those of {wanted.results}")
    write_derived(given, derived, key)
    return given


def checked_results(wanted: Wanted) -> Results:
    """The results of a run that was finished, on the cases of the suite as they are. Raises InputError."""
    results = read_results(wanted.results)
    if results.quantised:
        raise InputError(
            f"{wanted.results}: is of a run with weights as {results.quantised}, but one of the golden cases was "
            "expected"
        )
    if UNFINISHED in results.notes:
        raise InputError(f"{wanted.results}: is of a run that was ended, but a whole one was expected (--resume)")
    if not results.outcomes:
        raise InputError(f"{wanted.results}: has no outcome, but one or more were expected")
    for name, digest in results.cases.items():
        found = as_run(read_case(case_folder(name, wanted.golden)), results.fresh).digest
        if found != digest:
            raise InputError(
                f"{wanted.results}: case {name} has the digest {digest[:16]}..., but that of {wanted.golden} has "
                f"{found[:16]}..., so the run was of another suite"
            )
    return results


def _write_inputs(folder: Path, wanted: Wanted, results: Results, declared: Declared) -> None:
    """Copy the inputs of a package into its folder. Raises InputError for a trace that is missing."""
    write_file(folder / RESULTS, to_json(results))
    write_file(folder / DECLARED, to_text(declared.to_json()))
    for name in results.cases:
        source = case_folder(name, wanted.golden)
        for file in (MANIFEST_FILE, CASE_FILE, *read_manifest(source)["files"]):
            write_file(folder / CASES / name / file, read_bytes(source / file, "a file of a case", LARGEST))
    for text in wanted.policies:
        path = Path(text.partition(".toml")[0] + ".toml")
        base = named_policy(str(path)).name
        write_file(folder / POLICIES / f"{base}.toml", read_bytes(path, "a policy in TOML"))
    for each in results.outcomes:
        kept = wanted.traces / kept_name(each.case, each.dtype)
        if each.verdict in WITHOUT_A_TRACE:
            continue
        if exists(kept):
            write_file(folder / trace_file(each.case, each.dtype), read_bytes(kept, "a kept trace", LARGEST))
        elif each.verdict in FROM_A_TRACE:
            raise InputError(
                f"{kept}: no such file, but the trace of a verdict was expected; refmoe conform --keep DIR keeps them"
            )


def write_derived(given: Given, derived: Derived, key: Any = None) -> None:
    """Write all that follows from the inputs of a package, and its seals.   key: a private key; None: no signature"""
    folder = given.folder
    for name, value in derived.documents.items():
        write_file(folder / name, to_text(value))
    for name, text in made_of(given, derived.documents).items():
        write_file(folder / name, text)
    seal(given, key)


def made_of(given: Given, documents: Mapping[str, Any]) -> dict[str, str]:
    """The texts that follow from the documents: the bill of materials and the pages."""
    made = pages(given.declared, given.results, documents)
    return {MATERIALS: materials(given.declared, documents), **made}


def seal(given: Given, key: Any = None) -> None:
    """Write the list of digests, the statement and, with a private key, its envelope and the public key."""
    folder = given.folder
    digests = sealed_text(folder)
    write_file(folder / DIGESTS, digests)
    text = statement(given, digests)
    write_file(folder / STATEMENT, text)
    if key is not None:
        made = signed(text, key)
        write_file(folder / ENVELOPE, made.envelope)
        write_file(folder / KEY, made.key)
