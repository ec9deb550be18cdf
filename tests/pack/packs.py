# SPDX-License-Identifier: Apache-2.0
"""Packs for tests, and the readers of three languages."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
GOLDEN, EXAMPLES, DRIVERS = ROOT / "golden", ROOT / "examples" / "pack", Path(__file__).parent / "drivers"
PROGRAMS = {"c": "cc", "mjs": "node", "rs": "rustc"}
"""The program that each language needs, by the ending of its files."""
LANGUAGES = [
    pytest.param(ending, marks=pytest.mark.skipif(shutil.which(program) is None, reason=f"there is no {program}"))
    for ending, program in PROGRAMS.items()
]


def built(source: Path, out: Path) -> list[str]:
    """The command that runs a program, which is compiled without a warning.   out: without an ending"""
    if source.suffix == ".mjs":
        return ["node", str(source)]
    if source.suffix == ".c":
        words = ["cc", "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O2", "-fsanitize=undefined"]
        words += [f"-I{EXAMPLES}", "-o", str(out), str(source), "-lm"]
    else:
        words = ["rustc", "--edition", "2021", "-O", "-D", "warnings", "-o", str(out), str(source)]
    subprocess.run(words, check=True, capture_output=True, text=True)
    return [str(out)]


def driver(language: str, folder: Path) -> list[str]:
    """The command of the driver of a reader, built in a folder."""
    reader = "refmoe_pack." + {"c": "h"}.get(language, language)
    shutil.copy(EXAMPLES / reader, folder / reader)
    shutil.copy(DRIVERS / f"check.{language}", folder / f"check.{language}")
    return built(folder / f"check.{language}", folder / "check")


@dataclass(frozen=True)
class Asked:
    """Values of a tap that a reader judges."""

    run: str
    tap: str
    dtype: str
    values: Any
    experts: Any = None


@dataclass(frozen=True)
class Answer:
    """What a reader says of them."""

    status: str
    judged: int
    outside: int
    index: int
    found: float
    low: float
    high: float

    def __eq__(self, other: object) -> bool:
        """NaN equals NaN here."""
        return isinstance(other, Answer) and str(vars(self)) == str(vars(other))

    __hash__ = None  # type: ignore[assignment]


def ask(command: list[str], case: Path, asked: Iterable[Asked], folder: Path) -> list[Answer]:
    """The answers of a reader.   folder: for the arrays"""
    lines = []
    for i, each in enumerate(asked):
        values, experts = folder / f"{i}.values", "-"
        values.write_bytes(np.ascontiguousarray(each.values).tobytes())
        if each.experts is not None:
            experts = str(folder / f"{i}.experts")
            Path(experts).write_bytes(np.asarray(each.experts, "<i4").tobytes())
        lines.append(f"{each.run} {each.tap} {each.dtype} {values} {experts}\n")
    done = subprocess.run([*command, str(case)], input="".join(lines), capture_output=True, text=True, check=True)
    words = [line.split() for line in done.stdout.splitlines()]
    return [
        Answer(
            status=status, judged=int(judged), outside=int(outside), index=int(index), found=float(found),
            low=float(low), high=float(high),
        )
        for status, judged, outside, index, found, low, high in words
    ]  # fmt: skip
