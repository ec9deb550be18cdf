# SPDX-License-Identifier: Apache-2.0
"""A pack has the same bytes whenever it is built, keeps its limits, and replaces nothing but a pack."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from refmoe.api.packing import pack_suite
from refmoe.errors import InputError
from refmoe.suite import find_cases
from refmoe.suite.pack.sizes import FULL, MOST_BYTES, SIZES, SMOKE, STANDARD, table
from refmoe.suite.pack.writing import Part, digest_of, pack_files, versions
from tests.golden_cases import write_case
from tests.pack.packs import GOLDEN, ROOT


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def parts_of(size: str) -> list[Part]:
    return [Part(GOLDEN / name, left_out) for name, left_out in table()[size].cases.items()]


def test_a_pack_is_listed_whole(smoke: Path) -> None:
    files = contents(smoke)
    document = json.loads(files["pack.json"])
    assert document["files"] == {
        name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name.startswith("cases/")
    }
    assert {*files} == {*document["files"], "pack.json", "PACK.md"}
    assert sum(map(len, files.values())) <= MOST_BYTES[SMOKE]


VARIANTS = [
    {"OPENBLAS_CORETYPE": "Prescott"}, {"OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "2"},
    {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX"},
]  # fmt: skip


@pytest.mark.parametrize("environment", VARIANTS)
def test_other_processors_build_the_same_bytes(environment: dict[str, str], smoke: Path, tmp_path: Path) -> None:
    """Other kernels of BLAS and NumPy add in another order. Radii in coarse steps do not show it."""
    words = [sys.executable, "-m", "refmoe", "suite", "pack", str(tmp_path / "pack"), "--size", SMOKE]
    subprocess.run(
        [*words, "--golden", str(GOLDEN), "--executor", "processes:1"], check=True, capture_output=True,
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert contents(tmp_path / "pack") == contents(smoke)


def keeps_its_version(size: str) -> None:
    files = pack_files(size, parts_of(size), "processes:1")
    assert digest_of(files) == versions()[0]["digests"][size], "other bytes need another version in changes.json"
    assert sum(map(len, files.values())) <= MOST_BYTES.get(size, 1 << 30)
    recorded = table()[size]
    assert recorded.bytes == sum(len(data) for name, data in files.items() if name.startswith("cases/"))


@pytest.mark.parametrize("size", [SMOKE, STANDARD])
def test_other_bytes_are_another_version(size: str) -> None:
    keeps_its_version(size)


@pytest.mark.slow
def test_other_bytes_of_all_cases_are_another_version() -> None:
    keeps_its_version(FULL)


def test_full_has_all_small_cases() -> None:
    assert {*table()[FULL].cases} == {folder.name for folder in find_cases(GOLDEN)}
    assert not any(table()[FULL].cases.values())


def test_a_larger_size_sees_more() -> None:
    smaller = None
    for size in SIZES:
        each = table()[size]
        if smaller is not None:
            for dtype in each.seen:
                assert {*each.unseen[dtype]} <= {*smaller.unseen[dtype]}
        smaller = each


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A folder with one case that takes milliseconds."""
    from refmoe.api.goldens import emit_goldens

    folder = tmp_path / "golden"
    folder.mkdir()
    write_case(folder / "small")
    emit_goldens(folder, executor="processes:1")
    return folder


def test_a_pack_replaces_a_pack_and_removes_what_it_had(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    pack_suite(folder, FULL, golden, executor="processes:1")
    first = contents(folder)
    write_case(golden / "other", seed=2)
    from refmoe.api.goldens import emit_goldens

    emit_goldens(golden, executor="processes:1")
    pack_suite(folder, FULL, golden, executor="processes:1")
    assert {name.split("/")[1] for name in contents(folder) if "/" in name} == {"small", "other"}
    (folder / "pack.json").unlink()  # as a command leaves it that is killed
    for path in (golden / "other").iterdir():
        path.unlink()
    (golden / "other").rmdir()
    pack_suite(folder, FULL, golden, executor="processes:1")
    assert contents(folder) == first
    assert [path.name for path in (folder / "cases").iterdir()] == ["small"]


@pytest.mark.parametrize("stranger", ["notes.txt", "cases/small/notes.txt", "cases/small/deep/config.json"])
def test_nothing_of_others_is_replaced(stranger: str, golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    for made in (False, True):
        if made:
            pack_suite(folder, FULL, golden, executor="processes:1")
        (folder / stranger).parent.mkdir(parents=True, exist_ok=True)
        (folder / stranger).write_text("mine")
        before = contents(folder)
        with pytest.raises(InputError) as raised:
            pack_suite(folder, FULL, golden, executor="processes:1")
        assert str(folder) in str(raised.value)
        assert contents(folder) == before
        (folder / stranger).unlink()


def test_cases_of_others_have_no_numbers(golden: Path, tmp_path: Path) -> None:
    pack_suite(tmp_path / "pack", FULL, golden, executor="processes:1")
    assert "bugs seen in" not in (tmp_path / "pack" / "PACK.md").read_text()


def test_a_case_that_is_missing_is_named(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=next(iter(table()[SMOKE].cases))):
        pack_suite(tmp_path / "pack", SMOKE, golden)
    assert not (tmp_path / "pack").exists()
