# SPDX-License-Identifier: Apache-2.0
"""``refmoe suite``: ``emit``, ``check`` and ``certify`` over a whole golden folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from refmoe import suite as golden
from refmoe.cli import commands
from refmoe.errors import InputError
from refmoe.parallel import ONE_THREAD, results
from tests.golden_cases import write_case

NAMES = ("a", "b", "c")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three cases, one of them a fingerprint, and a document. Nothing is emitted yet."""
    for seed, name in enumerate(NAMES):
        write_case(tmp_path / name, seed, 'store = "fingerprint"' if name == "b" else "")
    (tmp_path / "FORMAT.md").write_text("text")
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [*map(str, arguments)], catch_exceptions=True)


def emitted(folder: Path, processes: int = 1) -> list[str]:
    """Emit the cases that are not up to date, and return their names."""
    done = run("suite", "emit", "--golden", folder, "--json", "--executor", f"processes:{processes}")
    found: list[str] = json.loads(done.output)["emitted"]
    return found


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_cases_are_emitted_and_then_none_is(folder: Path) -> None:
    assert emitted(folder) == ["a", "b", "c"]
    whole = contents(folder)
    assert emitted(folder) == []
    assert contents(folder) == whole
    assert golden.verify_files(folder) == []
    assert run("suite", "check", "--golden", folder, "--executor", "processes:1").exit_code == 0


def test_what_a_killed_emission_left_undone_is_all_that_is_done(folder: Path) -> None:
    """One case was never written, one has changed since, one was half overwritten. Its left-over files go."""
    emitted(folder)
    whole = contents(folder)
    (folder / "a" / "manifest.json").unlink()
    write_case(folder / "b", 1, 'store = "fingerprint"\nstart = 5')
    (folder / "c" / "trace-0123456789abcdef.safetensors").write_text("half")
    assert emitted(folder, processes=2) == ["a", "b"]
    assert golden.verify_files(folder) == []
    assert golden.leftovers(folder / "c") == []
    write_case(folder / "b", 1, 'store = "fingerprint"')
    assert emitted(folder) == ["b"]
    assert contents(folder) == whole


def test_check_says_the_same_in_one_process_and_in_several(folder: Path) -> None:
    emitted(folder)
    write_case(folder / "c", 7)
    (folder / "FORMAT.md").write_text("other text")
    one, two = (run("suite", "check", "--golden", folder, "--executor", f"processes:{n}", "--json") for n in (1, 2))
    assert (one.exit_code, one.output) == (two.exit_code, two.output)
    found = json.loads(one.output)
    assert one.exit_code == 1
    assert not found["ok"]
    assert found["cases"]["a"] == found["cases"]["b"] == found["leftovers"] == []
    assert any("'prefill/logits' differs at [0, 0]" in what for what in found["cases"]["c"])
    assert found["documents"] == [f"{folder / 'FORMAT.md'}: SHA-256 differs from the manifest's"]
    text = run("suite", "check", "--golden", folder).output.splitlines()
    assert text[0] == "ok    a"
    assert "FAIL  c" in text
    assert "FAIL  (documents)" in text
    assert text[-1] == "3 cases recomputed, 1 differ"


def test_a_case_that_cannot_be_read_does_not_hide_the_others(folder: Path) -> None:
    emitted(folder)
    (folder / "a" / "case.toml").write_text("not toml")
    write_case(folder / "c", 7)
    done = run("suite", "check", "--golden", folder, "--executor", "processes:1", "--json")
    found = json.loads(done.output)["cases"]
    assert done.exit_code == 1
    assert any("not valid TOML" in what for what in found["a"])
    assert found["c"]


def test_a_leftover_is_noted_and_is_no_failure(folder: Path) -> None:
    emitted(folder)
    path = folder / "a" / ".manifest.json.abcdefgh.tmp"
    path.write_text("half")
    done = run("suite", "check", "--golden", folder, "--executor", "processes:1")
    assert done.exit_code == 0
    assert f"note  {path}: left over" in done.output
    assert json.loads(run("suite", "check", "a", "--golden", folder, "--json").output)["leftovers"] == [str(path)]


def test_certify_goes_over_all_and_check_still_passes(folder: Path) -> None:
    emitted(folder)
    assert [*json.loads(run("suite", "certify", "--golden", folder, "--json", "--executor", "processes:2").output)] == [
        *NAMES
    ]
    assert all(golden.read_manifest(folder / name)["certificate"] for name in NAMES)
    assert run("suite", "check", "--golden", folder, "--executor", "processes:1").exit_code == 0
    assert emitted(folder) == []


def test_nothing_is_written_unless_it_is_told_where(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment variable tells where to read, and never where to write."""
    emitted(folder)
    (folder / "a" / "trace-0123456789abcdef.safetensors").write_text("half")
    write_case(folder / "b", 1, 'store = "fingerprint"\nstart = 5')
    before = contents(folder)
    monkeypatch.setenv("REFMOE_GOLDEN", str(folder))
    assert run("suite", "check", "--executor", "processes:1").exit_code == 1
    assert [*json.loads(run("suite", "certify", "a", "--json").output)] == ["a"]
    assert run("suite", "emit").exit_code == 2
    assert (
        run("mutants", "matrix", "--case", "a", "--mutant", "rope-sign-flipped", "--executor", "processes:1").exit_code
        == 0
    )
    assert contents(folder) == before


def test_an_unknown_case_is_answered_with_the_similar_ones(folder: Path) -> None:
    (folder / "b").rename(folder / "bravo")
    done = run("suite", "check", "brave", "--golden", folder)
    assert "case 'brave' is unknown" in str(done.exception)
    assert "did you mean bravo?" in str(done.exception)


def test_all_of_a_single_case_is_refused(folder: Path) -> None:
    done = run("suite", "emit", "--golden", folder / "a")
    assert "is a case, but a folder of cases was expected" in str(done.exception)


def test_emission_of_a_broken_case_names_it(folder: Path) -> None:
    shutil.copytree(folder / "a", folder / "d")
    (folder / "d" / "case.toml").write_text("")
    done = run("suite", "emit", "--golden", folder)
    assert f"{folder / 'd' / 'case.toml'}: 'format_version' is missing" in str(done.exception)


def thread_settings(_item: int) -> tuple[int, list[str | None]]:
    return os.getpid(), [os.environ.get(name) for name in ONE_THREAD]


def test_several_processes_have_one_thread_each() -> None:
    before = dict(os.environ)
    with results(thread_settings, range(4), 2) as found:
        settings = dict(found)
    assert sorted(settings) == [0, 1, 2, 3]
    assert os.getpid() not in {process for process, _ in settings.values()}
    assert all(values == ["1", "1", "1"] for _, values in settings.values())
    assert dict(os.environ) == before


def refuse(item: int) -> int:
    raise InputError(f"item {item} is refused")


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_call_raises_is_raised_to_the_caller(jobs: int) -> None:
    with pytest.raises(InputError, match="item 1 is refused"), results(refuse, [1, 1], jobs) as found:
        next(found)
