# SPDX-License-Identifier: Apache-2.0
"""The bugs of `mutants.txt`. A law of its kernel must catch each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from refmoe.cuda.kernels import source
from refmoe.cuda.kernels.table import KERNELS


@dataclass(frozen=True)
class Mutant:
    """A one-line bug.   kernel: whose law catches it.   name: of the bug.   text: the old text.   by: the new text."""

    kernel: str
    name: str
    text: str
    by: str

    def source(self) -> str:
        """The mutated text of the kernel's file, prelude included."""
        whole = source.text(next(kernel.file for kernel in KERNELS if kernel.name == self.kernel))
        assert whole.count(self.text) == 1, f"{self.kernel}, {self.name}: {whole.count(self.text)} places to change"
        return whole.replace(self.text, self.by)


def read(text: str) -> Iterator[Mutant]:
    """The bugs under each heading ``== kernel``: paragraphs of a name, lines ``- old`` and lines ``+ new``."""
    for section in text.split("\n== ")[1:]:
        kernel, *bugs = section.strip("\n").split("\n\n")
        for bug in bugs:
            name, *lines = bug.split("\n")
            assert all(line[:2] in ("- ", "+ ") for line in lines), bug
            old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
            yield Mutant(kernel, name, old, new)


MUTANTS = tuple(read((Path(__file__).parent / "mutants.txt").read_text()))
