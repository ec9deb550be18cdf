# SPDX-License-Identifier: Apache-2.0
"""Goldens, rebuilt in an empty folder, against the published list of digests."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.api.goldens import certify_goldens, emit_goldens
from refmoe.api.new_cases import Wanted, new_case
from refmoe.api.rebuilding import Rebuilding, rebuild_goldens
from refmoe.errors import InputError
from refmoe.suite import CASE_FILE, MANIFEST_FILE, emission, read_manifest, write_folder_manifest, write_manifest
from refmoe.suite.digests import read_digests, verify_digests, write_digests
from refmoe.suite.manifest import DIGESTS, content_file
from refmoe.suite.rebuild import differences
from tests.command_line import Refmoe

GOLDEN = Path(__file__).parent.parent / "golden"
CASE, OTHER = "one-pair", "top-1"
VALUES = content_file(read_manifest(GOLDEN / CASE))


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A golden folder of two cases, with a document and a list of digests, for a test to damage."""
    made = tmp_path / "golden"
    for name in (CASE, OTHER):
        shutil.copytree(GOLDEN / name, made / name)
    (made / "FORMAT.md").write_text("some text\n")
    write_folder_manifest(made)
    write_digests(made)
    return made


def sha256sum(listed: Path, folder: Path, *words: str) -> int:
    """The exit status of coreutils' own check of a list."""
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    return subprocess.run(
        ["sha256sum", "--check", "--strict", "--status", *words, listed], cwd=folder, check=False
    ).returncode


# ---- the list of the repository


def test_the_repository_s_list_has_the_digest_of_every_file_of_the_goldens() -> None:
    """After a change of a golden, `refmoe suite emit --golden golden` writes the list anew."""
    assert verify_digests(GOLDEN) == []
    assert sha256sum(GOLDEN / DIGESTS, GOLDEN) == 0
    files = {path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*") if path.is_file()}
    assert {name for name, _ in read_digests(GOLDEN / DIGESTS)} == files - {DIGESTS}


WRITERS: dict[str, Callable[[Path], object]] = {
    "emit": lambda golden: emit_goldens(golden, executor="processes:1"),
    "emit a case": lambda golden: emit_goldens(golden, [CASE]),
    "certify": lambda golden: certify_goldens(golden, [CASE], write=True),
    "new": lambda golden: new_case(golden, Wanted("mine", like=CASE)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_whatever_writes_goldens_renews_the_list(golden: Path, name: str) -> None:
    if name == "certify":
        pytest.importorskip("flint")
    shutil.rmtree(golden / OTHER)
    manifest = read_manifest(golden / CASE)
    write_manifest(golden / CASE, manifest | {"certificate": None})
    assert verify_digests(golden), "the list is out of date"
    WRITERS[name](golden)
    assert verify_digests(golden) == []


def test_no_list_is_made_where_there_is_none(golden: Path) -> None:
    (golden / DIGESTS).unlink()
    emit_goldens(golden, executor="processes:1")
    assert not (golden / DIGESTS).exists()
    assert verify_digests(golden) == []


# ---- rebuilding


def test_a_case_is_rebuilt_to_the_byte(golden: Path, tmp_path: Path) -> None:
    found = rebuild_goldens(tmp_path / "rebuilt", [CASE], golden=golden)
    assert found.ok
    assert [*found.cases] == [CASE]
    files = sorted(path.name for path in (golden / CASE).iterdir())
    assert sorted(path.name for path in (tmp_path / "rebuilt" / CASE).iterdir()) == files
    for name in files:
        assert (tmp_path / "rebuilt" / CASE / name).read_bytes() == (golden / CASE / name).read_bytes()
    assert sha256sum(golden / DIGESTS, tmp_path / "rebuilt", "--ignore-missing") == 0


def test_the_values_at_hand_are_not_read(golden: Path, tmp_path: Path) -> None:
    """Without them, and without the manifest, the values come out the same. Only the manifest cannot be told."""
    (golden / CASE / VALUES).unlink()
    assert rebuild_goldens(tmp_path / "a", [CASE], golden=golden).ok
    (golden / CASE / MANIFEST_FILE).unlink()
    (difference,) = rebuild_goldens(tmp_path / "b", [CASE], golden=golden).cases[CASE].differences
    assert difference.startswith(f"{CASE}/{MANIFEST_FILE}: ")
    assert (tmp_path / "b" / CASE / VALUES).read_bytes() == (GOLDEN / CASE / VALUES).read_bytes()


def listed(golden: Path) -> dict[str, str]:
    return dict(read_digests(golden / DIGESTS))


def relist(golden: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Change the list."""
    found = listed(golden)
    change(found)
    (golden / DIGESTS).write_text("".join(f"{digest}  {name}\n" for name, digest in found.items()))


@pytest.mark.parametrize("file", [CASE_FILE, MANIFEST_FILE, VALUES])
def test_another_published_digest_is_named_with_both(golden: Path, tmp_path: Path, file: str) -> None:
    right = listed(golden)[f"{CASE}/{file}"]
    relist(golden, lambda found: found.update({f"{CASE}/{file}": "0" * 64}))
    found = rebuild_goldens(tmp_path / "rebuilt", golden=golden, executor="processes:1")
    assert found.cases[OTHER].differences == ()
    (difference,) = found.cases[CASE].differences
    assert difference.startswith(f"{CASE}/{file}: ")
    assert right in difference
    assert "0" * 64 in difference


def test_one_wrong_bit_of_one_computed_value_is_seen(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and manifest differ, and the sentence has the digest of the published values."""
    right = emission.compute

    def wrong(*given: Any) -> dict[str, Any]:
        arrays = right(*given)
        arrays["prefill/logits"] = arrays["prefill/logits"].copy()
        arrays["prefill/logits"][0, 0] = np.nextafter(arrays["prefill/logits"][0, 0], np.inf)
        return arrays

    monkeypatch.setattr(emission, "compute", wrong)
    found = rebuild_goldens(tmp_path / "rebuilt", [CASE], golden=golden)
    assert found.differs
    manifest, values = found.cases[CASE].differences
    assert manifest.startswith(f"{CASE}/{MANIFEST_FILE}: ")
    assert values.startswith(f"{CASE}/trace-")
    assert listed(golden)[f"{CASE}/{VALUES}"] in values


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another definition": (
        lambda golden: (golden / CASE / CASE_FILE).write_text((golden / CASE / CASE_FILE).read_text() + "# more\n"),
        f"{CASE}/{CASE_FILE}: ",
    ),
    "a smaller certificate": (
        lambda golden: write_manifest(golden / CASE, read_manifest(golden / CASE) | {"certificate": None}),
        f"{CASE}/{MANIFEST_FILE}: ",
    ),
    "a case that the list lacks": (
        lambda golden: relist(golden, lambda found: [found.pop(name) for name in [*found] if CASE in name]), CASE,
    ),
    "a file that is not rebuilt": (
        lambda golden: relist(golden, lambda found: found.update({f"{CASE}/more.txt": "0" * 64})), f"{CASE}/more.txt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_golden_that_is_not_the_published_one_is_named(golden: Path, tmp_path: Path, change: str) -> None:
    act, named = CHANGES[change]
    act(golden)
    found = rebuild_goldens(tmp_path / "rebuilt", [CASE], golden=golden)
    assert any(each.startswith(named) for each in found.cases[CASE].differences), found.cases


def of_documents(golden: Path, folder: Path) -> tuple[str, ...]:
    found: Rebuilding = rebuild_goldens(folder, golden=golden, executor="processes:1")
    assert found.documents is not None
    return found.documents


def test_what_is_not_rebuilt_is_compared(golden: Path, tmp_path: Path) -> None:
    assert of_documents(golden, tmp_path / "a") == ()
    (golden / "FORMAT.md").write_text("other text\n")
    (difference,) = of_documents(golden, tmp_path / "b")
    assert "FORMAT.md" in difference
    assert listed(golden)["FORMAT.md"] in difference
    (golden / "FORMAT.md").unlink()
    relist(golden, lambda found: found.update({"none/case.toml": "0" * 64, "../outside": "0" * 64}))
    assert [name in each for name, each in zip(
        ("FORMAT.md", "none/case.toml", "../outside"), of_documents(golden, tmp_path / "c"), strict=True
    )] == [True] * 3  # fmt: skip


def test_small_cases_come_first(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "walking-skeleton", golden / "a-larger-case")
    found = rebuild_goldens(tmp_path / "rebuilt", golden=golden, executor="processes:1")
    assert {*found.cases} == {CASE, OTHER, "a-larger-case"}
    assert [*found.cases][-1] == "a-larger-case", "its tokens times its parameters are the most"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("no digest\n", "line 1"), (f"{'0' * 64}  a\n{'0' * 63}  b\n", "line 2"), (None, "no such file"),
        (f"{'0' * 64}  a\n{'1' * 64}  a\n", "2 lines"),
    ],
)  # fmt: skip
def test_a_list_that_is_none_is_refused(golden: Path, tmp_path: Path, text: str | None, named: str) -> None:
    path = tmp_path / "sums"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=named):
        rebuild_goldens(tmp_path / "rebuilt", [CASE], golden=golden, digests=path)
    assert not (tmp_path / "rebuilt").exists()


def test_a_list_may_have_values_of_two_names_for_a_case() -> None:
    """Both are told, as the files of a stranger's list may be any."""
    names = [f"{CASE}/trace-{digit * 16}.safetensors" for digit in "012"]
    (said,) = differences(CASE, {names[0]: "a" * 64}, dict.fromkeys(names[1:], "b" * 64))
    assert all(name in said for name in names)


def test_a_folder_in_use_is_refused(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in use"):
        rebuild_goldens(golden, [CASE], golden=golden)


def test_the_command_rebuilds_the_package_s_own_goldens(refmoe: Refmoe, tmp_path: Path) -> None:
    status, out, err = refmoe("suite", "rebuild", tmp_path / "rebuilt", CASE, OTHER, "--json")
    assert (status, err) == (0, "")
    facts = json.loads(out)
    assert facts["ok"]
    assert {*facts["files"]} == {name for name in listed(GOLDEN) if name.partition("/")[0] in (CASE, OTHER)}
    (tmp_path / "sums").write_text((GOLDEN / DIGESTS).read_text().replace(facts["files"][f"{CASE}/{VALUES}"], "0" * 64))
    words = ("--digests", tmp_path / "sums")
    status, out, err = refmoe("suite", "rebuild", tmp_path / "again", CASE, OTHER, *words)
    assert (status, err) == (1, "")
    assert f"{CASE}/{VALUES}" in out
    assert "0" * 64 in out


@pytest.mark.slow
def test_every_golden_below_full_size_is_rebuilt_to_the_published_digests(tmp_path: Path) -> None:
    found = rebuild_goldens(tmp_path / "rebuilt")
    assert found.ok, found
    assert len(found.cases) > 40
    assert sha256sum(GOLDEN / DIGESTS, tmp_path / "rebuilt", "--ignore-missing") == 0
