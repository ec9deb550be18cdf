# SPDX-License-Identifier: Apache-2.0
"""The HTML page in a browser: at the width of a telephone, in both colour schemes, with and without script."""

from __future__ import annotations

import time
from collections.abc import Iterator
from html import escape
from pathlib import Path

import pytest

from tests.report.chromium import BROWSER, Chromium, Page
from tests.report.sample_pages import all_pages
from tests.report.sample_reports import SAMPLES

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium found: install chromium or google-chrome"),
]

CELL = 'Array.from(document.querySelectorAll("#heat-map th")).find(h => h.textContent === "{}").parentElement.cells[{}]'
LOGITS = CELL.format("router.logits", 1)

CONTRAST = """
(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = numbers(colour).slice(0, 3).map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor, parts = numbers(colour);
      if (parts.length === 3 || parts[3] === 1) return colour;
      if (parts[3] !== 0) return "rgb(128, 128, 128)";
    }
    return "rgb(255, 0, 255)";
  };
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), bad = [];
  let seen = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.getClientRects().length || element.closest("script")) continue;
    const style = getComputedStyle(element);
    const ink = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(ink), light(behind(element))].sort((x, y) => y - x);
    seen += 1;
    if ((a + 0.05) / (b + 0.05) < 4.5) bad.push([walker.currentNode.data.slice(0, 30), element.className, ink]);
  }
  return { seen, bad };
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    paths = {}
    for name, text in all_pages().items():
        paths[name] = folder / f"{name}.html"
        paths[name].write_text(text, encoding="utf-8")
    return paths


@pytest.fixture
def page(browser: Chromium, files: dict[str, Path]) -> Iterator[Page]:
    opened = browser.open(files["failing"])
    yield opened
    opened.close()


@pytest.mark.parametrize("name", SAMPLES)
def test_a_telephone_shows_it_without_scrolling_sideways(browser: Chromium, files: dict[str, Path], name: str) -> None:
    page = browser.open(files[name], 360)
    try:
        assert page.evaluate("innerWidth") == 360
        page.evaluate('document.querySelectorAll("details").forEach((d) => { d.open = true; })')
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        wide = """Array.from(document.querySelectorAll("main *, header *"))
          .filter((e) => !e.closest(".scroll, svg, .hidden") && e.getBoundingClientRect().right > 360.5)
          .map((e) => e.outerHTML.slice(0, 80))"""
        assert page.evaluate(wide) == []
        assert page.complaints() == []
        assert page.requests() == [files[name].as_uri()]
        assert not page.evaluate("document.title").startswith("owned")
    finally:
        page.close()


@pytest.mark.parametrize("name", ["failing", "conformant"])
def test_at_a_desk_no_table_needs_scrolling_sideways(browser: Chromium, files: dict[str, Path], name: str) -> None:
    page = browser.open(files[name], 1300)
    try:
        page.evaluate('document.querySelectorAll("details").forEach((d) => { d.open = true; })')
        wide = """Array.from(document.querySelectorAll(".scroll")).filter((e) => e.scrollWidth > e.clientWidth)
          .map((e) => e.ariaLabel)"""
        assert page.evaluate(wide) == []
    finally:
        page.close()


def test_a_term_leads_to_its_definition_in_the_frame_of_a_notebook(
    browser: Chromium, files: dict[str, Path], tmp_path: Path
) -> None:
    """The frame has no address and no origin of its own, so that links to "#..." need help."""
    notebook = tmp_path / "notebook.html"
    text = escape(files["failing"].read_text(encoding="utf-8"), quote=True)
    notebook.write_text(f'<!DOCTYPE html><iframe sandbox="allow-scripts" srcdoc="{text}"></iframe>', encoding="utf-8")
    page = browser.open(notebook)
    try:
        targets = browser.send("Target.getTargets")["targetInfos"]
        frame = next((target for target in targets if target["type"] == "iframe"), None)
        if frame is None:
            pytest.skip("this chromium gives a frame without an origin no target of its own")
        session = browser.send("Target.attachToTarget", targetId=frame["targetId"], flatten=True)["sessionId"]
        click = 'document.querySelector("a.term").click(); document.activeElement.id'
        answer = browser.send("Runtime.evaluate", session, expression=click, returnByValue=True)
        assert answer["result"]["value"].startswith("term-")
    finally:
        page.close()


def test_a_term_leads_to_its_definition(page: Page) -> None:
    page.evaluate('document.querySelector("a.term").click()')
    place = 'document.querySelector(":target").getBoundingClientRect()'
    assert 0 <= page.evaluate(f"{place}.top") < page.evaluate("innerHeight")
    assert len(page.requests()) == 1


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["failing", "hostile", "undecidable"])
def test_text_stands_out_from_its_background(browser: Chromium, files: dict[str, Path], name: str, dark: bool) -> None:
    page = browser.open(files[name], dark=dark)
    try:
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 27)" if dark else "rgb(252, 252, 250)")
        result = page.evaluate(CONTRAST)
        assert result["seen"] > 50
        assert result["bad"] == []
    finally:
        page.close()


def test_a_run_can_be_chosen(page: Page) -> None:
    def choose(run: int) -> tuple[str, str, str]:
        page.evaluate(f'(() => {{ const s = document.getElementById("run"); s.value = "{run}";'
                      's.dispatchEvent(new Event("change")); })()')  # fmt: skip
        return tuple(page.evaluate(f"[{LOGITS}.className, {LOGITS}.innerText, {LOGITS}.ariaLabel]"))

    assert choose(-1)[:2] == ("cell fail3 first", "✕ 214")
    name, text, words = choose(0)
    assert (name, text) == ("cell fail3 first", "✕ 214")
    for said in ("layers.0.router.logits", "prefill", "214", "1003", "3 of 128 values", "0.523"):
        assert said in words
    name, text, words = choose(1)
    assert name == "cell pass1"
    assert text.startswith("· 0.")
    assert "layers.0.router.logits, run decode1" in words
    assert choose(-1)[0] == "cell fail3 first"


def test_the_keyboard_reaches_every_cell_and_the_focus_shows(page: Page) -> None:
    def focused() -> str:
        return str(page.evaluate("document.activeElement.parentElement.cells[0].textContent"))

    for _ in range(20):
        page.press("Tab")
        if page.evaluate('document.activeElement.classList.contains("cell")'):
            break
    assert focused() == "router.logits"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    detail = 'document.getElementById("detail").textContent'
    assert page.evaluate(detail).startswith("layers.0.router.logits: ")
    page.press("ArrowRight")
    assert page.evaluate(detail).startswith("layers.1.router.logits: ")
    page.press("ArrowDown")
    assert page.evaluate(detail).startswith("layers.1.router.experts: ")
    for _ in range(40):
        page.press("ArrowDown")
    assert focused() == "logits"
    for _ in range(40):
        page.press("ArrowUp")
    assert focused() == "embedding"
    assert page.evaluate('document.querySelectorAll("#heat-map [tabindex=\\"0\\"]").length') == 1


def test_a_tap_and_a_pointer_give_the_details(browser: Chromium, files: dict[str, Path]) -> None:
    page = browser.open(files["failing"], 360)
    try:
        place = f'(() => {{ {LOGITS}.scrollIntoView({{block: "center"}}); const r = {LOGITS}.getBoundingClientRect();'
        x, y = page.evaluate(f"{place} return [r.x + r.width / 2, r.y + r.height / 2]; }})()")
        page.tap(x, y)
        detail = 'document.getElementById("detail")'
        assert page.evaluate(f"{detail}.textContent").startswith("layers.0.router.logits: ")
        top, bottom = page.evaluate(
            f"(() => {{ const r = {detail}.getBoundingClientRect(); return [r.top, r.bottom]; }})()"
        )
        assert 0 <= top < bottom <= 800
    finally:
        page.close()


def test_each_verdict_has_its_symbol_and_cells_are_large_enough_to_tap(page: Page) -> None:
    cells = page.evaluate("""Array.from(document.querySelectorAll(".cell")).map((c) => {
      const r = c.getBoundingClientRect(); return [c.classList[1], c.children[0].textContent, r.width, r.height]; })""")
    symbols = {"pass": "·", "fail": "✕", "open": "?"}
    assert len(cells) == 45
    for name, symbol, width, height in cells:
        assert symbol == symbols[name[:4]]
        assert width >= 24
        assert height >= 24


def test_without_script_the_page_is_complete(browser: Chromium, files: dict[str, Path]) -> None:
    page = browser.open(files["failing"], 360, script=False)
    try:
        assert page.evaluate('getComputedStyle(document.querySelector(".choose")).display') == "none"
        assert page.evaluate('getComputedStyle(document.getElementById("detail")).display') == "none"
        assert page.evaluate(f"{LOGITS}.title").startswith("layers.0.router.logits: ")
        assert page.evaluate(f"{LOGITS}.innerText") == "✕ 214"
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    finally:
        page.close()


def test_the_page_cannot_ask_the_network_for_anything(page: Page) -> None:
    assert (
        page.evaluate("""new Promise((resolve) => {
      document.addEventListener("securitypolicyviolation", (event) => resolve(event.blockedURI));
      const image = document.createElement("img");
      image.src = "https://refmoe.invalid/a.png";
      document.body.append(image);
      setTimeout(() => resolve("not blocked"), 2000); })""")
        == "https://refmoe.invalid/a.png"
    )


def test_a_large_page_stays_quick(browser: Chromium, files: dict[str, Path]) -> None:
    start = time.monotonic()
    page = browser.open(files["large"])
    try:
        loaded = time.monotonic() - start
        spent = page.evaluate("""(() => { const s = document.getElementById("run"), start = performance.now();
          s.value = "17"; s.dispatchEvent(new Event("change")); document.body.offsetHeight;
          return performance.now() - start; })()""")
        assert loaded < 8
        assert spent < 2000
        assert page.evaluate('document.querySelectorAll(".cell.fail3.first").length') == 1
    finally:
        page.close()
