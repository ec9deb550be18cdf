# SPDX-License-Identifier: Apache-2.0
"""Rebuild the goldens from the code alone, and compare them with a published list of digests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from refmoe import suite
from refmoe.api.goldens import Names, chosen, on_each
from refmoe.api.progress import Bars, silent
from refmoe.cuda.place import CPU
from refmoe.errors import InputError
from refmoe.files.reading import exists, is_folder
from refmoe.files.sentences import quoted
from refmoe.suite.digests import digest_faults, read_digests
from refmoe.suite.golden_folder import golden_folder
from refmoe.suite.manifest import DIGESTS
from refmoe.suite.rebuild import Rebuilt, rebuild
from refmoe.suite.work import work_in


@dataclass(frozen=True)
class Rebuilding:
    """The outcome of a rebuild."""

    digests: Path
    """The list."""
    cases: Mapping[str, Rebuilt]
    """By name, in the order in which they were rebuilt."""
    documents: tuple[str, ...] | None
    """The differences of all other files of the list, which are compared and not rebuilt.

    None: only some cases were asked for.
    """
    not_rebuilt: tuple[str, ...]
    """The cases of full size. Only their files were compared."""
    unchecked: tuple[str, ...]
    """A sentence about the cases whose worker process died."""

    @property
    def differs(self) -> bool:
        return any(each.differences for each in self.cases.values()) or bool(self.documents)

    @property
    def ok(self) -> bool:
        """Whether everything was compared, and nothing differs."""
        return not self.differs and not self.unchecked


def rebuild_goldens(
    folder: Path,
    names: Names = (),
    *,
    digests: Path | None = None,
    golden: Path | None = None,
    executor: str | None = None,
    bars: Bars = silent,
) -> Rebuilding:
    """Compute goldens from their definitions into a folder, and compare each file with the list.

    folder: new or empty   names: of cases; empty: all that are not of full size, the smallest first
    digests: the list; None: that of the golden folder   golden: the folder of cases; None: the package's own
    executor: works on cases side by side, as `parse_executor` reads it; None: a process per core. A single case of full
        size is spread over it.
    Of a case of full size, and of the documents beside the cases, only the files at hand are compared with the list.
    Raises InputError for an unknown case, a folder in use, and a list that is missing or none.
    """
    golden = golden_folder(golden)
    path = golden / DIGESTS if digests is None else digests
    lines = read_digests(path)
    listed = dict(lines)
    for name, count in Counter(name for name, _ in lines).items():
        if count > 1:
            raise InputError(f"{path}: has {count} lines for {quoted(name)}, but one was expected")
    folders = sorted(chosen(names, golden), key=work_in)
    whole = not names and folders != [golden]
    large = tuple(case.name for case in suite.find_full_size_cases(golden)) if whole else ()
    if exists(folder) and not (is_folder(folder) and not any(folder.iterdir())):
        raise InputError(f"{folder}: is in use, but a new or empty folder was expected")
    unchecked: list[str] = []
    found = on_each("rebuild", partial(rebuild, folder=folder, listed=listed), folders, CPU, executor, bars, unchecked)
    rebuilt = {case.resolve().name for case in folders}
    rest = [(name, digest) for name, digest in listed.items() if name.partition("/")[0] not in rebuilt]
    return Rebuilding(
        digests=path,
        cases={case.resolve().name: found[case] for case in folders if case in found},
        documents=tuple(f"{path}: {each}" for each in digest_faults(golden, rest)) if whole else None,
        not_rebuilt=large,
        unchecked=tuple(unchecked),
    )


def rebuilding_facts(found: Rebuilding) -> dict[str, Any]:
    """A rebuild as plain values."""
    return {
        "ok": found.ok, "digests": str(found.digests),
        "cases": {name: [*each.differences] for name, each in found.cases.items()},
        "files": {name: digest for each in found.cases.values() for name, digest in each.files.items()},
        "documents": [*(found.documents or ())], "not_rebuilt": [*found.not_rebuilt],
        "unchecked": [*found.unchecked],
    }  # fmt: skip
