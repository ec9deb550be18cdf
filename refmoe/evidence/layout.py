# SPDX-License-Identifier: Apache-2.0
"""The files of an evidence package, and how each is written: the same content gives the same bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.parsing import read_json_value
from refmoe.files.reading import read_text
from refmoe.files.sentences import quoted
from refmoe.files.writable import make_folder
from refmoe.suite.manifest import file_digest

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
DIGESTS, STATEMENT, ENVELOPE, KEY = "SHA256SUMS", "statement.json", "statement.dsse.json", "public-key.pem"
SEALS = (DIGESTS, STATEMENT, ENVELOPE, KEY)
"""The files that seal all others. The first has their digests, the second its own digest."""
DIGEST_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


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


def digests_text(folder: Path, names: Iterable[str]) -> str:
    """The text of the list of digests, as ``sha256sum -c`` reads it."""
    return "".join(f"{file_digest(folder / name)}  {name}\n" for name in sealed_files(names))


def read_digests(folder: Path) -> list[tuple[str, str]]:
    """The lines of the list of digests: (name, SHA-256). Raises InputError for a line that is none."""
    path = folder / DIGESTS
    return [*_lines(path, read_text(path, "a list of digests"))]


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        match = DIGEST_LINE.fullmatch(line)
        if match is None:
            raise InputError(
                f"{path}: line {number} is {quoted(line)}, but a SHA-256, two blanks and a name were expected"
            )
        yield match[2], match[1]
