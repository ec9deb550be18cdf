# SPDX-License-Identifier: Apache-2.0
"""The page of the matrix, as text and in a browser: on a telephone's width, in both colour schemes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.errors import InputError
from refmoe.report.matrix_html import STATES, cell, to_html
from refmoe.suite import find_cases, read_case
from refmoe.suite.matrix.dependencies import digests
from refmoe.suite.matrix.file import Matrix
from refmoe.suite.matrix.outcomes import POLICIES, SPECIFICATION, runnable
from refmoe.suite.matrix.summary import summarise
from refmoe.verifier.findings import CANNOT_JUDGE, CONFORMANT
from tests.bugs.judging import GOLDEN
from tests.bugs.sample_matrix import all_killed, kills
from tests.report.chromium import BROWSER, Chromium, Page
from tests.report.test_html import Outline
from tests.report.test_html_browser import CONTRAST

HOSTILE = "</script><script>document.title='owned'</script>{{ 7*7 }}\x1b[31m"
ALL, SOME = "mini-8x7b", "window-chunks"


def sample() -> Matrix:
    """Every state of a cell; a mutant that lives without a reason; a specification that fails; a hostile name."""
    matrix = Matrix(digests(GOLDEN), kills(ALL), {}, dict(all_killed(GOLDEN).outside))
    del matrix.kills["rope-sign-flipped"]["float16"]
    matrix.kills["attn-gqa-tile"]["float32"][SOME] = "router.experts routing local"
    matrix.kills["attn-gqa-tile"]["bfloat16"][SOME] = "attention.context improbable routing-replayed"
    matrix.lives["attn-gqa-tile"] = {"float16": {SOME: CONFORMANT}}
    matrix.lives["attn-causal-strict"] = {"float16": {SOME: CANNOT_JUDGE}}
    matrix.kills[SPECIFICATION] = {"float32": {SOME: "logits impossible local"}}
    matrix.outside["tok-double-bos"] = {"vectors/some.json": [HOSTILE]}
    return matrix


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    cases = [read_case(folder) for folder in find_cases(GOLDEN)]
    full = {
        name: {p: {case.name: "attention.q impossible local" for case in cases} for p in POLICIES}
        for name in runnable()
    }
    made = {"failing": sample(), "killed": all_killed(GOLDEN, ALL), "full": Matrix({}, full, {}, {})}
    return {name: to_html(matrix, cases) for name, matrix in made.items()}


# ---- as text


@pytest.mark.parametrize("name", ["failing", "killed", "full"])
def test_a_page_is_one_well_formed_document_without_anything_from_outside(pages: dict[str, str], name: str) -> None:
    outline = Outline(pages[name])
    assert outline.stack == []
    for tag, attributes in outline.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "href", "style", "srcset", "action"} & set(attributes), (tag, attributes)
        assert not [key for key in attributes if key.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", pages[name])
    names = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(names) == len(set(names))
    tags = [tag for tag, _ in outline.tags]
    assert all(tags.count(tag) == 1 for tag in ("header", "main", "footer", "h1", "title"))
    assert tags.count("h2") == sum("aria-labelledby" in attributes for _, attributes in outline.tags)
    assert len(pages[name].encode()) < 1_500_000


def test_names_that_look_like_code_stay_names(pages: dict[str, str]) -> None:
    page = pages["failing"]
    page.encode()
    assert "<script>document" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert "{{ 7*7 }}" in " ".join(Outline(page).texts)


def test_the_page_says_what_the_matrix_says(pages: dict[str, str]) -> None:
    texts = " ".join(" ".join(Outline(pages["failing"]).texts).split())
    summary = summarise(sample(), [read_case(folder).name for folder in find_cases(GOLDEN)])
    assert len(summary.problems) == 2
    for words in (*summary.problems, *summary.equivalent.values(), "rope-sign-flipped"):
        assert words in texts, words
    assert not any(problem in pages["killed"] for problem in summary.problems)
    for name in MUTANTS:
        assert f"<code>{name}</code>" in pages["killed"]


def test_a_cell_has_a_mark_for_each_policy_and_its_words() -> None:
    matrix = sample()
    mixed = cell(matrix, "attn-gqa-tile", SOME)
    assert mixed.marks == (("routing", "▲"), ("improbable", "◆"), ("conformant", "○"))
    assert mixed.words == (
        "float32: router.experts, routing (local); bfloat16: attention.context, improbable (routing-replayed); "
        "float16: changes something, all of it legal"
    )
    whole = cell(matrix, "attn-gqa-tile", ALL)
    assert whole.marks == (("impossible", "■■■"),)
    assert whole.words == "float32, bfloat16, float16: attention.q, impossible (local)"
    assert cell(matrix, "attn-causal-strict", SOME).marks == (("inert", "··"), ("cannot-judge", "?"))
    assert cell(matrix, "attn-scale-missing", SOME).marks == ()
    assert len({mark for mark, _ in STATES.values()}) == len(STATES)


def test_without_jinja_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match=r"pip install 'refmoe\[html\]'"):
        to_html(sample(), [])


# ---- in a browser

in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium found: install chromium or google-chrome")
CELL = """(() => {{ const row = Array.from(document.querySelectorAll("#matrix tbody th"))
  .find((th) => th.textContent.startsWith("{}")).parentElement;
  const column = Array.from(document.querySelectorAll("#matrix thead th")).findIndex((th) => th.textContent === "{}");
  return row.cells[column]; }})()"""
DETAIL = 'document.getElementById("detail").textContent'


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def files(pages: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("matrix")
    paths = {}
    for name, text in pages.items():
        paths[name] = folder / f"{name}.html"
        paths[name].write_text(text, encoding="utf-8")
    return paths


@pytest.fixture
def page(browser: Chromium, files: dict[str, Path]) -> Iterator[Page]:
    page = browser.open(files["failing"])
    yield page
    page.close()


@pytest.mark.browser
@in_a_browser
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", ["failing", "killed", "full"])
def test_nothing_is_wider_than_the_window_and_nothing_complains(
    browser: Chromium, files: dict[str, Path], name: str, width: int
) -> None:
    page = browser.open(files[name], width)
    try:
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.complaints() == []
        assert page.requests() == [files[name].as_uri()]
        assert not page.evaluate("document.title").startswith("owned")
    finally:
        page.close()


@pytest.mark.browser
@in_a_browser
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_background(browser: Chromium, files: dict[str, Path], dark: bool) -> None:
    page = browser.open(files["failing"], dark=dark)
    try:
        result = page.evaluate(CONTRAST)
        assert result["seen"] > 300
        assert result["bad"] == []
    finally:
        page.close()


@pytest.mark.browser
@in_a_browser
def test_the_grid_is_filtered_by_class_and_by_text(page: Page) -> None:
    def shown(kind: str, text: str) -> tuple[int, str]:
        page.evaluate(f"""(() => {{ kind.value = "{kind}"; kind.dispatchEvent(new Event("change"));
          text.value = "{text}"; text.dispatchEvent(new Event("input")); }})()""")
        rows = 'Array.from(document.querySelectorAll("#matrix tbody th[scope=row]")).filter((th) => th.offsetParent)'
        return page.evaluate(f"{rows}.length"), page.evaluate('document.getElementById("shown").textContent')

    everything = len(runnable())
    assert shown("", "") == (everything, f"{everything} of {everything} mutants")
    rope = sum(MUTANTS[name].kind == "rope" for name in runnable())
    assert shown("rope", "") == (rope, f"{rope} of {everything} mutants")
    assert shown("rope", "SIGN flipped")[0] == 1
    assert shown("attention", "sign-flipped")[0] == 0
    assert shown("", "no such mutant")[0] == 0


@pytest.mark.browser
@in_a_browser
def test_a_cell_is_said_in_words_to_pointer_and_keyboard(page: Page) -> None:
    page.evaluate(f"{CELL.format('attn-gqa-tile', SOME)}.click()")
    said = page.evaluate(DETAIL)
    assert said.startswith("attn-gqa-tile on window-chunks. float32: router.experts, routing (local); bfloat16: ")
    assert MUTANTS["attn-gqa-tile"].about[:40] in said
    page.press("ArrowLeft")
    assert page.evaluate(DETAIL).startswith(f"attn-gqa-tile on {ALL}. ")
    page.press("ArrowDown")
    below = page.evaluate(DETAIL)
    assert f" on {ALL}. " in below
    assert not below.startswith("attn-gqa-tile")
    page.press("ArrowUp")
    assert page.evaluate(DETAIL).startswith("attn-gqa-tile")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.evaluate('document.querySelectorAll("#matrix [tabindex=\\"0\\"]").length') == 1


@pytest.mark.browser
@in_a_browser
def test_without_script_the_page_is_complete(browser: Chromium, files: dict[str, Path]) -> None:
    page = browser.open(files["failing"], 360, script=False)
    try:
        assert page.evaluate('getComputedStyle(document.querySelector(".choose")).display') == "none"
        assert page.evaluate('getComputedStyle(document.getElementById("detail")).display') == "none"
        assert page.evaluate(f"{CELL.format('attn-gqa-tile', ALL)}.title").endswith("attention.q, impossible (local)")
        assert page.evaluate(f"{CELL.format('attn-gqa-tile', ALL)}.innerText") == "■■■"
    finally:
        page.close()


@pytest.mark.browser
@in_a_browser
def test_the_head_of_row_and_column_stay_in_sight(browser: Chromium, files: dict[str, Path]) -> None:
    page = browser.open(files["full"], 360)
    try:
        place = """(() => { const grid = document.querySelector(".grid"); grid.scrollTo(600, 900);
          const box = grid.getBoundingClientRect(), one = (e) => e.getBoundingClientRect();
          const rows = Array.from(document.querySelectorAll("#matrix tbody th[scope=row]"));
          const left = rows.map((th) => one(th).left - box.left), head = document.querySelector("#matrix thead th");
          return [Math.max(...left), Math.min(...left), one(head).top - box.top, one(head).left - box.left]; })()"""
        assert all(0 <= distance <= 2 for distance in page.evaluate(place))
    finally:
        page.close()
