# SPDX-License-Identifier: Apache-2.0
"""Every command of the program, with one cheap invocation of each that works and one whose input is unusable."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import click

from refmoe.cli import commands

ROOT = Path(__file__).parents[2]


def every_command(group: click.Group = commands, name: str = "") -> dict[str, click.Command]:
    """Every command that is no group, by its words."""
    found: dict[str, click.Command] = {}
    context = click.Context(group)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        assert command is not None
        words = f"{name} {word}".strip()
        found |= every_command(command, words) if isinstance(command, click.Group) else {words: command}
    return found


COMMANDS = every_command()


@dataclass(frozen=True)
class Example:
    """An invocation. {in} is a folder of inputs, {out} an empty one, {python} the interpreter."""

    works: str
    unusable: str
    writes: tuple[str, ...] = ()
    """The files in {out} that it writes."""
    status: int = 0
    needs: str = ""
    """The package without which it does not work."""


EXAMPLES = {
    "verify": Example(
        "{in}/trace --checkpoint {in}/model --policy float32 --html {out}/page --junit {out}/junit "
        f"--sarif {{out}}/sarif --source {ROOT}/pyproject.toml",
        "{in}/none", ("page", "junit", "sarif"), needs="jinja2",
    ),
    "conform": Example(
        "--case one-pair --dtype float32 --no-diagnose --out {out}/results --junit {out}/junit --badge {out}/badge "
        f"--summary {{out}}/summary --sarif {{out}}/sarif --source {ROOT}/pyproject.toml -- {{python}} {{in}}/skips.py",
        "--case none -- {python} {in}/skips.py", ("results", "junit", "badge", "summary", "sarif"), status=3,
    ),
    "capture": Example(
        "--checkpoint {in}/model --tokens 1,2 --out {out}/trace", "--checkpoint {in}/none --tokens 1 --out {out}/trace",
        ("trace",), needs="transformers",
    ),
    "engines": Example("onnx", "none"),
    "scoreboard": Example("{in}/results --html {out}/page", "{in}/none", ("page",), needs="jinja2"),
    "evidence write": Example(
        "{out}/package --engine {in}/results --traces {in}",
        "{out}/package --engine {in}/none --traces {in}",
        ("package/results.json", "package/report.md", "package/SHA256SUMS"), needs="cyclonedx",
    ),
    "evidence verify": Example("{in}/package", "{in}/none", needs="cyclonedx"),
    "policies": Example("float32 bfloat16", "float33"),
    "cases": Example("one-pair", "none"),
    "info": Example("{in}/model", "{in}/none"),
    "emit": Example(
        "--checkpoint {in}/model --tokens 1,2 --out {out}/trace", "--checkpoint {in}/none --tokens 1 --out {out}/trace",
        ("trace",),
    ),
    "generate": Example("--checkpoint {in}/model --tokens 1 --max-new-tokens 3", "--checkpoint {in}/none --tokens 1"),
    "materialise": Example(
        "one-pair {out}/model", "none {out}/model", ("model/config.json", "model/model.safetensors")
    ),
    "router show": Example("--tokens 3 --out {out}/picture.svg", "--logits {in}/none", ("picture.svg",)),
    "router check": Example(
        "{in}/router.py:route --experts 4 --top-k 2 --examples 5 --law repetition",
        "{in}/none.py:route --experts 4 --top-k 2", needs="hypothesis",
    ),
    "kernel check": Example(
        "{in}/kernel.py:mixture --examples 2 --law exact-sums", "{in}/none.py:mixture", needs="hypothesis"
    ),
    "suite check": Example("one-pair", "none"),
    "suite rebuild": Example("{out}/goldens one-pair", "{out}/goldens none", ("goldens/one-pair/manifest.json",)),
    "suite certify": Example("one-pair", "none", needs="flint"),
    "suite audit": Example("--tests {in}/tests", "--tests {in}/none", status=1),
    "suite emit": Example("one-pair --golden {out}/golden", "none --golden {out}/golden"),
    "suite new": Example(
        "mine --golden {out}/golden --like one-pair", "mine --golden {out}/golden --set heads=5",
        ("golden/mine/case.toml", "golden/mine/manifest.json"),
    ),
    "suite pack": Example("{out}/pack --size smoke", "{out}/pack --golden {in}/none", ("pack/pack.json",)),
    "mutants list": Example("", "--none"),
    "mutants show": Example("rope-sign-flipped", "none"),
    "mutants matrix": Example(
        "--mutant rope-sign-flipped --case one-pair --dtype float32", "--mutant none --case one-pair"
    ),
    "mutants power": Example("", "--all"),
    "mutants results": Example("--html {out}/page", "--golden {in}/none", ("page",), needs="jinja2"),
}  # fmt: skip


def arguments(name: str, text: str, given: Path, out: Path) -> list[str]:
    """The words of an invocation."""
    places = {"{in}": str(given), "{out}": str(out), "{python}": sys.executable}
    words = [*name.split(), *text.split()]
    for mark, place in places.items():
        words = [word.replace(mark, place) for word in words]
    return words
