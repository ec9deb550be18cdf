# SPDX-License-Identifier: Apache-2.0
"""Where the vector files are, and how they are read and spelled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent.parent / "golden" / "vectors"


def load(name: str) -> dict[str, Any]:
    """A vector file of the repository."""
    content: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="ascii"))
    return content


def dumps(content: dict[str, Any]) -> str:
    """A vector file's text: ASCII, one vector a line, so that a diff shows the changed vectors."""
    head = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "vectors"]
    vectors = ",\n".join("  " + json.dumps(vector) for vector in content["vectors"])
    return "{\n" + "".join(f" {line},\n" for line in head) + ' "vectors": [\n' + vectors + "\n ]\n}\n"
