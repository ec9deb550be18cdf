# SPDX-License-Identifier: Apache-2.0
"""The files of an evidence package, and how each is written: the same content gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from refmoe.files.atomic import replacing
from refmoe.files.parsing import read_json_value
from refmoe.files.writable import make_folder
from refmoe.suite.digests import digests_text
from refmoe.suite.manifest import DIGESTS

FORMAT_VERSION = "1"

RESULTS, DECLARED = "results.json", "declared.json"
CASES, TRACES, POLICIES = "cases", "traces", "policies"
"""The inputs: two files, and the folders of golden cases, of kept traces and of policies."""
SUMMARY, CHECKPOINTS, RULES, EPSILON = "summary.json", "checkpoints.json", "policies.json", "epsilon.json"
CLAUSES, TESTS, POWER = "traceability.json", "tests.json", "power.json"
DOCUMENTS = (SUMMARY, CHECKPOINTS, RULES, EPSILON, CLAUSES, TESTS, POWER)
"""The documents that follow from the inputs."""
REPORT, TRACED, LIMITS, READINGS = PAGES = ("report.md", "traceability.md", "limits.md", "readings.md")
MATERIALS = "bom.cdx.json"
STATEMENT, ENVELOPE, KEY = "statement.json", "statement.dsse.json", "public-key.pem"
SEALS = (DIGESTS, STATEMENT, ENVELOPE, KEY)
"""The files that seal all others. The first has their digests, the second its own digest."""
CONTENTS = {
    REPORT: "the report: what was judged and by what, verdicts, epsilon, power, policies",
    TRACED: "each clause with its text, code, tests, known bugs, cases and verdicts",
    LIMITS: "what a pass does not prove: of every package, and of this one",
    READINGS: "which file answers which requirement of ED-324/ARP6983, and of Annex IV of the AI Act",
    RESULTS: "the results of the run",
    f"{TRACES}/": "the values of the engine, as it gave them",
    f"{CASES}/": "the golden cases of the run: definition, values, digests, certificate",
    f"{POLICIES}/": "policies of the author's own, where the run had any",
    DECLARED: "what nobody can derive: build, date, digests of the engine's files, versions",
    SUMMARY: "what was judged, by what, verdicts, digests",
    CHECKPOINTS: "for each case the digest of its checkpoint",
    RULES: "each policy in full, with the sources of its budgets",
    EPSILON: "the derived epsilon, per step and end to end, with the argument",
    POWER: "known bugs that these taps show, those shown to be absent, and those that are not",
    CLAUSES: "each clause with its code, known bugs, cases and verdicts",
    TESTS: "the tests that name each clause, with the digests of their files",
    MATERIALS: "the bill of materials of software and models (CycloneDX 1.6)",
    DIGESTS: "the digest of each file above",
    STATEMENT: "the result as an in-toto statement about a test; its first subject is the list of digests",
    ENVELOPE: "the signed envelope of the statement (DSSE, Ed25519), where there is one",
    KEY: "the public key of that signature",
}
"""The files and folders of a package, with what each holds."""


def trace_file(case: str, dtype: str) -> str:
    """The name of the kept trace of a case at a dtype, within a package."""
    return f"{TRACES}/{case}-{dtype}.safetensors"


def to_text(value: Any) -> str:
    """A document as the text of its file."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file and the folders above it, whole or not at all. Raises InputError when it cannot be written."""
    make_folder(path.parent, parents=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def document(folder: Path, name: str) -> Any:
    """The value of a JSON document of a package. Raises InputError when it cannot be read."""
    return read_json_value(folder / name, "a document of an evidence package")


def files_of(folder: Path) -> list[str]:
    """The relative names of all files in a package, in name order. Links count, folders do not."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def sealed_files(names: Iterable[str]) -> list[str]:
    """The names of the files whose digests a package lists."""
    return sorted({*names} - {*SEALS})


def sealed_text(folder: Path) -> str:
    """The text of the list of digests of a package."""
    return digests_text(folder, sealed_files(files_of(folder)))
