# SPDX-License-Identifier: Apache-2.0
"""Files of strangers: read in one room only, ordinary ones only, and each failure is one sentence at once."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refmoe
from refmoe.api.contracts import load_function
from refmoe.checkpoints.load import load_checkpoint, read_configuration
from refmoe.engines.adapter import adapter_class
from refmoe.engines.known import read_known
from refmoe.engines.results import read_results
from refmoe.errors import InputError
from refmoe.files.json_file import read_json
from refmoe.files.npy_file import is_npy, map_npy, read_npz
from refmoe.files.parsing import DEEPEST, LARGEST_INTEGER, read_json_value, strict_json, toml
from refmoe.files.reading import LARGEST, exists, need_folder, read_bytes, read_text
from refmoe.files.safetensors_file import open_safetensors
from refmoe.profiles.load import policy
from refmoe.suite.case import read_case
from refmoe.suite.fingerprint import read_fingerprints
from refmoe.suite.manifest import file_digest, read_manifest
from refmoe.text.chat import load_chat
from refmoe.text.folder import read_folder
from refmoe.text.tokenizer import Tokenizer
from refmoe.traces.trace import read_trace

PACKAGE = Path(refmoe.__file__).parent

# ---- one room

ELSEWHERE = {
    "arithmetic/native/mkl.py": "arithmetic imports no other room; it reads /proc/cpuinfo",
    "engines/scaffold/harness.py": "it becomes a user's program, which does not have refmoe",
}
"""Files outside `refmoe/files` that may read by themselves, and the reason."""
READS = {
    "read_bytes", "read_text", "load", "loads", "memmap", "fromfile", "genfromtxt", "spec_from_file_location",
}  # fmt: skip
OF = {"json", "np", "numpy", "tomllib", "pickle", "util"}
OWN = {"read_bytes", "read_text"}
"""Names of the room's own functions, which take a path as their first argument."""


def faults_of(source: str) -> Iterator[tuple[int, str]]:
    """The lines of a source file that read a file, or parse JSON or TOML, without the room for it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if "tomllib" in modules:
                yield node.lineno, "tomllib"
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Attribute):
            of = called.value.id if isinstance(called.value, ast.Name) else ""
            if called.attr in READS and (
                called.attr in OWN or of in ("json", "np", "numpy", "tomllib", "pickle", "util")
            ):
                yield node.lineno, f"{of}.{called.attr}"
            if called.attr == "open" and of != "os" and not _writes(node):
                yield node.lineno, f"{of}.open"
        elif isinstance(called, ast.Name) and called.id == "open" and not _writes(node):
            yield node.lineno, "open"
        elif isinstance(called, ast.Name) and called.id == "spec_from_file_location":
            yield node.lineno, called.id


def _writes(call: ast.Call) -> bool:
    """Whether a call of `open` names a mode that writes."""
    modes = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
    return any(isinstance(mode, str) and set(mode) & set("wax") and len(mode) < 4 for mode in modes)


def test_the_lint_sees_each_kind() -> None:
    for line in (
        "p.read_bytes()", "p.read_text()", "open(p)", "p.open()", "p.open('rb')", "json.load(f)", "json.loads(t)",
        "import tomllib", "from tomllib import loads", "np.load(p)", "np.memmap(p)", "spec_from_file_location(n, p)",
        "util.spec_from_file_location(n, p)",
    ):  # fmt: skip
        assert list(faults_of(line)), line
    for line in ("p.open('wb')", "open(p, 'w')", "read_text(p, 'a file')", "torch.load(p)", "os.open(p, 0)"):
        assert not list(faults_of(line)), line


def test_no_other_room_reads_files() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{line}": what
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "files" and str(path.relative_to(PACKAGE)) not in ELSEWHERE
        for line, what in faults_of(path.read_text(encoding="utf-8"))
    }
    assert found == {}


# ---- readers

READERS: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda path: read_bytes(path, "a file"), "text": lambda path: read_text(path, "a file"),
    "config.json": read_json, "results": read_results, "known": read_known, "chat": load_chat,
    "tokenizer": Tokenizer.load, "fingerprints": read_fingerprints, "golden file": file_digest, "trace": read_trace,
    "safetensors": open_safetensors, "npy": map_npy, "is_npy": is_npy, "npz": read_npz,
    "policy": lambda path: policy(str(path.rename(path.with_suffix(".toml")) if path.exists() else path) + "+ties=any"),
    "manifest": lambda path: read_manifest(in_folder(path, "manifest.json")),
    "case": lambda path: read_case(in_folder(path, "case.toml")),
    "checkpoint": lambda path: load_checkpoint(in_folder(path, "config.json")),
    "params": lambda path: load_checkpoint(in_folder(path, "params.json")),
    "configuration": lambda path: read_configuration(in_folder(path, "config.json")),
    "tokenizer.json": lambda path: read_folder(in_folder(path, "tokenizer.json"), 9),
    "generation_config.json": lambda path: read_folder(in_folder(path, "generation_config.json"), 9),
    "adapter": lambda path: adapter_class(str(in_folder(path, "mine.py") / "mine.py")),
    "router": lambda path: load_function(f"{in_folder(path, 'mine.py') / 'mine.py'}:route", "a router"),
}  # fmt: skip
"""Every function that reads a file of a user."""
every = pytest.mark.parametrize("reader", READERS)


def in_folder(path: Path, name: str) -> Path:
    """A folder in which the file has the name that the reader looks for."""
    folder = path.parent / f"folder of {path.name}"
    folder.mkdir()
    if os.path.lexists(path):
        (folder / name).symlink_to(path)
    return folder


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket may have 100 bytes only
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(5 << 30)


def without_news(path: Path) -> None:
    """A link to the kernel's messages, of which none is new: a reader would wait for the next one."""
    path.symlink_to("/proc/kmsg")
    with suppress(OSError):  # that there are no more, or that only root may read them
        messages = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            while os.read(messages, 1 << 16):
                pass
        finally:
            os.close(messages)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "pipe": pipe, "socket": listening, "folder": lambda path: path.mkdir(), "zero": link_to("/dev/zero"),
    "random": link_to("/dev/urandom"), "full": link_to("/dev/full"), "null": link_to("/dev/null"),
    "dangling": link_to("nowhere"), "loop": link_to("strange"), "empty": lambda path: path.touch(),
    "kernel messages": without_news, "terminal": link_to("/dev/tty"), "memory": link_to("/proc/self/mem"),
}  # fmt: skip


@every
@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_is_one_sentence_at_once(tmp_path: Path, reader: str, kind: str) -> None:
    path = tmp_path / "strange"
    SPECIAL[kind](path)
    if (reader, kind) in {("bytes", "empty"), ("text", "empty"), ("golden file", "empty"), ("is_npy", "empty")}:
        READERS[reader](path)
        return
    with within_seconds(20), pytest.raises(InputError) as caught:
        READERS[reader](path)
    assert "\n" not in str(caught.value)


@every
def test_a_file_of_five_gigabytes_is_one_sentence(tmp_path: Path, reader: str) -> None:
    if reader in ("golden file", "is_npy"):
        pytest.skip("it reads no file as a whole")
    path = tmp_path / "strange"
    sparse(path)
    with pytest.raises(InputError) as caught:
        READERS[reader](path)
    assert "\n" not in str(caught.value)


class within_seconds:
    """Writes to every pipe that the body waits for, so that a fault fails the test rather than hang it."""

    def __init__(self, seconds: float) -> None:
        self.timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), 2))

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()


AS_STRANGER = """
import os, sys
sys.path[:0] = [{root!r}]
import sentencepiece
from contextlib import suppress
from pathlib import Path
from refmoe.errors import InputError
from tests.files.test_reading import {call}
os.setgid(65534); os.setuid(65534)
try:
    {use}
except InputError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("closed", ["file", "folder"])
@pytest.mark.parametrize("reader", ["config.json", "known", "trace", "npy", "checkpoint", "tokenizer", "policy"])
def test_what_may_not_be_read_says_so(tmp_path: Path, reader: str, closed: str) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    name = "config.json" if reader == "checkpoint" else "strange.toml" if reader == "policy" else "strange"
    (folder / name).write_text("{}")
    (folder / name if closed == "file" else folder).chmod(0)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.geteuid() and "pytest" in str(parent):
            parent.chmod(0o755)
    use = f"READERS[{reader!r}](Path({str(folder / name)!r}))"
    if reader == "checkpoint":
        use = f"load_checkpoint(Path({str(folder)!r}))"
    elif reader == "policy":
        use = f"policy({str(folder / name)!r})"
    code = AS_STRANGER.format(root=str(PACKAGE.parent), call="READERS, load_checkpoint, policy", use=use)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert "permission denied" in done.stdout.lower(), done.stderr


def test_folders_and_absence(tmp_path: Path) -> None:
    assert not exists(tmp_path / "none")
    assert not exists(tmp_path / ("x" * 20) / "none")
    (tmp_path / "file").touch()
    assert not exists(tmp_path / "file" / "none")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(InputError, match="a folder of models was expected"):
            need_folder(path, "a folder of models")
    with pytest.raises(InputError):
        exists(tmp_path / ("x" * 5000))


def test_a_file_is_read_up_to_its_size(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * 1000)
    assert read_bytes(path, "data", 1000) == b"x" * 1000
    with pytest.raises(InputError, match="more than 999 bytes"):
        read_bytes(path, "data", 999)
    assert len(read_bytes(Path("/proc/self/status"), "data")) > 100
    assert LARGEST >= 50_000_000


@given(st.text(st.characters(exclude_categories=["Cs"])), st.booleans())
def test_text_has_no_byte_order_mark(tmp_path_factory: pytest.TempPathFactory, text: str, mark: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "marked"
    path.write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    wanted = text if mark else text.removeprefix("\ufeff")
    assert read_text(path, "a text") == wanted


# ---- parsers

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**64) + 1, 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    SCALARS | st.text(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


@given(VALUES)
def test_json_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    assert read_json_value(path, "a value") == value


@given(st.binary(max_size=300) | st.text(alphabet='[]{}",:0123456789.eE-+ntrufalse\\ \n').map(str.encode))
def test_any_bytes_are_a_value_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    for read in (lambda: read_json_value(path, "JSON"), lambda: toml(path, "TOML"), lambda: map_npy(path)):
        with suppress(InputError):
            read()


BAD_JSON = {
    "a name twice": '{"a": 1, "a": 2}', "a name twice, deep": '[{"b": {"a": 1, "a": 2}}]', "NaN": "[NaN]",
    "infinite": '{"a": -Infinity}', "beyond float64": "[1e999]", "long": "9" * 5000, "negative": f"[-{'9' * 5000}]",
    "of 65 bits": str(LARGEST_INTEGER), "deep": "[" * 100_000, "deep and closed": "[" * 100 + "]" * 100,
    "deep objects": '{"a":' * 100 + "1" + "}" * 100, "cut": '{"a": ', "nothing": "", "two": "1 2",
}  # fmt: skip
BAD_TOML = {
    "a name twice": "a = 1\na = 2", "NaN": "a = nan", "infinite": "a = [inf]", "beyond float64": "a = 1e999",
    "long": f"a = {'9' * 5000}", "of 65 bits": f"a = {LARGEST_INTEGER}", "hexadecimal": f"a = 0x{'f' * 5000}",
    "deep": f"a = {'[' * 100_000}", "deep and closed": f"a = {'[' * 100}{']' * 100}", "a time": "a = 07:32:00",
    "a date": "a = 1979-05-27", "both": "b = [{a = 1979-05-27T07:32:00Z}]", "cut": "a = [", "no value": "a =",
    "deep tables": f"[{'.'.join('a' * 100)}]",
}  # fmt: skip


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{f"JSON, {name}": (lambda path: read_json_value(path, "a value"), text) for name, text in BAD_JSON.items()},
    **{f"TOML, {name}": (lambda path: toml(path, "a table"), text) for name, text in BAD_TOML.items()},
}


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_is_one_sentence(tmp_path: Path, fault: str) -> None:
    read, text = BAD[fault]
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 1000


def test_levels_are_counted(tmp_path: Path) -> None:
    for levels, well in ((DEEPEST, True), (DEEPEST + 1, False)):
        path = tmp_path / f"{levels}.json"
        path.write_text("[" * levels + "]" * levels)
        if well:
            read_json_value(path, "lists")
        else:
            with pytest.raises(InputError, match="too deeply"):
                read_json_value(path, "lists")


def test_numbers_that_json_has_not_are_for_the_field_to_refuse(tmp_path: Path) -> None:
    """transformers writes them into config.json, beside the fields of a Mixtral."""
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity], "rope_theta": NaN}')
    file = read_json(path)
    with pytest.raises(InputError, match="'rope_theta' is NaN"):
        file.number("rope_theta")
    assert strict_json("[Infinity]") == [float("inf")]


NPY: dict[str, bytes] = {
    "nested": b"\x93NUMPY\x01\x00\xff\x0f" + b"(" * 4095, "minus": b"\x93NUMPY\x01\x00\xff\x0f" + b"-" * 4094 + b"1",
    "version": b"\x93NUMPY\x09\x09\x10\x00" + b" " * 16, "cut": b"\x93NUMPY\x01\x00",
}  # fmt: skip
SHAPES = [
    "(-6, 4)",
    "(True, 4)",
    "(9223372036854775808,)",
    "(1e3,)",
    "((1,),)",
    "('a',)",
    "(1, 9223372036854775807)",
    "7",
]


def npy(shape: str, dtype: str = "'<f8'") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(200)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [*NPY, *SHAPES, "objects", "dtype"])
def test_a_strange_npy_is_one_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.npy"
    strange = {"objects": npy("(3,)", "'|O'"), "dtype": npy("(3,)", "[('a', '<f8', 1e9)]")}
    path.write_bytes(NPY.get(name) or strange.get(name) or npy(name))
    with pytest.raises(InputError) as caught:
        map_npy(path)
    assert str(caught.value).isprintable()


def test_an_array_is_mapped(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(2, 3))
    assert is_npy(tmp_path / "x.npy")
    assert map_npy(tmp_path / "x.npy").tolist() == [[0, 1, 2], [3, 4, 5]]
    np.savez(tmp_path / "x.npz", a=np.arange(3), b=np.ones(2, np.float32))
    assert {name: array.tolist() for name, array in read_npz(tmp_path / "x.npz").items()} == {
        "a": [0, 1, 2],
        "b": [1, 1],
    }
