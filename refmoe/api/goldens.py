# SPDX-License-Identifier: Apache-2.0
"""The golden folder: check it, certify it, emit it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from refmoe import suite
from refmoe.api.progress import Bars, silent
from refmoe.cuda.place import CPU, Place
from refmoe.errors import InputError
from refmoe.files.lock import locked
from refmoe.parallel import WorkerDied, results
from refmoe.suite import Case
from refmoe.suite.certify import Certificate, certify
from refmoe.suite.digests import renew_digests
from refmoe.suite.golden_folder import case_folder, golden_folder
from refmoe.suite.work import work_in

Names = Sequence[str]
Done = TypeVar("Done")


def chosen(names: Names, golden: Path, families: Collection[str] = suite.FAMILIES) -> list[Path]:
    """The folders of these cases; without names, of all in the families below full size. Raises InputError."""
    return [case_folder(name, golden) for name in names] if names else suite.find_cases(golden, families)


# ---- check


@dataclass(frozen=True)
class Checked:
    """The differences between a golden folder and its manifests or its recomputed values."""

    cases: dict[str, list[str]]
    """Per case the differences, a sentence each."""
    documents: list[str] | None
    """The differences of the documents beside the cases; None when only some cases were checked."""
    leftovers: list[str]
    """Files that a killed emission left behind. They are harmless."""
    not_recomputed: list[Path]
    """The cases of full size, of which only the files were compared."""
    unchecked: list[str]
    """A sentence about the cases whose worker process died; they are not among `cases`."""

    @property
    def ok(self) -> bool:
        """Whether everything was compared, and nothing differs."""
        return not self.differs and not self.unchecked

    @property
    def differs(self) -> bool:
        return any(self.cases.values()) or bool(self.documents)

    @property
    def recomputed(self) -> int:
        return len(self.cases) - len(self.not_recomputed)


def check_goldens(
    golden: Path | None = None,
    names: Names = (),
    *,
    place: Place = CPU,
    executor: str | None = None,
    bars: Bars = silent,
) -> Checked:
    """Recompute golden cases, and compare every bit and the digest of every file.

    golden: the folder of cases; None: the package's own.   names: of cases; empty: all, and the documents beside them
    executor: works on cases side by side, as `parse_executor` reads it; None: a process per core. A single case of full
        size is spread over it.
    Of a case of full size only the files are compared, unless it is named. Raises InputError for an unknown case.
    """
    golden = golden_folder(golden)
    folders = chosen(names, golden)
    whole = not names and folders != [golden]
    large = suite.find_full_size_cases(golden) if whole else []
    unchecked: list[str] = []
    # the longest first, so that no worker is left alone with one at the end
    ordered = sorted(folders, key=work_in, reverse=True)
    found = on_each("check", suite.check, ordered, place, executor, bars, unchecked)
    found |= {case: suite.verify_case_files(case) for case in large}
    compared = [case for case in [*folders, *large] if case in found]
    return Checked(
        cases={case.resolve().name: [each.what for each in found[case]] for case in compared},
        documents=[each.what for each in suite.verify_documents(golden)] if whole else None,
        leftovers=[
            str(path) for folder in [golden, *folders][not whole :] for path in suite.leftovers(folder)
        ],
        not_recomputed=large, unchecked=unchecked,
    )  # fmt: skip


def on_each(
    title: str, do: Callable[..., Done], folders: Sequence[Path], place: Place, executor: str | None, bars: Bars,
    unchecked: list[str],
) -> dict[Path, Done]:  # fmt: skip
    """Do something with each case, and return what it gave. The bar counts layers of a single case, else cases.

    do: called with the folder of a case, `place`, and for a single case also `progress` and `executor`
    unchecked: gets a sentence when a worker process dies
    """
    try:
        alone = suite.read_case(folders[0]) if len(folders) == 1 else None
    except InputError:
        alone = None  # doing it says what is wrong
    if alone is not None:
        with bars(alone.name, len(alone.runs()) * len(alone.computed)) as advance:
            return {folders[0]: do(folders[0], progress=advance, place=place, executor=executor)}
    found: dict[Path, Done] = {}
    with (
        bars(title, len(folders)) as advance,
        results(partial(do, place=place), folders, place.executor(executor)) as done,
    ):
        try:
            for case, each in done:
                found[case] = each
                advance()
        except WorkerDied as death:
            unchecked.append(str(death))
    return found


# ---- certify


def certify_goldens(
    golden: Path | None = None,
    names: Names = (),
    *,
    write: bool = False,
    executor: str | None = None,
    bars: Bars = silent,
) -> dict[str, Certificate]:
    """Prove for golden cases how close every value is to the real number. Needs python-flint.

    write: whether the certificates are written into the manifests of the folder
    Returns the certificate of each case, by its name. Raises InputError for an unknown case.
    """
    golden = golden_folder(golden)
    folders = chosen(names, golden)
    found: dict[Path, Certificate] = {}
    prove = partial(_certify, write=write)
    with bars("certify", len(folders)) as advance, results(prove, folders, executor) as certified:
        for path, certificate in certified:
            found[path] = certificate
            advance()
    if write:
        renew_digests(golden)
    return {path.resolve().name: found[path] for path in folders}


def _certify(path: Path, write: bool) -> Certificate:
    manifest = suite.read_manifest(path)
    certificate = certify(suite.read_case(path))
    if write:
        suite.write_manifest(path, manifest | {"certificate": certificate.to_json()})
    return certificate


# ---- emit


def emit_goldens(
    golden: Path, names: Names = (), *, place: Place = CPU, executor: str | None = None, bars: Bars = silent
) -> list[Path]:
    """Write golden values into a folder of cases.

    names: of the cases to write; empty: all that are not written yet in their present form, and the manifest of the
        folder; a case of full size must be named.
    Returns the files of values that were written. Raises InputError for a case that cannot be read.
    """
    cases = [suite.read_case(path) for path in chosen(names, golden)]
    if not names and cases[0].folder == golden:
        raise InputError(f"{golden}: is a case, but a folder of cases was expected")
    with locked(golden):
        if names:
            written = [_emit_one(case, place, executor, bars) for case in cases]
        else:
            written = _emit_missing(golden, cases, place, executor, bars)
        renew_digests(golden)
    return written


def _emit_missing(golden: Path, cases: list[Case], place: Place, executor: str | None, bars: Bars) -> list[Path]:
    """Write the cases that are not written yet in their present form, and the manifest of the folder."""
    for folder in [golden, *(case.folder for case in cases)]:
        suite.remove_leftovers(folder)
    wanted = [case for case in cases if not suite.is_emitted(case)]
    write = partial(suite.emit, place=place)
    written: dict[str, Path] = {}
    with bars("emit", len(wanted)) as advance, results(write, wanted, place.executor(executor)) as emitted:
        for case, path in emitted:
            written[case.name] = path
            advance()
    suite.write_folder_manifest(golden)
    return [written[case.name] for case in wanted]


def _emit_one(case: Case, place: Place, executor: str | None, bars: Bars) -> Path:
    with bars(case.name, len(case.runs()) * len(case.computed)) as advance:
        return suite.emit(case, advance, place, executor)
