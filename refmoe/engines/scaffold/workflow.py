# SPDX-License-Identifier: Apache-2.0
"""A GitHub workflow that runs ``refmoe conform`` on every push and tolerates today's failures."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.sentences import quoted

TEMPLATE = """\
# Written by `refmoe conform --write-ci`. It fails when a case fails that {known} does not list, and when one that
# is listed there conforms again: then take its entry out.
name: conformance
on: [push, pull_request]
permissions:
  contents: read
jobs:
  refmoe:
    runs-on: ubuntu-latest
    timeout-minutes: 60
    steps:
      - uses: actions/checkout@v4
      - uses: actions/checkout@v4
        with:
          repository: {source}
          path: .refmoe
      - uses: actions/setup-python@v5
        with:
          python-version: "3.12"
      - run: python -m pip install "./.refmoe{extra}"
      # here: install or build the engine
      - run: {command}
      - uses: actions/upload-artifact@v4
        if: always()
        with:
          name: conformance
          path: conformance.json
"""


def known_file(workflow: Path) -> Path:
    """The file that lists the known failures of a workflow."""
    return workflow.with_suffix(".known.toml")


EXTRAS = {"transformers": "[engines]", "llama_cpp": "[llama-cpp]", "onnx": "[onnx]", "mlx_lm": "[mlx]"}
"""Per adapter the extra of refmoe that installs its engine, as pip reads it."""


def check_source(source: str) -> None:
    """Raises InputError unless `source` is ``OWNER/REPOSITORY`` or ``OWNER/REPOSITORY@REF``."""
    if not re.fullmatch(r"[A-Za-z0-9-]+/[\w.-]+(@[\w./-]+)?", source, re.ASCII):
        raise InputError(
            f"--refmoe-from is {quoted(source)}, but a repository on GitHub, OWNER/REPOSITORY or "
            "OWNER/REPOSITORY@REF, was expected"
        )


def write_workflow(
    path: Path, source: str, arguments: Sequence[str], harness: Sequence[str], adapter: str | None
) -> None:
    """Write the workflow. Raises InputError when the file cannot be written.

    source: the repository with refmoe and its golden cases, as for `check_source`.
    arguments: the options of ``refmoe conform`` that name no files.
    harness: the command of the harness; empty with an adapter.   adapter: the name of the adapter, or None.
    """
    known = _relative(known_file(path))
    words = ["refmoe", "conform", *arguments, "--golden", ".refmoe/golden", "--known", str(known)]
    words += ["--out", "conformance.json", *(["--", *harness] if harness else [])]
    # a JSON string is a YAML string; GitHub evaluates the text between these braces before it reads YAML
    command = json.dumps(shlex.join(words), ensure_ascii=False).replace("${{", "${{ '${{' }}")
    repository, at, ref = source.partition("@")
    source = repository + (f"\n          ref: {json.dumps(ref)}" if at else "")  # 1.10 is a text, not a number
    text = TEMPLATE.format(known=known, source=source, extra=EXTRAS.get(adapter or "", ""), command=command)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _relative(path: Path) -> Path:
    """The path relative to the current folder, the root of the repository, if it lies inside."""
    here = Path.cwd()
    return path.absolute().relative_to(here) if path.absolute().is_relative_to(here) else path
