# SPDX-License-Identifier: Apache-2.0
"""The page of the scoreboard in a browser, with the results of all engines that the repository has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from refmoe.engines.scoreboard import result_files, scoreboard
from refmoe.report.scoreboard import to_html
from tests.report.chromium import BROWSER, Chromium
from tests.report.test_html_browser import CONTRAST

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium found: install chromium or google-chrome"),
]

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "conform"
BOARD = scoreboard(result_files((RESULTS,)))

LINES = """Array.from(document.querySelectorAll("{}")).map((head) => {{
  const range = document.createRange();
  range.selectNodeContents(head);
  return new Set(Array.from(range.getClientRects()).map((box) => Math.round(box.top))).size;
}})"""
"""The number of lines of text in each element that a selector finds."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scoreboard") / "scoreboard.html"
    file.write_text(to_html(BOARD), encoding="utf-8")
    return file


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1300, 500, 400])
def test_names_of_cases_stay_whole_at_every_width(browser: Chromium, path: Path, width: int, dark: bool) -> None:
    page = browser.open(path, width, dark=dark)
    try:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(LINES.format("#board tbody th code")) == [1] * len(BOARD.cases)
        assert max(page.evaluate(LINES.format("#board thead th"))) <= 10
        assert page.evaluate(CONTRAST)["bad"] == []
        assert page.complaints() == []
        assert page.requests() == [path.as_uri()]
    finally:
        page.close()


def test_a_desk_shows_eight_engines_at_once(browser: Chromium, tmp_path: Path) -> None:
    few = scoreboard(result_files((RESULTS,))[:8])
    (tmp_path / "few.html").write_text(to_html(few), encoding="utf-8")
    page = browser.open(tmp_path / "few.html", 1300)
    try:
        fits = """(() => { const box = document.getElementById("board").closest(".scroll");
          return box.scrollWidth <= box.clientWidth; })()"""
        assert page.evaluate(fits)
        assert page.evaluate('document.querySelectorAll("#board thead th").length') == 1 + len(few.entrants)
    finally:
        page.close()


def test_more_engines_move_beneath_the_names_of_the_cases(browser: Chromium, path: Path) -> None:
    page = browser.open(path, 1300)
    try:
        moved = """(() => { const box = document.getElementById("board").closest(".scroll");
          box.scrollLeft = box.scrollWidth;
          const name = document.querySelector("#board tbody th").getBoundingClientRect();
          return [box.scrollLeft > 0, name.left - box.getBoundingClientRect().left]; })()"""
        assert len(BOARD.entrants) > 12
        scrolled, left = page.evaluate(moved)
        assert scrolled
        assert abs(left) <= 2
    finally:
        page.close()
