# SPDX-License-Identifier: Apache-2.0
"""Search for inputs by coverage: atheris changes a file so that it reaches new branches of its reader.

    pip install atheris
    python -m tests.fuzz.inputs_coverage .npy -max_total_time=600

A reader may raise InputError, and nothing else. Whatever follows the name of the target is for libFuzzer.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from refmoe.errors import InputError

Reader = Callable[[Path], Any]


def readers() -> dict[str, tuple[str, Reader]]:
    """By name: the file to write, and the function that reads it."""
    from refmoe.checkpoints.load import load_checkpoint
    from refmoe.engines.known import read_known
    from refmoe.engines.results import read_results
    from refmoe.files.npy_file import map_npy, read_npz
    from refmoe.files.parsing import read_json_value, toml
    from refmoe.files.safetensors_file import open_safetensors
    from refmoe.suite.case import read_case
    from refmoe.suite.fingerprint import read_fingerprints
    from refmoe.suite.manifest import read_manifest
    from refmoe.text.chat import load_chat
    from refmoe.traces.trace import read_trace

    return {
        ".json": ("a.json", lambda path: read_json_value(path, "JSON")),
        ".toml": ("a.toml", lambda path: toml(path, "TOML")),
        ".npy": ("a.npy", map_npy),
        ".npz": ("a.npz", read_npz),
        "safetensors": ("a.safetensors", open_safetensors),
        "trace": ("a.safetensors", read_trace),
        "config.json": ("config.json", lambda path: load_checkpoint(path.parent)),
        "params.json": ("params.json", lambda path: load_checkpoint(path.parent)),
        "case.toml": ("case.toml", lambda path: read_case(path.parent)),
        "manifest.json": ("manifest.json", lambda path: read_manifest(path.parent)),
        "fingerprints": ("a.json", read_fingerprints),
        "results.json": ("results.json", read_results),
        "known.toml": ("known.toml", read_known),
        "chat.json": ("chat.json", load_chat),
    }


def one_input(name: str, folder: Path, data: bytes) -> None:
    """Let a reader read these bytes. Raises whatever it raises but InputError."""
    file, read = readers()[name]
    path = folder / file
    path.write_bytes(data)
    with suppress(InputError):
        read(path)


def main() -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: pip install atheris")
    with atheris.instrument_imports(include=["refmoe"]):
        known = readers()
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        sys.exit(f"one of these was expected: {', '.join(known)}")
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder:
        atheris.Setup(sys.argv, lambda data: one_input(name, Path(folder), data))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
