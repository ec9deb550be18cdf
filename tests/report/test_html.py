# SPDX-License-Identifier: Apache-2.0
"""The HTML page as text: one small file that needs nothing else, and in which no name acts as code."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from refmoe.errors import InputError
from refmoe.report.error_plot import error_plot, interval_plot
from refmoe.report.glossary import TERMS
from refmoe.report.heat_map import LEVELS, heat_map, level
from refmoe.report.html import LISTED, to_html
from refmoe.report.routing_strips import DRAWN, routing_strips
from refmoe.report.wording import code_place, lead, place
from refmoe.verifier.findings import FAIL, PASS, UNDECIDABLE, Element
from tests.report.sample_pages import all_pages
from tests.report.sample_reports import HOSTILE, SAMPLES, WRONG, all_wrong, conformant, empty, failing, large, quantised

GLOSSARY = Path(__file__).parents[2] / "docs" / "glossary.md"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Outline(HTMLParser):
    """Start tags with their attributes, and whether all elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return all_pages()


def without_hostile(page: str) -> str:
    """The page without the source that is no address, and so stays text."""
    return re.sub(r"<li>https://example.org/&lt;script.*?</li>", "", page)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_link_leads_to_a_term_of_the_page_or_to_a_source(pages: dict[str, str], name: str) -> None:
    outline = Outline(pages[name])
    links = [attributes for tag, attributes in outline.tags if tag == "a"]
    ids = {attributes.get("id") for _, attributes in outline.tags}
    for link in links:
        address = link["href"] or ""
        if address.startswith("#"):
            assert address[1:] in ids
        else:
            assert address.startswith("https://")
            assert (link["rel"] or "").split() == ["noopener", "noreferrer"]
    sources = {address for link in links if not (address := link["href"] or "").startswith("#")}
    expected = {"failing": {"https://example.org/1"}, "hostile": {"https://example.org/fine?a=1&b=2"}}
    assert sources == expected.get(name, expected["failing"] if name == "not_finite" else set())


def test_a_legal_error_changes_nothing_on_the_page() -> None:
    """Whether a healthy engine uses a tenth or nearly all of the allowed error, its page is the same."""
    healthy = conformant()

    def page(error: float) -> str:
        return to_html(replace(healthy, checks=tuple(replace(check, worst_error=error) for check in healthy.checks)))

    assert page(0.1) == page(0.999)
    assert page(0.1) != page(1.5)


def test_terms_have_the_words_of_the_glossary() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    documented = {name: definition.replace("`", "") for name, definition in rows}
    assert {name: documented.get(name) for name in TERMS} == TERMS


@pytest.mark.parametrize("name", SAMPLES)
def test_a_page_is_one_well_formed_document_without_anything_from_outside(pages: dict[str, str], name: str) -> None:
    outline = Outline(pages[name])
    assert outline.stack == []
    for tag, attributes in outline.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "style", "srcset", "action", "ping", "background"} & set(attributes), (tag, attributes)
        assert "href" not in attributes or tag == "a"
        assert not [key for key in attributes if key.startswith("on")]
    assert not re.search(
        r"url\(|@import|https?://", re.sub(r"<a href=[^>]*>[^<]*</a>", "", without_hostile(pages[name]))
    )
    assert [attributes for tag, attributes in outline.tags if tag == "html"] == [{"lang": "en"}]
    names = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(names) == len(set(names))
    tags = [tag for tag, _ in outline.tags]
    assert all(tags.count(tag) == 1 for tag in ("header", "main", "footer", "h1", "title"))
    assert tags.count("h2") == sum("aria-labelledby" in attributes for _, attributes in outline.tags)


def test_names_that_look_like_code_stay_names(pages: dict[str, str]) -> None:
    page = pages["hostile"]
    page.encode()  # no surrogate is left
    assert "<script>document" not in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    texts = " ".join(Outline(page).texts)
    assert "{{ 7*7 }}" in texts
    assert HOSTILE.split("\x1b")[0] in texts
    scripts = [attributes for tag, attributes in Outline(page).tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "heat-data"}, {}]


def test_pages_stay_small_and_lists_end(pages: dict[str, str]) -> None:
    assert len(pages["failing"].encode()) < 100_000
    assert len(pages["large"].encode()) < 2_000_000
    assert len(pages["all_wrong"].encode()) < 3_000_000
    assert f"and {47_160 - LISTED} more, in the JSON report" in pages["all_wrong"]
    assert f"and {50_008 - LISTED} more, in the JSON report" in pages["all_wrong"]
    assert f"and {7000 - LISTED} more codes, in the JSON report" in pages["all_wrong"]
    outline = Outline(pages["all_wrong"])
    assert len(outline.tags) < 30_000


def test_the_page_says_what_the_report_says(pages: dict[str, str]) -> None:
    texts = " ".join(" ".join(Outline(pages["failing"]).texts).split())
    first = failing().check("prefill", WRONG)
    assert first is not None
    assert lead(failing()) in texts
    for words in (
        "router-input-unnormalised", "1.020", "0.010", first.reason, "1003", "12.1", "0.523", "0.3125",
        place("attention.scores", (3, 11, 5)), *failing().missing, *failing().unknown, *failing().notes,
    ):  # fmt: skip
        assert words in texts, words
    assert texts.index("router-input-unnormalised") < texts.index(first.reason)


def test_the_page_names_the_codes_that_are_not_the_rule_s(pages: dict[str, str]) -> None:
    texts = " ".join(" ".join(Outline(pages["quantised"]).texts).split())
    for each in quantised().codes:
        assert (code_place(each) in texts) == each.deviates
    assert 'id="codes"' not in pages["conformant"]


def test_a_cell_s_colour_and_symbol_follow_verdict_and_size() -> None:
    assert [level(PASS, x) for x in (0.0, 0.5, 0.6, 1.0, float("nan"))] == list("aabba")
    assert [level(FAIL, x) for x in (0.5, 3.0, 29.0, 31.0, float("inf"), float("nan"))] == list("eefgge")
    assert (level(UNDECIDABLE, 5.0), level(None, 5.0)) == ("u", "-")
    kinds = {"pass": "·", "fail": "✕", "open": "?", "none": ""}
    assert all(symbol == kinds[name.rstrip("1234")] for name, symbol, _ in LEVELS.values())


def test_the_map_shows_the_worst_of_all_runs_and_keeps_each_run() -> None:
    result = heat_map(failing())
    rows = {row.step: row for row in result.rows}
    assert [row.step for row in result.rows][:2] == ["embedding", "attention_norm"]
    wrong = rows["router.logits"].cells[0]
    assert wrong is not None
    assert (wrong.level, wrong.symbol, wrong.number, wrong.first) == ("fail3", "✕", "214", True)
    assert [cell.first for row in result.rows for cell in row.cells if cell].count(True) == 1
    unsure = rows["residual"].cells[1]
    assert unsure is not None
    assert (unsure.level, unsure.number) == ("open", "")
    data = json.loads(result.data)
    index = data["taps"].index("layers.0.router.logits")
    assert [states[index] for states in data["states"]] == ["g", "a", "a"]
    error, excess, limit, _, reason, amount = data["numbers"][0][index].split()
    assert (error, excess, limit, amount) == ("214", "1003", "12.1", "214")
    first = failing().check("prefill", WRONG)
    assert first is not None
    assert first.reason in data["texts"][int(reason)]
    assert len(data["taps"]) == sum(cell is not None for row in result.rows for cell in row.cells)


def test_every_check_has_its_dots_and_those_beyond_the_scale_their_edge() -> None:
    plot = error_plot(failing())
    marks = {name: part.count("M") for name, part in re.findall(r'<path class="([^"]*)" d="(M[^"]*)"', plot)}
    assert marks["diamond wrong"] == 3
    assert marks["dot wrong"] == 1  # of the one impossible value
    assert marks["dot"] > 60
    assert "wrong" not in error_plot(conformant())
    edges = error_plot(SAMPLES["not_finite"]())
    assert "nan" not in edges.lower()
    assert "inf" not in edges.lower().replace(">infinite<", "")
    assert error_plot(empty()) == ""
    assert len(error_plot(all_wrong())) < 1_000_000


def test_a_crowded_plot_keeps_every_failure() -> None:
    plot = error_plot(large())
    wrong = next(part for part in plot.split("<path") if 'class="dot wrong"' in part)
    assert re.search(r'd="(M[^"]*)"', wrong)[1].count("M") == 1  # type: ignore[index]


def test_a_value_beside_its_legal_interval() -> None:
    def at(found: float) -> float:
        picture = interval_plot(Element(where=(0,), found=found, expected=1.0, low=0.9, high=1.1, sigma=0.1))
        return float(re.findall(r'<svg x="([\d.]+)%"', picture)[0])

    assert at(5.0) == 92.0
    assert at(-5.0) == 8.0
    assert at(1.0) == 50.0
    for element in (
        Element(where=(0,), found=float("nan"), expected=1.0, low=0.9, high=1.1, sigma=0.1),
        Element(where=(0,), found=1.0, expected=1.0, low=1.0, high=1.0, sigma=0.1),
    ):
        assert interval_plot(element) == ""


def test_strips_have_a_character_per_token() -> None:
    prefill, *_ = routing_strips(failing())
    text = "".join(s.text for s in prefill.strips[0].stretches)
    assert text.replace(" ", "")[11] == "✕"
    assert text.replace(" ", "") == "····~··=···✕····"
    assert text.index(" ") == 10
    assert (prefill.tokens, prefill.illegal, prefill.left_out) == (16, 1, 0)
    second = "".join(s.text for s in prefill.strips[1].stretches).replace(" ", "")
    assert second[:3] == "·≠="


def test_only_so_many_tokens_are_drawn_and_the_layer_with_an_illegal_one_is_among_them() -> None:
    strips = [strip for run in routing_strips(large()) for strip in run.strips]
    drawn = [strip for strip in strips if strip.stretches]
    assert any(strip.illegal for strip in drawn)
    assert sum(len(s.text.replace(" ", "")) for strip in drawn for s in strip.stretches) <= DRAWN
    assert sum(sum(strip.counts.values()) for strip in strips) == 100_016


def test_without_jinja_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match=r"pip install 'refmoe\[html\]'"):
        to_html(conformant())
