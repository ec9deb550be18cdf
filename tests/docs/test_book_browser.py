# SPDX-License-Identifier: Apache-2.0
"""The book in a browser: questions within three clicks, search without a network, no barrier that axe finds.

axe-core is no Python package: ``npm install --no-save --prefix build axe-core`` brings it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from refmoe.profiles.cut_points import CUT_POINTS
from refmoe.profiles.load import policy
from refmoe.suite import read_manifest
from refmoe.suite.audit import stated
from tests.report.chromium import BROWSER, Chromium, Page
from tests.tour import ROOT

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium found: install chromium or google-chrome"),
]

AXE = ROOT / "build" / "node_modules" / "axe-core" / "axe.min.js"
KINDS = (
    "index", "questions", "steps/index", "steps/attend", "steps/softmax", "clauses/ROUTE-3", "clauses/index",
    "rounding", "certificates", "bugs/rmsnorm", "tests/spec-test_model", "engines",
)  # fmt: skip
"""One page of each kind."""
QUESTIONS: dict[str, Callable[[], str]] = {
    "What happens at a tie?": lambda: clause("ROUTE-3"),
    "What proves that a dropped expert is seen?": lambda: "load-experts-silently-dropped",
    "Which weights may an engine round?": lambda: CUT_POINTS["weights"].about,
    "How far is a golden from the real number, and who says so?": lambda: f"{worst('walking-skeleton'):.2g}",
    "What does a pass not prove?": lambda: "What no trace can show",
    "How far off may an engine's exp be, and why so far?": lambda: policy("float32").exp.source,
    "Which tokens does a sliding window hide?": lambda: clause("ATTN-4"),
    "May the order of a sum change the verdict on an engine?": lambda: "for every order, tree, blocking and fusion",
    "Do other machines give the same goldens?": lambda: "The same bits everywhere",
    "Which real engines were judged, and where were they wrong?": lambda: "First wrong here: mlx-lm",
}
"""An auditor's questions, and what must stand on the page that the third click leads to."""


def clause(name: str) -> str:
    return next(text for each, text, _ in stated() if each == name)


def worst(case: str) -> float:
    return float(read_manifest(ROOT / "golden" / case)["certificate"]["worst"]["relative"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def site(built: tuple[Path, str]) -> Path:
    return built[0]


def click(page: Page, link: str) -> None:
    """Click the link that this expression gives, and wait for its page."""
    page.browser.events.clear()
    page.evaluate(f"({link}).click()")
    page.browser.wait("Page.loadEventFired")


def named(words: str) -> str:
    """The link with these words."""
    return f"Array.from(document.links).find((a) => a.textContent.trim() === {json.dumps(words)})"


def visible_text(page: Page) -> str:
    return " ".join(str(page.evaluate('document.querySelector("article").innerText')).split())


def test_each_question_is_answered_within_three_clicks(browser: Chromium, site: Path) -> None:
    wrong = []
    for question, evidence in QUESTIONS.items():
        page = browser.open(site / "docs" / "index.html", 1300)
        try:
            click(page, named("The auditor\u2019s book"))
            click(page, named("An auditor\u2019s ten questions"))
            asked = json.dumps(question.replace("'", "\u2019"))
            heads = 'Array.from(document.querySelectorAll("h2"))'
            section = f"{heads}.find((h) => h.firstChild.textContent === {asked}).parentElement"
            click(page, f'{section}.querySelector("p a:not(.term)")')
            if " ".join(evidence().split()) not in visible_text(page):
                wrong.append((question, page.evaluate("location.href")))
        finally:
            page.close()
    assert wrong == []
    assert len(QUESTIONS) == 10


def test_search_works_without_a_network(browser: Chromium, site: Path) -> None:
    page = browser.open(site / "search.html")
    try:
        page.browser.events.clear()
        page.send("Page.navigate", url=f"{(site / 'search.html').as_uri()}?q=lower+expert+id")
        page.browser.wait("Page.loadEventFired")
        found = page.evaluate("""new Promise((resolve) => { const look = (left) => {
          const titles = Array.from(document.querySelectorAll("#search-results li a")).map((a) => a.textContent);
          if (titles.includes("ROUTE-3") || !left) resolve(titles);
          else setTimeout(look, 100, left - 1); }; look(100); })""")
        assert "ROUTE-3" in found
        assert all(address.startswith(("file://", "data:")) for address in page.requests())
    finally:
        page.close()


@pytest.mark.parametrize("width", [400, 1300])
def test_a_page_fits_its_window_and_asks_for_nothing(browser: Chromium, site: Path, width: int) -> None:
    for name in KINDS:
        page = browser.open(site / "docs" / "book" / f"{name}.html", width)
        try:
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
            assert page.complaints() == []
            assert all(address.startswith(("file://", "data:")) for address in page.requests())
        finally:
            page.close()


PAPER = 718
"""The width of A4 between margins of 1 cm, in pixels of a style sheet."""
CUT = """Array.from(document.querySelectorAll("body *")).filter((each) => {
  const style = getComputedStyle(each), box = each.getBoundingClientRect();
  const hides = style.overflowX !== "visible" && each.scrollWidth > each.clientWidth + 1
    || style.overflowY !== "visible" && each.scrollHeight > each.clientHeight + 1;
  return box.width > 0 && !each.closest(".visually-hidden") && (hides || box.right > innerWidth + 1);
}).map((each) => each.outerHTML.slice(0, 200))"""
"""What is cut on paper, where nothing scrolls."""
BESIDE = """Array.from(document.querySelectorAll("body *")).filter((each) => {
  const box = each.getBoundingClientRect(), inside = each.closest("article") || each.querySelector("article");
  return box.width > 1 && box.height > 1 && each.innerText && !inside;
}).map((each) => each.outerHTML.slice(0, 200))"""
"""What stands beside the text, such as a sidebar."""


@pytest.mark.parametrize("name", [*KINDS, "../verification", "../../golden/dot"])
def test_on_paper_nothing_is_cut_and_nothing_stands_beside_the_text(
    browser: Chromium, site: Path, name: str
) -> None:  # fmt: skip
    page = browser.open(site / "docs" / "book" / f"{name}.html", PAPER)
    try:
        page.send("Emulation.setEmulatedMedia", media="print")
        assert page.evaluate(CUT) == []
        assert page.evaluate(BESIDE) == []
        folded = 'Array.from(document.querySelectorAll("article details:not(.exact) > :not(summary)"))'
        assert page.evaluate(f"{folded}.filter((each) => each.checkVisibility() === false).length") == 0
    finally:
        page.close()


@pytest.mark.skipif(not AXE.exists(), reason="no axe-core: npm install --no-save --prefix build axe-core")
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_barrier(browser: Chromium, site: Path, dark: bool) -> None:
    found = {}
    for name in KINDS:
        page = browser.open(site / "docs" / "book" / f"{name}.html", 400 if dark else 1300, dark=dark)
        try:
            page.evaluate(AXE.read_text(encoding="utf-8") + ";0")
            page.evaluate("document.querySelectorAll('article details').forEach((d) => { d.open = true; })")
            barriers = page.evaluate("""axe.run().then((r) => r.violations.map((v) =>
              [v.id, v.nodes.length, v.nodes[0].html.slice(0, 200), v.nodes[0].failureSummary.slice(0, 300)]))""")
            if barriers:
                found[name] = barriers
        finally:
            page.close()
    assert found == {}
