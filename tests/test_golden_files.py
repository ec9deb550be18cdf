# SPDX-License-Identifier: Apache-2.0
"""Integrity: every change of any file in a golden folder is reported, with the name of the file."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe import __version__
from refmoe import suite as golden
from refmoe.errors import InputError
from refmoe.suite.manifest import digest
from refmoe.traces.trace import read_trace

REPOSITORY = Path(__file__).parent.parent / "golden"
FILES = sorted(path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*") if path.is_file())
POSITIONS = 6
CASE = "walking-skeleton"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A golden folder with a case, documents and a manifest, for a test to damage."""
    shutil.copytree(REPOSITORY / CASE, tmp_path / CASE)
    (tmp_path / "vectors").mkdir()
    for name in ("FORMAT.md", "vectors/table.json"):
        (tmp_path / name).write_text("some text\n")
    golden.write_folder_manifest(tmp_path)
    assert golden.verify_files(tmp_path) == []
    return tmp_path


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def resealed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and give it the right digest of itself."""
    manifest = json.loads(path.read_bytes())
    change(manifest)
    golden.write_manifest(path.parent, manifest)


def test_the_repository_s_golden_folder_is_whole() -> None:
    assert golden.verify_files(REPOSITORY) == []


def test_the_repository_s_golden_folder_is_small() -> None:
    assert sum((REPOSITORY / name).stat().st_size for name in FILES) < 20e6


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's golden folder, to damage and mend file by file."""
    made = Path(shutil.copytree(REPOSITORY, tmp_path_factory.mktemp("copy") / "golden"))
    golden.write_folder_manifest(made)  # what is not whole there, the test above says, and once is enough
    return made


@pytest.mark.parametrize("name", FILES, ids=str)
def test_a_flipped_bit_anywhere_is_seen_and_its_file_is_named(copy: Path, name: Path) -> None:
    """In every file, at its first, its last and at random bits."""
    path = copy / name
    whole, rng = path.read_bytes(), random.Random(str(name))
    verify = golden.verify_case_files if (path.parent / golden.CASE_FILE).exists() else golden.verify_documents
    place = path.parent if verify is golden.verify_case_files else copy
    for bit in {0, 8 * len(whole) - 1, *(rng.randrange(8 * len(whole)) for _ in range(POSITIONS))}:
        flip(path, bit)
        assert any(str(path) in difference.what for difference in verify(place)), f"bit {bit} of {name}"
        path.write_bytes(whole)
    assert verify(place) == []


def test_no_byte_of_a_manifest_can_change_unseen(folder: Path) -> None:
    """Some flips change no value, as in an exponent's letter or the last digit of 5e-324. All are reported."""
    path = folder / golden.MANIFEST_FILE
    whole = path.read_bytes()
    for byte in range(len(whole)):
        bit = 8 * byte + byte % 8  # one of each byte
        flip(path, bit)
        assert str(path) in golden.verify_documents(folder)[0].what, f"bit {bit}"
        path.write_bytes(whole)
    path = folder / CASE / golden.MANIFEST_FILE
    whole = path.read_bytes()
    found = re.search(rb"\de-\d", whole)
    assert found
    for bit in (8 * (found.start() + 1) + 5, 8 * whole.index(b"5e-324")):
        flip(path, bit)
        assert json.loads(path.read_bytes()) == json.loads(whole)
        with pytest.raises(InputError, match="'digest' is not the SHA-256 of this file"):
            golden.read_manifest(folder / CASE)
        path.write_bytes(whole)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_of_a_trace_is_named_by_tensor_and_index(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = golden.trace_path(folder / CASE)
    tensors = read_trace(path).tensors
    key = str(rng.choice(sorted(tensors)))
    shape = tensors[key].shape
    at = [int(rng.integers(n)) for n in shape]
    element = int(np.ravel_multi_index(at, shape))
    flip(path, 64 * element + 8 * tensors[key].offset + int(rng.integers(64)))
    found = golden.check(folder / CASE)
    assert [difference.case for difference in found] == [CASE, CASE]
    assert f"{path}: tensor '{key}' differs at {at}: stored" in found[1].what


def test_a_trace_that_cannot_be_opened_is_a_difference(folder: Path) -> None:
    path = golden.trace_path(folder / CASE)
    flip(path, 7)
    found = [difference.what for difference in golden.check(folder / CASE)]
    assert f"{path}: SHA-256 differs from the manifest's" in found
    assert any("safetensors file" in what for what in found)


def remove_case(folder: Path) -> str:
    shutil.rmtree(folder / CASE)
    shutil.copytree(REPOSITORY / CASE, folder / "another")
    return f"{folder / CASE}: the case is missing"


def add_case(folder: Path) -> str:
    shutil.copytree(folder / CASE, folder / "another")
    return f"{folder / 'another'}: the case is not in manifest.json"


def remove(name: str) -> Callable[[Path], str]:
    def act(folder: Path) -> str:
        (folder / name).unlink()
        return f"{folder / name}: "

    return act


def add(name: str) -> Callable[[Path], str]:
    def act(folder: Path) -> str:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("more")
        return f"{folder / name}: an unexpected file"

    return act


CHANGES: dict[str, Callable[[Path], str]] = {
    "a case is missing": remove_case,
    "a case is too many": add_case,
    "a document is missing": remove("FORMAT.md"),
    "a vector is missing": remove("vectors/table.json"),
    "the manifest is missing": remove("manifest.json"),
    "a case's manifest is missing": remove(f"{CASE}/manifest.json"),
    "a document is too many": add("NOTES.md"),
    "a hidden file is too many": add(".notes"),
    "a vector is too many": add("vectors/more.json"),
    "a folder is too many": add("more/FORMAT.md"),
    "a case has a file too many": add(f"{CASE}/notes.txt"),
    "a trace has another name": add(f"{CASE}/trace.safetensors"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_missing_or_too_much_is_named(folder: Path, name: str) -> None:
    words = CHANGES[name](folder)
    assert any(difference.what.startswith(words) for difference in golden.verify_files(folder))


def test_a_case_without_its_definition_is_missing(folder: Path) -> None:
    """The files that are left of it belong to no case."""
    (folder / CASE / golden.CASE_FILE).unlink()
    found = [difference.what for difference in golden.verify_documents(folder)]
    assert f"{folder / CASE}: the case is missing" in found
    assert f"{folder / CASE / golden.MANIFEST_FILE}: an unexpected file" in found


@pytest.mark.parametrize("name", ["manifest.json", f"{CASE}/manifest.json"])
def test_an_unknown_version_of_the_format_is_refused(folder: Path, name: str) -> None:
    resealed(folder / name, lambda manifest: manifest.update(format_version="2"))
    (difference,) = golden.verify_files(folder)
    assert difference.what.startswith(f"{folder / name}: 'format_version' is missing or unknown")


def test_the_digest_of_a_manifest_is_what_the_format_says(folder: Path) -> None:
    data = (folder / CASE / golden.MANIFEST_FILE).read_bytes()
    own = json.loads(data)["digest"]
    assert data.count(own.encode()) == 1
    assert digest(data.replace(own.encode(), b"0" * 64)) == own


def test_leftovers_of_emissions_are_noted_and_removed_by_the_next(folder: Path) -> None:
    case = folder / CASE
    names = [
        ".manifest.json.abcd_123.tmp", ".trace-0123456789abcdef.safetensors.abcdefgh.tmp",
        "trace-0123456789abcdef.safetensors", "fingerprint-0123456789abcdef.json",
    ]  # fmt: skip
    for name in names:
        (case / name).write_text("half")
    (folder / ".manifest.json.abcd_123.tmp").write_text("half")
    assert golden.verify_files(folder) == []
    assert sorted(path.name for path in golden.leftovers(case)) == sorted(names)
    assert [path.name for path in golden.leftovers(folder)] == [names[0]]
    golden.emit(golden.read_case(case))
    assert golden.leftovers(case) == []
    assert golden.check(case) == []


def test_a_case_is_emitted_again_only_where_something_changed(folder: Path) -> None:
    case = golden.read_case(folder / CASE)
    assert golden.is_emitted(case)
    resealed(folder / CASE / golden.MANIFEST_FILE, lambda manifest: manifest["generator"].update(version="0.0"))
    assert not golden.is_emitted(case)
    golden.emit(case)
    assert golden.read_manifest(folder / CASE)["generator"]["version"] == __version__
    flip(golden.trace_path(folder / CASE), 4000)
    assert not golden.is_emitted(case)
    golden.emit(case)
    path = folder / CASE / golden.CASE_FILE
    path.write_text(path.read_text().replace("seed = 1", "seed = 2"))
    assert not golden.is_emitted(golden.read_case(folder / CASE))
