# SPDX-License-Identifier: Apache-2.0
"""Inputs that are no matter of content: special files, outputs that are inputs, values of options, locales.

Each sweeps over all commands, so that a new command or option cannot miss it: a test compares `INVOCATIONS` with the
tree of commands.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import click

from refmoe.cli.guard import Output, OutputFolder
from tests.cli.every_command import COMMANDS
from tests.fuzz.inputs import Kind, Run
from tests.fuzz.inputs_kinds import ENCODINGS, KINDS, base, copy_needed
from tests.fuzz.inputs_mutations import LONG, TEXTS

HARNESS = "-- /bin/false"
INVOCATIONS = (
    "verify trace.safetensors --checkpoint hf --policy policy.toml --no-diagnose --html out/p.html --junit out/j.xml "
    "--sarif out/a.sarif --source chat.json",
    "verify trace.safetensors --distances exact.safetensors",
    "verify ofcase.safetensors --case small --golden golden --no-diagnose --json",
    "verify ofcase.safetensors --distances small --golden golden",
    "verify values.npz --checkpoint hf --tokens 1,2,3 --decode 4 --policy float32 --no-diagnose",
    "verify values.pt --checkpoint hf --tokens 1,2,3 --decode 4 --policy float32 --no-diagnose",
    "verify values.safetensors --checkpoint text --chat chat.json --policy float32 --no-diagnose",
    f"conform --known known.toml --golden golden --case small --policy policy.toml --out out/r.json --keep out/k "
    f"--write-ci shell out/ci --refmoe-from a/b --junit out/j.xml --badge out/b.json --summary out/s.md "
    f"--sarif out/a.sarif --source known.toml {HARNESS}",
    "conform --adapter router.py --python router.py --golden golden --case small --no-diagnose --out out/r.json",
    "conform --scaffold python out/h.py",
    "conform --server-files out/s --case small --golden golden --dtype bfloat16",
    "conform --server http://127.0.0.1:1 --policy policy.toml --case small --golden golden --server-files out/s "
    "-- /bin/false {checkpoint}",
    "conform --server http://127.0.0.1:1 --dtype float32 --known known.toml --out out/r.json --junit out/j.xml "
    "--badge out/b.json --summary out/s.md --sarif out/a.sarif --source known.toml --write-ci shell out/ci "
    "--refmoe-from a/b -- /bin/false {checkpoint}",
    "engines",
    "engines router.py --install out/e",
    "capture --checkpoint text --chat chat.json --out out/t.safetensors",
    "capture --case small --golden golden --out out/t.safetensors",
    "capture --checkpoint text --tokens 1 --adapter router.py --out out/t.safetensors",
    "scoreboard results.json --html out/p.html",
    "evidence write out/e --engine few.json --traces kept --golden golden --artifact router.py --key key.pem",
    "evidence verify package --golden golden --key public.pem",
    "policies policy.toml",
    "cases --golden golden",
    "cases small --golden golden",
    "info hf",
    "info mistral",
    "info sharded",
    "info fused",
    "emit --checkpoint hf --tokens 1,2,3 --policy policy.toml --out out/t.safetensors",
    "emit --checkpoint sharded --layers 1:2 --states states.safetensors --tokens 1,2,3 --decode 4 "
    "--out out/t.safetensors",
    "emit --checkpoint text --chat chat.json --taps logits --estimate --out out/t.safetensors",
    "emit --case small --golden golden --out out/t.safetensors",
    "generate --checkpoint text --chat chat.json --max-new-tokens 1",
    "generate --checkpoint text --prompt Hello --max-new-tokens 1",
    "generate --checkpoint mistral --tokens 1 --max-new-tokens 1",
    "materialise small out/m --golden golden",
    "router show --logits logits.npy --out out/p.svg",
    "router show --logits trace.safetensors --out out/p.svg",
    "router check router.py:route --experts 4 --top-k 2 --examples 3 --law repetition",
    "kernel check kernel.py:experts --examples 3 --law inputs-untouched",
    "suite check --golden golden",
    "suite check small --golden golden",
    "suite check --golden prints",
    "suite rebuild out/r small --golden golden --digests sums",
    "suite certify small --golden golden",
    "suite audit --golden whole --tests tests",
    "suite emit small --golden golden",
    "suite pack out/pack --size full --golden golden",
    "suite new mine --golden out/g --config hf/config.json --tokens 1,2",
    "mutants results --golden whole --html out/p.html",
    "mutants matrix --golden golden --case small --mutant rope-sign-flipped --dtype float32",
    "mutants list",
    "mutants power --measure out/power.json --mutant rope-sign-flipped --golden golden",
    "mutants show rope-sign-flipped",
)
"""Invocations in which every option that names an input, and every output, is given."""
SLOW = ("evidence", "suite audit", "mutants", "router check", "kernel check", "capture")
"""Commands that take seconds; they are tried less often."""
LOCALES = (
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "POSIX",
    "PYTHONIOENCODING": "ascii:strict"},
    {"PYTHONIOENCODING": "latin-1:strict"}, {"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "tr_TR.ISO-8859-9",
    "PYTHONUTF8": "0"},
    {"LC_ALL": "C.UTF-8"}, {"LC_ALL": "nowhere"}, {"PYTHONUTF8": "1", "LC_ALL": "C"}, {"TERM": "dumb",
    "NO_COLOR": "1"}, {"COLUMNS": "1"},
    {"COLUMNS": "100000", "FORCE_COLOR": "1"}, {"TZ": "nowhere", "PYTHONWARNINGS": "error"}, {"PYTHONOPTIMIZE": "2"},
    {"PYTHONHASHSEED": "7"},
    {"COLUMNS": "x", "LINES": "-1"}, {"REFMOE_GOLDEN": "/dev/null"}, {"TMPDIR": "/nowhere"}, {"HOME": "/nowhere",
    "USER": ""},
)  # fmt: skip
NAMES = (
    "\u00e9",
    "\u6f22",
    "\udcff\udcfe",
    "a b",
    "-x",
    "\x1b[31m",
    "a\nb",
    "%s",
    "[red]",
    "~",
    "\u202e",
    "x" * 200,
    "'",
    '"',
    "$(id)",
    "#",
    "a+b",
    "a=b",
)


def path_of(word: str) -> str:
    """The name of a file in a word: of MODULE:FUNCTION the module."""
    return word.partition(":")[0]


@cache
def reached(words: str) -> tuple[str, ...]:
    """The files and folders of the base that an invocation names, and those in the folders."""
    found: list[str] = []
    for word in words.partition(" -- ")[0].split():
        name = path_of(word)
        if "/" not in name and (base() / name).exists():
            found.append(name)
            # the folder of all goldens has links to them, of which only the two files are of interest
            inside = (
                path for path in sorted((base() / name).rglob("*")) if not path.is_symlink() and ".parts" not in name
            )
            found += [str(path.relative_to(base())) for path in inside if (base() / name).is_dir()]
    return tuple(dict.fromkeys(found))


def _mixed(found: list[Any]) -> tuple[Any, ...]:
    """All in an order that has some of each in every part; of slow commands one in ten."""
    kept = [each for each in found if not each[0].startswith(SLOW) or Random(str(each)).random() < 0.1]
    return tuple(Random(0).sample(kept, len(kept)))


# ---- special files


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket may have 107 bytes
        try:
            end.bind(path.name)
        finally:
            os.chdir(here)


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 5 << 30)


def _unreadable(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)


def _closed(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    path.chmod(0)


def _unsearchable(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")
    path.chmod(0o600)


def _many(path: Path) -> None:
    path.mkdir()
    for i in range(300):
        (path / f"{i}\x1b[31m.json").write_text("{}")


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo, "/dev/zero": _link("/dev/zero"), "/dev/full": _link("/dev/full"),
    "/dev/null": _link("/dev/null"),
    "/dev/urandom": _link("/dev/urandom"), "a folder": Path.mkdir, "a dangling link": _link("nowhere"),
    "a loop": lambda path: path.symlink_to(path.name),
    "a socket": _socket, "an empty file": Path.touch, "5 GB of nothing": _sparse, "an unreadable file": _unreadable,
    "an unreadable folder": _closed,
    "a folder that may not be searched": _unsearchable, "/proc/self/mem": _link("/proc/self/mem"),
    "/proc/self/environ": _link("/proc/self/environ"),
    "nothing": lambda path: None, "/proc/kmsg": _link("/proc/kmsg"), "a folder of many files": _many,
    "/dev/stdin": _link("/dev/stdin"),
    "/dev/tty": _link("/dev/tty"), "itself as a folder": lambda path: path.symlink_to("."), "/": _link("/dev"),
}  # fmt: skip


@cache
def special_inputs() -> tuple[tuple[str, str, str], ...]:
    """Every (invocation, input, special file), mixed."""
    found = [(words, file, special) for words in INVOCATIONS for file in reached(words) for special in SPECIAL]
    return _mixed(found)


def special(number: int, dice: Random, folder: Path) -> Run:
    """A special file in the place of one input."""
    words, file, name = special_inputs()[number % len(special_inputs())]
    copy_needed(words.split(), folder)
    path = folder / file
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    SPECIAL[name](path)
    return run_of(words.split(), dice)


def run_of(words: list[str], dice: Random) -> Run:
    """A run in some encoding. `suite emit` and `suite certify` fill the folder that they read."""
    filled = words[:2] in (["suite", "emit"], ["suite", "certify"]) and "--golden" in words
    writes = (words[words.index("--golden") + 1],) if filled else ()
    return Run(words, encoding=dice.choice(ENCODINGS), writes=writes)


# ---- outputs that are inputs

LINKS: dict[str, Callable[[Path, Path], None]] = {
    "directly": lambda source, path: None, "by a symbolic link": lambda source, path: path.symlink_to(source),
    "by a hard link": lambda source, path: path.hardlink_to(source),
    "by a link to its folder": lambda source, path: path.symlink_to(source.parent, target_is_directory=True),
    "by dots": lambda source, path: None,
}  # fmt: skip


@cache
def output_pairs() -> tuple[tuple[str, str, str, str], ...]:
    """Every (invocation, output, input, way in which the output is the input), mixed."""
    found = [
        (words, word, file, way)
        for words in INVOCATIONS
        for word in words.split()
        if word.startswith("out/")
        for file in reached(words)
        for way in LINKS
    ]
    return _mixed(found)


def output_is_input(number: int, dice: Random, folder: Path) -> Run:
    """An output that is an input. No input may change, whatever the command does."""
    words, output, file, way = output_pairs()[number % len(output_pairs())]
    copy_needed(words.split(), folder)
    source, link = folder / file, folder / "link"
    name = file if way == "directly" else f"./hf/../{file}" if way == "by dots" else "link"
    with suppress(OSError):  # there are no hard links to folders
        LINKS[way](source, link)
    if way == "by a link to its folder":
        name = f"link/{Path(file).name}"
    return Run([name if word == output else word for word in words.split()], dice.choice(ENCODINGS), writes=("link",))


# ---- values of options

VALUES = (
    *TEXTS, "0", "-0", "+1", "1.5", "1e308", "1e-320", "1e999", "inf", "-inf", "NaN", "\u00b2", "1_0", "\uff11",
    "9" * 5000, "-" + "9" * 5000, "0x10", "1,2", "1,,2",
    ",", "1,-1", "1,99999999", "0:", ":", "1:0", ":1", "0:1:2", "-1:", "processes:0", "processes:-1", "processes:x",
    "processes:99999999999999999999", "dask:", "threads", "a=b", "=",
    "a=", "=b", "float32+", "float32+cache", "float32+cache=", "float32+cache=float16+cache=float16", "+cache=float32",
    "float32+\x1b=1", "bfloat16.toml", "x.toml+y",
    "--", "-", "-x", "--json", "--help", "@x", "*", "**", "layers.*,logits", "[", "!", "\\", "a/b@c", "owner/repo@\n",
    "/", "..", "hf", "golden", "golden/small", "trace.safetensors", "kernel.py:experts",
    "router.py", "router.py:", ":route", "router.py:nothing", "router:route", "os:getcwd", "math:pi", "x" * LONG,
    "\u00e9", "\U0001f600" * 500, "1" * 300, "cuda", "mkl", "0" * 4000 + "1",
)  # fmt: skip
LARGE = (
    "10",
    "100",
    "4096",
    "65537",
    "1000000",
    "999999999",
    "1000000000000",
    "9223372036854775807",
    "18446744073709551616",
)
PATIENT = {"max_new_tokens", "examples", "timeout"}
"""Options that ask for as much work as their number says, or that have no bound by design."""
PROMPT = 200
"""The most characters of a prompt: the memory of attention grows with the square of its tokens, by design."""
FREE = {"harness", "python", "adapter"}
"""Arguments that are programs to run."""


@cache
def optional_values() -> tuple[tuple[str, str, str], ...]:
    """Every (invocation, option or argument, value), mixed. An argument is named by its word."""
    found = []
    seen = set()
    for words in INVOCATIONS:
        name = command_of(words)
        for parameter in COMMANDS[name].params:
            if parameter.name in FREE or (name, parameter.name) in seen:
                continue
            values = VALUES if parameter.name in PATIENT else (*VALUES, *LARGE)
            if isinstance(parameter, click.Option) and not parameter.is_flag and parameter.nargs == 1:
                found += [(words, parameter.opts[0], value) for value in values]
                seen.add((name, parameter.name))
        for word in words.partition(" -- ")[0].split()[len(name.split()) :]:
            if not word.startswith("--"):
                found += [(words, word, value) for value in VALUES]
    return _mixed(found)


def command_of(words: str) -> str:
    """The name of the command of an invocation."""
    first = words.split()
    return " ".join(first[:2]) if " ".join(first[:2]) in COMMANDS else first[0]


def option_value(number: int, dice: Random, folder: Path) -> Run:
    """A strange value of an option or an argument."""
    words, place, value = optional_values()[number % len(optional_values())]
    copy_needed(words.split(), folder)
    parts, value = words.split(), value.replace("\0", "\x01")  # no command line can have a NUL
    value = value[:PROMPT] if place == "--prompt" else value
    at = parts.index("--") if "--" in parts else len(parts)
    if place.startswith("--"):
        parts[at:at] = [place, value]
        output = any(
            isinstance(each.type, Output | OutputFolder)
            for each in COMMANDS[command_of(words)].params
            if place in each.opts
        )
        if output and value:  # outputs stay in the folder for outputs
            parts[at + 1] = "out/" + value.replace("/", "_")
    else:
        parts[parts.index(place, len(command_of(words).split()))] = (
            f"out/{value.replace('/', '_')}" if place.startswith("out/") else value
        )
    return run_of(parts, dice)


# ---- policies by name, and locales


def policy_name(_number: int, dice: Random, folder: Path) -> Run:
    """A name of a policy with changes."""
    copy_needed(["policy.toml", "trace.safetensors", "hf"], folder)
    keys = (
        "cache",
        "accumulation",
        "storage",
        "router.probs",
        "exp.constant",
        "flushes",
        "turn",
        "statistics",
        "logits",
        "\x1b",
        "",
        "x" * 3000,
    )
    values = (
        "float32",
        "float16",
        "bfloat16",
        "float64",
        "true",
        "false",
        "1",
        "-1",
        "nan",
        "",
        "\u202e",
        "9" * 5000,
        "float33",
        "[]",
        "{}",
    )
    names = (
        "float32",
        "bfloat16",
        "hf-bfloat16",
        "mistral-float16",
        "policy.toml",
        "nowhere.toml",
        "",
        "hf",
        "\x1b[31m",
        "float33",
    )
    name = dice.choice(names) + "".join(
        f"+{dice.choice(keys)}={dice.choice(values)}" for _ in range(dice.choice((0, 1, 1, 2, 40)))
    )
    words = dice.choice((["policies", name], ["policies", name, "bfloat16", "--json"],
                         ["verify", "trace.safetensors", "--checkpoint", "hf", "--no-diagnose", "--policy",
                         name]))  # fmt: skip
    return Run(words, encoding=dice.choice(ENCODINGS))


def locale(number: int, dice: Random, folder: Path) -> Run:
    """A command in a process of its own, in some locale; one of its inputs has a strange name."""
    known = [words for words in INVOCATIONS if not words.startswith((*SLOW, "conform"))]
    words = known[number % len(known)].split()
    copy_needed(words, folder)
    written = ("golden",) if words[:2] in (["suite", "emit"], ["suite", "certify"]) else ()
    if dice.random() < 0.7:
        names = [word for word in words if (folder / word).exists() and word not in ("small", *written)]
        if names:
            old = dice.choice(names)
            new = os.path.splitext(old)[0] + dice.choice(NAMES) + os.path.splitext(old)[1]
            (folder / old).rename(folder / new)
            words = [new if word == old else word for word in words]
    variables = {**dice.choice(LOCALES), "PYTHONPATH": str(Path(__file__).parents[2])}
    return Run(words, "utf-8", variables, writes=written)


@cache
def kinds() -> dict[str, Kind]:
    """Every kind of input."""
    return {
        **KINDS,
        "special files": Kind(special, 16, len(special_inputs())),
        "output is input": Kind(output_is_input, 10, len(output_pairs())),
        "values of options": Kind(option_value, 40, len(optional_values())),
        "policy names": Kind(policy_name, 8),
        "locales": Kind(locale, 1),
    }
