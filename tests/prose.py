# SPDX-License-Identifier: Apache-2.0
"""Sentences in docstrings and comments that a stranger cannot read: too long, without an object, or a legal metaphor.

``python -m tests.prose [PATH ...]`` lists them.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "refmoe"
MOST_WORDS = 25
METAPHORS = re.compile(
    r"\b(acquit\w*|blam(?:e|ed|es|ing)|excus(?:e|ed|es)|suspect\w*|guilt\w*|innocen\w*|alibi|culprit|convict\w*|pardon\w*)\b",
    re.IGNORECASE,
)
CLAUSE = re.compile(r"^\s*[A-Z][A-Z0-9]*(?:-[A-Z]+)*-\d+(?:  |: )")
FIELD = re.compile(r"^\s*[\w, ]+: ")


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Each docstring, attribute docstring and block of comments of a file, with its line."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for each in body if isinstance(body, list) else ():
            if (
                isinstance(each, ast.Expr)
                and isinstance(each.value, ast.Constant)
                and isinstance(each.value.value, str)
            ):
                yield each.lineno, each.value.value
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        words = token.string.lstrip("#").strip()
        if words.startswith(("fmt:", "type:", "noqa", "SPDX")):
            continue
        if token.start[0] != last + 1 and block:
            yield start, " ".join(block)
            block = []
        if not block:
            start = token.start[0]
        block.append(words)
        last = token.start[0]
    if block:
        yield start, " ".join(block)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text. Equations, tables, code and lists of parameters are left out."""
    prose: list[str] = []

    def flush() -> Iterator[str]:
        joined = " ".join(prose)
        prose.clear()
        # a parameter's description begins after three blanks, a clause after its id
        for part in re.split(r"(?<=[.?!:;])\s+(?=[\"'`(]*[A-Za-z`])|\s{3,}", joined):
            if part.strip():
                yield part.strip()

    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or stripped.startswith((">>>", "\b", "refmoe ", "$ ")):
            yield from flush()
        else:
            if CLAUSE.match(line) or FIELD.match(line):
                yield from flush()
            prose.append(line.rstrip() if not prose else stripped)
    yield from flush()


def faults(path: Path) -> Iterator[str]:
    """``path:line: fault: text``"""
    for line, text in texts(path):
        begin = " ".join(text.split())
        if re.match(r"(What|That|Those|The same)\b", begin):
            yield f"{path}:{line}: names no object: {begin[:90]}"
        for found in METAPHORS.finditer(text):
            yield f"{path}:{line}: metaphor '{found.group()}': {begin[:90]}"
        for sentence in sentences(text):
            words = [
                word for word in re.sub(r"``?[^`]*``?", "code", sentence).split() if re.search(r"[A-Za-z]{2}", word)
            ]
            if len(words) > MOST_WORDS:
                yield f"{path}:{line}: {len(words)} words: {' '.join(sentence.split())[:150]}"


def files(paths: list[Path]) -> Iterator[Path]:
    """The Python files under these paths."""
    for path in paths:
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


if __name__ == "__main__":
    for file in files([*map(Path, sys.argv[1:])] or [PACKAGE]):
        for fault in faults(file):
            print(fault)
