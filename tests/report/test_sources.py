# SPDX-License-Identifier: Apache-2.0
"""Places in an engine's source, as a user names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refmoe.errors import InputError
from refmoe.report.sources import Place, read_sources

LINES = "first\n\ndef rotate(x):  # \u00e9\n    return x\n"


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder within a repository, with a source file."""
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    work = tmp_path / "repository" / "engine"
    work.mkdir()
    (work / "rope x.py").write_text(LINES, encoding="utf-8")
    (work / "a:1").write_text("odd\nname\n")
    (work / "empty").touch()
    (work / "pages").write_text("a\x0cb\u2028c\r\nsecond\r\n", encoding="utf-8", newline="")
    (work / "program").write_bytes(b"\x7fELF\xff\xfe")
    (work / "link").symlink_to(work / "rope x.py")
    (tmp_path / "outside.py").write_text("x\n")
    monkeypatch.chdir(work)
    return work


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("rope x.py:3", Place("engine/rope%20x.py", 3, 20)),
        ("rope x.py:def rotate", Place("engine/rope%20x.py", 3, 20)),
        ("rope x.py:return", Place("engine/rope%20x.py", 4, 13)),
        ("rope x.py", Place("engine/rope%20x.py", 1, 6)),
        ("rope x.py:2", Place("engine/rope%20x.py", 2, 1)),
        ("link:3", Place("engine/rope%20x.py", 3, 20)),
        ("a:1", Place("engine/a%3A1", 1, 4)),
        ("a:1:2", Place("engine/a%3A1", 2, 5)),
        ("empty", Place("engine/empty", 1, 1)),
        ("pages:2", Place("engine/pages", 2, 7)),
        ("pages:b", Place("engine/pages", 1, 6)),
    ],
)
def test_a_line_is_named_by_its_number_or_its_text(given: str, place: Place) -> None:
    """The place is relative to the root of the repository, with links followed, as GitHub shows files."""
    assert read_sources([given], []).rest == place
    sources = read_sources([f"router.logits={given}", "empty"], [])
    assert sources.of("router.logits") == place
    assert sources.of("logits") == sources.rest == Place("engine/empty", 1, 1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["rope x.py:9"], "has 4 lines, but --source names line 9"),
        (["rope x.py:0"], "has 4 lines, but --source names line 0"),
        (["rope x.py:def turn"], "no line has 'def turn'"),
        (["none.py:3"], "none.py: no such file"),
        (["program"], "is not UTF-8"),
        ([".."], ".."),
        (["../../outside.py:1"], "lies in no repository"),
        (["router.logit=rope x.py:1"], "one of the steps embedding, attention_norm"),
        (["router.logits=rope x.py:1", "router.logits=empty"], "router.logits has a place already"),
        (["rope x.py", "empty"], "all other steps has a place already"),
        (["router.logits=rope x.py:1"], "--source FILE, a file of the engine, was expected"),
        ([""], "a source file of the engine was expected"),
    ],
)
def test_a_place_that_is_none_is_one_sentence(given: list[str], words: str) -> None:
    with pytest.raises(InputError) as raised:
        read_sources(given, [])
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_without_a_place_the_first_text_of_the_repository_is_taken(work: Path) -> None:
    found = read_sources(
        [], [Path("python"), Path("program"), work.parents[1] / "outside.py", Path("link"), Path("empty")]
    )
    assert found.rest.uri == "engine/rope%20x.py"
    assert json.dumps(found.rest.uri).isascii()


def test_without_a_repository_places_are_relative_to_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "x.c").write_text("1\n")
    monkeypatch.chdir(folder)
    assert read_sources(["x.c:1"], []).rest.uri == "x.c"
