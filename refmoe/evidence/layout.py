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
REPORT, LIMITS, READINGS = PAGES = ("report.md", "limits.md", "readings.md")
MATERIALS = "bom.cdx.json"
STATEMENT, ENVELOPE, KEY = "statement.json", "statement.dsse.json", "public-key.pem"
SEALS = (DIGESTS, STATEMENT, ENVELOPE, KEY)
"""The files that seal all others. The first has their digests, the second its own digest."""


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
