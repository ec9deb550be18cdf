# SPDX-License-Identifier: Apache-2.0
"""Check an evidence package without the engine: everything that follows from its inputs is derived again.

Nothing in a package is believed because it is there. Each file is held against its digest. Then the goldens are
computed again, the traces judged again, and each document is derived again and compared, field by field. What nobody
can derive, such as the date, is covered by the signature alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from refmoe.errors import InputError, require
from refmoe.evidence.certificates import ALL, SOME, Certified, certify_again
from refmoe.evidence.compare import differences
from refmoe.evidence.declared import environment
from refmoe.evidence.documents import Derived, derive
from refmoe.evidence.given import Given, read_given
from refmoe.evidence.layout import (
    CASES,
    DECLARED,
    DOCUMENTS,
    ENVELOPE,
    KEY,
    MATERIALS,
    PAGES,
    POLICIES,
    RESULTS,
    STATEMENT,
    TESTS,
    document,
    files_of,
    sealed_files,
    trace_file,
)
from refmoe.evidence.materials import LIBRARY, materials
from refmoe.evidence.own import Own
from refmoe.evidence.pages import pages
from refmoe.evidence.statement import is_signed, key_id, public_key, signature_faults, statement
from refmoe.evidence.verdicts import not_judged_again, verdict_faults
from refmoe.files.parsing import strict_json
from refmoe.files.reading import exists, need_folder, read_text
from refmoe.files.sentences import one_line
from refmoe.suite import (
    CASE_FILE,
    MANIFEST_FILE,
    check,
    file_digest,
    read_case,
    read_manifest,
    verify_case_files,
)
from refmoe.suite.digests import read_digests
from refmoe.suite.manifest import DIGESTS, content_file

Made = TypeVar("Made")
LIBRARIES = {
    "cryptography": "a signature",
    "cyclonedx": "the bill of materials",
    "in_toto_attestation": "the statement about the test",
}
"""The libraries of the extra, and what each is for."""
CHECKS = {
    "files": "the files that a package has, and no others",
    "digests": "the digest of each file",
    "signature": "the signature, by the key",
    "statement": "the statement, made again from the files",
    "goldens": "the goldens, computed again to the last bit",
    "suite": "cases and certificates, against the suite of this refmoe",
    "certificates": "the certificates, proven again by ball arithmetic",
    "pages": "the pages, written again from the documents",
    "materials": "the bill of materials, made again from the documents",
    "inputs": "the inputs, read and put together",
    "verdicts": "the verdicts, judged again from the kept traces",
    "documents": "the documents, derived again and compared field by field",
}
"""The checks of a package in their order, with what each compares."""


@dataclass(frozen=True)
class Checked:
    """The outcome of one check."""

    name: str
    """A key of `CHECKS`."""
    faults: tuple[str, ...] = ()
    """The differences and missing files, a sentence each, beginning with the file."""
    unchecked: tuple[str, ...] = ()
    """The parts that this machine could not compare, a sentence each."""
    notes: tuple[str, ...] = ()
    """The parts that no machine can compare, or that nobody asked for, a sentence each."""
    skipped: bool = False
    """Whether nothing of it was done."""


@dataclass(frozen=True)
class Verification:
    """The outcome of all checks of a package."""

    checks: tuple[Checked, ...]
    signed_by: str
    """The SHA-256 of the public key; empty without a signature."""
    trusted: bool
    """Whether that key is the one that the caller named."""
    certified: Certified
    """The certificates that were proven again, and those that were only read."""

    @property
    def faults(self) -> list[str]:
        """All that is wrong."""
        return [fault for each in self.checks for fault in each.faults]

    @property
    def unchecked(self) -> list[str]:
        """All that this machine could not compare."""
        return [sentence for each in self.checks for sentence in each.unchecked]

    @property
    def notes(self) -> list[str]:
        """All that no machine can compare, or that nobody asked for."""
        return [sentence for each in self.checks for sentence in each.notes]


@dataclass(frozen=True)
class Package:
    """A package that is being checked."""

    folder: Path
    own: Own
    """This refmoe and its suite."""
    key: Path | None


def verify_package(
    folder: Path,
    own: Own,
    key: Path | None = None,
    advance: Callable[[], None] = lambda: None,
    certificates: str = SOME,
) -> Verification:
    """Check a package.

    own: this refmoe   key: the public key that must have signed; None: any
    advance: called after each trace and each certificate
    certificates: those to prove again, of `CHOICES`
    Raises InputError where there is no folder, the file of the key holds none, or a library is missing.
    """
    trusted = usable(folder, key, certificates)
    package = Package(folder, own, key)
    done = verify_seals(package)
    given = derived = None
    certified = Certified()
    try:
        given = read_given(folder)
        done += [_checked(package, name, partial(work, package, given)) for name, work in OF_INPUTS.items()]
        certified = _certified(package, given, certificates, advance)
        done.append(_certificates(certified))
        derived = derive(given, own, advance)
    except InputError as error:
        done.append(Checked("inputs", (_within(package, str(error)),)))
    if given is not None and derived is not None:
        done.append(_checked(package, "verdicts", partial(_verdicts, given, derived)))
        done.append(_checked(package, "documents", partial(_documents, package, given, derived)))
    signer = _signer(folder)
    return Verification(
        checks=tuple(done),
        signed_by=signer,
        trusted=trusted is not None and signer == trusted,
        certified=certified,
    )


def usable(folder: Path, key: Path | None, certificates: str) -> str | None:
    """The name of the key that must have signed, None for any. Raises InputError as `verify_package` does."""
    need_folder(folder, "an evidence package")
    for module, purpose in LIBRARIES.items():
        require(module, "evidence", purpose)
    if certificates == ALL:
        require("flint", "certify", "the proof of certificates")
    return None if key is None else key_id(public_key(key))


def verify_seals(package: Package) -> list[Checked]:
    """The first checks of a package, which derive nothing: its files, their digests and the signature."""
    return [_checked(package, name, partial(work, package)) for name, work in OF_FILES.items()]


Found = tuple[Iterable[str], Iterable[str], Iterable[str]]
"""Faults, what this machine could not compare, and what no machine can."""


def _tuples(found: Found) -> Iterator[tuple[str, ...]]:
    return (tuple(each) for each in found)


def _checked(package: Package, name: str, work: Callable[[], Found]) -> Checked:
    """Do a check. An input that cannot be read is a fault."""
    try:
        faults, unchecked, notes = _tuples(work())
        return Checked(name, faults, unchecked, notes)
    except InputError as error:
        return Checked(name, (_within(package, str(error)),))


def _within(package: Package, sentence: str) -> str:
    """A sentence without the name of the package's folder."""
    return sentence.replace(f"{package.folder}{os.sep}", "")


def _signer(folder: Path) -> str:
    try:
        return key_id(public_key(folder / KEY)) if is_signed(folder) else ""
    except InputError:
        return ""


# ---- the files and their seals


def _files(package: Package) -> Found:
    return _file_faults(package.folder), (), ()


def _file_faults(folder: Path) -> Iterator[str]:
    """Missing and unexpected files. A file of the inputs is expected where the results or a manifest name it."""
    present = files_of(folder)
    for name in present:
        if (folder / name).is_symlink() or not (folder / name).is_file():
            yield f"{name}: is a link or no ordinary file, but an ordinary file was expected"
    required = {RESULTS, DECLARED, *DOCUMENTS, *PAGES, MATERIALS, DIGESTS, STATEMENT} - {TESTS}
    required |= {ENVELOPE, KEY} if is_signed(folder) else set()
    for name in sorted(required - {*present}):
        yield f"{name}: is missing"
    given = read_given(folder)
    expected = required | {TESTS} | {trace_file(each.case, each.dtype) for each in given.results.outcomes}
    for name, case in given.stored.items():
        files = (MANIFEST_FILE, CASE_FILE, content_file(read_manifest(case.folder)))
        expected |= {f"{CASES}/{name}/{file}" for file in files}
    expected |= {f"{POLICIES}/{name.partition('+')[0]}.toml" for name in given.policies}
    for name in sorted({*present} - expected):
        yield f"{name}: no file of a package has this name"


def _digests(package: Package) -> Found:
    return _differing_digests(package.folder), (), ()


def _differing_digests(folder: Path) -> Iterator[str]:
    lines = read_digests(folder / DIGESTS)
    names = [name for name, _ in lines]
    if names != sorted({*names}):
        yield f"{DIGESTS}: its lines are not in the order of their names, each once"
    present = sealed_files(files_of(folder))
    for name in sorted({*names} - {*present}):
        yield f"{name}: is missing, but {DIGESTS} lists it"
    for name in sorted({*present} - {*names}):
        yield f"{name}: is not in {DIGESTS}"
    for name, digest in lines:
        if name in present and file_digest(folder / name) != digest:
            yield f"{name}: has another SHA-256 than {DIGESTS} says, so it was changed"


def _signature(package: Package) -> Found:
    if is_signed(package.folder):
        return signature_faults(package.folder, package.key), (), ()
    if package.key is not None:
        return [f"{ENVELOPE}: is missing, but a package signed by the key of {package.key} was expected"], (), ()
    return (), (), ["the package has no signature: nothing shows who declared the date, the build and the environment"]


def _statement(package: Package, given: Given) -> Found:
    found = document(package.folder, STATEMENT)
    wanted = strict_json(statement(given, read_text(package.folder / DIGESTS, "a list of digests")))
    return [f"{STATEMENT}: {each}" for each in differences(found, wanted)], (), ()


# ---- the goldens and the suite


def _goldens(package: Package, given: Given) -> Found:
    faults: list[str] = []
    notes: list[str] = []
    for name, case in given.cases.items():
        if case.full_size:
            notes.append(f"{name}: is of full size, so only the digests of its golden were compared")
        found = verify_case_files(case.folder) if case.full_size else check(case.folder)
        faults += [_within(package, each.what) for each in found]
        if case.digest != given.results.cases[name]:
            fresh = "" if given.results.fresh is None else f" and by the seed {given.results.fresh}"
            faults.append(f"{CASES}/{name}/{CASE_FILE}: is not the case that {RESULTS} names by its SHA-256{fresh}")
    return faults, (), notes


def _suite(package: Package, given: Given) -> Found:
    """The cases against those of this refmoe. A certificate that is not proven again must be the suite's own."""
    faults: list[str] = []
    unchecked: list[str] = []
    golden, own = package.own.golden, package.own.cases
    for name, case in given.stored.items():
        place = f"{CASES}/{name}"
        if name not in own:
            unchecked.append(f"{place}: is a case that {golden} lacks, so its certificate was not compared")
            continue
        if read_case(own[name]).digest != case.digest:
            faults.append(f"{place}/{CASE_FILE}: is not the case of this name in {golden}")
        theirs, ours = read_manifest(case.folder), read_manifest(own[name])
        faults += [
            f"{place}/{MANIFEST_FILE}: {each}, as in {golden}"
            for field in ("tensors", "certificate")
            for each in differences(theirs[field], ours[field], field)
        ]
    return faults, unchecked, ()


def _certified(package: Package, given: Given, which: str, advance: Callable[[], None]) -> Certified:
    """The certificates, proven again. A golden that cannot be read is a fault."""
    try:
        return certify_again(given, which, advance)
    except InputError as error:
        return Certified(faults=(_within(package, str(error)),))


def _certificates(certified: Certified) -> Checked:
    """A note for each reason why certificates were only read."""
    names: dict[str, list[str]] = {}
    for name, reason in certified.read.items():
        names.setdefault(reason, []).append(name)
    notes = tuple(f"{', '.join(each)}: the certificate was only read: {reason}" for reason, each in names.items())
    return Checked("certificates", certified.faults, notes=notes, skipped=not certified.proven)


# ---- what follows from the inputs


def _verdicts(given: Given, derived: Derived) -> Found:
    return verdict_faults(given, derived.judged), (), not_judged_again(given, derived.judged)


def _documents(package: Package, given: Given, derived: Derived) -> Found:
    """The documents. Those of another source or suite may differ, so that differences from them are no faults."""
    folder, written_by = package.folder, given.declared.refmoe
    same = (written_by["source"], written_by["suite"]) == (package.own.source, package.own.suite)
    faults: list[str] = []
    unchecked: list[str] = []
    for name in DOCUMENTS:
        if name not in derived.documents:
            unchecked.append(f"{name}: was not compared, as this installation of refmoe has no tests")
        elif name == TESTS and not exists(folder / name):
            unchecked.append(f"{name}: is not there, as the package was written without the tests of refmoe")
        else:
            found = [f"{name}: {each}" for each in differences(document(folder, name), derived.documents[name])]
            if found and not same:
                other = f"refmoe {written_by['version']} of another source or suite"
                unchecked.append(f"{name}: differs from what this refmoe derives, and {other} wrote it")
            else:
                faults += found
    return faults, unchecked, ()


def _pages(_package: Package, given: Given) -> Found:
    made = _made(given, partial(pages, given.declared, given.results))
    found = {name: read_text(given.folder / name, "a page") for name in made}
    return [fault for name, text in made.items() for fault in _line_faults(name, found[name], text)], (), ()


def _made(given: Given, make: Callable[[Mapping[str, Any]], Made]) -> Made:
    """Make a file anew from the documents of a package. Raises InputError for documents that cannot be its source."""
    documents = {name: document(given.folder, name) for name in DOCUMENTS if exists(given.folder / name)}
    try:
        return make(documents)
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{', '.join(DOCUMENTS)}: one of them has not the fields of its format: {one_line(error)}"
        ) from None


def _line_faults(name: str, found: str, wanted: str) -> Iterator[str]:
    """The first line in which a page differs from the one that follows from the documents."""
    if found != wanted:
        pairs = zip_longest(found.splitlines(), wanted.splitlines())
        number = next((i for i, (one, other) in enumerate(pairs, 1) if one != other), 0)
        yield f"{name}: line {number} is not the one that follows from the documents"


def _materials(_package: Package, given: Given) -> Found:
    """The bill of materials. Another version of CycloneDX's library may write the same otherwise."""
    wanted = strict_json(_made(given, partial(materials, given.declared)))
    found = [f"{MATERIALS}: {each}" for each in differences(document(given.folder, MATERIALS), wanted)]
    if found and environment().get(LIBRARY) != given.declared.environment.get(LIBRARY):
        return (), [f"{MATERIALS}: differs from what this version of {LIBRARY} writes, and another wrote it"], ()
    return found, (), ()


OF_FILES: Mapping[str, Callable[[Package], Found]] = {
    "files": _files, "digests": _digests, "signature": _signature,
}  # fmt: skip
OF_INPUTS: Mapping[str, Callable[[Package, Given], Found]] = {
    "statement": _statement, "goldens": _goldens, "suite": _suite, "pages": _pages, "materials": _materials,
}  # fmt: skip
