# SPDX-License-Identifier: Apache-2.0
"""Files by which a CI system runs ``refmoe conform`` on every push, and tolerates today's failures."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from refmoe import __version__
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.files.sentences import quoted
from refmoe.files.writable import make_folder, refuse_output

KNOWN = "refmoe-known.toml"
"""The name of the list of known failures that is written."""
EXTRAS = {"transformers": "engines", "llama_cpp": "llama-cpp", "onnx": "onnx", "mlx_lm": "mlx"}
"""Per adapter the extra of refmoe that installs its engine."""
REF = f"v{__version__.partition('.')[0]}"
"""The tag of refmoe that is taken unless another is named."""


@dataclass(frozen=True)
class Pipeline:
    """The run that a CI system repeats."""

    source: str
    """``OWNER/REPOSITORY[@REF]`` of refmoe on GitHub, as for `check_source`."""
    options: Mapping[str, Sequence[str]]
    """The options of ``refmoe conform`` that name no files, without their dashes, each with its values."""
    harness: Sequence[str]
    """The command of the harness; empty with an adapter."""
    known: Path
    """The list of known failures, relative to the root of the repository."""
    places: Sequence[str]
    """The values of ``--source``; with any, alerts are shown at the lines of source."""

    @property
    def repository(self) -> tuple[str, str]:
        """The repository of refmoe, and its tag, branch or commit."""
        repository, _, ref = self.source.partition("@")
        return repository, ref or REF

    @property
    def extra(self) -> str:
        """The extras of refmoe for the engine and for GGUF files, with commas; empty where none is needed."""
        found = [EXTRAS.get(adapter, "") for adapter in self.options.get("adapter", ())]
        found += [EXTRAS["llama_cpp"]] * ("format" in self.options)
        return ",".join(dict.fromkeys(filter(None, found)))

    def words(self, *files: str) -> str:
        """The command line.   files: the options that name files which are written"""
        words = [word for name, values in self.options.items() for value in values for word in (f"--{name}", value)]
        words += ["--known", str(self.known), *files, *(["--", *self.harness] if self.harness else [])]
        return shlex.join(["refmoe", "conform", *words])

    def requirement(self) -> str:
        """Refmoe, as pip reads it."""
        repository, ref = self.repository
        extra = f"[{self.extra}]" if self.extra else ""
        return f"refmoe{extra} @ git+https://github.com/{repository}@{ref}"


def check_source(source: str) -> None:
    """Raises InputError unless `source` is ``OWNER/REPOSITORY`` or ``OWNER/REPOSITORY@REF``."""
    if not re.fullmatch(r"[A-Za-z0-9-]+/[\w.-]+(@[\w./-]+)?", source, re.ASCII):
        raise InputError(
            f"--refmoe-from is {quoted(source)}, but a repository on GitHub, OWNER/REPOSITORY or "
            "OWNER/REPOSITORY@REF, was expected"
        )


# ---- the systems


def _github(run: Pipeline) -> str:
    repository, ref = run.repository
    inputs = {_INPUTS[name]: "\n".join(map(_line, values)) for name, values in run.options.items()}
    inputs |= {"command": shlex.join(run.harness)} if run.harness else {}
    inputs |= {"extras": run.extra} if run.extra else {}
    inputs |= {"known": str(run.known)}
    inputs |= {"sources": "\n".join(map(_line, run.places)), "sarif": "upload"} if run.places else {}
    return GITHUB.format(
        permission="\n  security-events: write  # the alerts of code scanning" if run.places else "",
        uses=f"{repository}@{ref}",
        inputs="".join(f"\n          {name}: {_yaml(value, github=True)}" for name, value in inputs.items()),
    )


_INPUTS = {
    "adapter": "adapter", "option": "options", "case": "cases", "family": "families", "dtype": "dtypes",
    "policy": "policies", "fresh": "fresh", "timeout": "timeout", "format": "format", "quantise": "quantise",
    "server": "server", "server-kind": "server-kind", "server-model": "server-model",
}  # fmt: skip
"""Per option of the command the input of the action, of which several values are lines."""


def _line(value: str) -> str:
    """A value that is a line of an input. Raises InputError where it has more than one."""
    if value.splitlines() != [value] or value != value.strip():
        raise InputError(
            f"--write-ci github: {quoted(value)} is no line by itself, but the action reads lines without blanks "
            "around them"
        )
    return value


def _gitlab(run: Pipeline) -> str:
    files = "--out", "refmoe-results.json", "--junit", "refmoe-junit.xml", "--badge", "refmoe-badge.json"
    install = shlex.join(["python", "-m", "pip", "install", run.requirement()])
    return GITLAB.format(install=_yaml(install), command=_yaml(run.words(*files)))


def _shell(run: Pipeline) -> str:
    install = shlex.join(["python3", "-m", "pip", "install", run.requirement()])
    return SHELL.format(install=install, command=run.words("--out", "refmoe-results.json"))


def _yaml(text: str, github: bool = False) -> str:
    """A text as a string of YAML.   github: whether GitHub reads it, which evaluates ${{ }} before it reads YAML"""
    if re.search("[\ud800-\udfff]", text):
        raise InputError(f"--write-ci: {quoted(text)} is not UTF-8, but a file of a CI system is")
    found = json.dumps(text, ensure_ascii=False)  # a JSON string is a YAML string, but for these characters
    found = re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda c: f"\\u{ord(c[0]):04x}", found)
    return found.replace("${{", "${{ '${{' }}") if github else found


GITHUB = """\
# Written by `refmoe conform --write-ci github`. The job fails when a case fails that the list of known failures does
# not have, and when a case of the list conforms again: then take its entry out.
name: refmoe
on: [push, pull_request]
permissions:
  contents: read{permission}
jobs:
  conformance:
    runs-on: ubuntu-latest
    timeout-minutes: 60
    steps:
      - uses: actions/checkout@v6
      # here: install or build the engine
      - id: refmoe
        uses: {uses}
        with:{inputs}
      - uses: actions/upload-artifact@v6
        if: always()
        with:
          name: refmoe
          path: ${{{{ steps.refmoe.outputs.folder }}}}
"""
GITLAB = """\
# Written by `refmoe conform --write-ci gitlab`. Take it into .gitlab-ci.yml:
#     include:
#       - local: .gitlab/refmoe.yml
# The job fails when a case fails that the list of known failures does not have, and when a case of the list conforms
# again: then take its entry out.
refmoe:
  image: python:3.12
  timeout: 1 hour
  script:
    - {install}
    # here: install or build the engine
    - {command}
  artifacts:
    when: always
    paths: [refmoe-results.json, refmoe-junit.xml, refmoe-badge.json]
    reports:
      junit: refmoe-junit.xml
"""
SHELL = """\
#!/bin/sh
# Written by `refmoe conform --write-ci shell`, for any system that runs commands. It fails when a case fails that the
# list of known failures does not have, and when a case of the list conforms again: then take its entry out.
set -eu
cd "$(dirname "$0")"
command -v refmoe > /dev/null || {install}
# here: install or build the engine
exec {command}
"""
SYSTEMS: Mapping[str, tuple[str, Callable[[Pipeline], str]]] = {
    "github": (".github/workflows/refmoe.yml", _github),
    "gitlab": (".gitlab/refmoe.yml", _gitlab),
    "shell": ("refmoe.sh", _shell),
}
"""Per system the name of its file within the repository, and the function that gives its text."""


# ---- files


def ci_file(system: str, root: Path) -> Path:
    """The file of a system.   root: the folder of the repository"""
    return root / SYSTEMS[system][0]


def refuse_existing(path: Path) -> None:
    """Raises InputError where there is a file of this name already, or none can be written."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path}: is there already, but --write-ci writes new files only")
    if path.parent.is_dir():
        refuse_output(path)


def ci_text(system: str, run: Pipeline) -> str:
    """The text of the file of a system. Raises InputError for a value that the file cannot hold."""
    return SYSTEMS[system][1](run)


def write_ci(system: str, root: Path, run: Pipeline) -> None:
    """Write the file of a system. Raises InputError when it cannot be written.   root: the folder of the repository"""
    path, text = ci_file(system, root), ci_text(system, run)
    make_folder(path.parent, parents=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    if system == "shell":
        path.chmod(path.stat().st_mode | 0o111)
