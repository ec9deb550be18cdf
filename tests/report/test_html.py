"""The HTML page as text: one small file that needs nothing else, and in which no name acts as code."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import pytest

from refmoe.errors import InputError
from refmoe.report.error_plot import error_plot, interval_plot
from refmoe.report.heat_map import LEVELS, heat_map, level
from refmoe.report.html import LISTED, to_html
from refmoe.report.routing_strips import DRAWN, routing_strips
from refmoe.verifier.findings import FAIL, PASS, UNDECIDABLE, Element
from tests.report.sample_pages import all_pages
from tests.report.sample_reports import HOSTILE, SAMPLES, all_wrong, conformant, empty, failing, large

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


@pytest.mark.parametrize("name", SAMPLES)
def test_a_page_is_one_well_formed_document_without_anything_from_outside(pages: dict[str, str], name: str) -> None:
    outline = Outline(pages[name])
    assert outline.stack == []
    for tag, attributes in outline.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "href", "style", "srcset", "action"} & set(attributes), (tag, attributes)
        assert not [key for key in attributes if key.startswith("on")]
    # where a bug was met is text, not a link: the page asks nobody for anything
    without_sources = re.sub(r"<li>met in: https?://[^<]*</li>", "", pages[name])
    assert not re.search(r"url\(|@import|https?://", without_sources)
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
    outline = Outline(pages["all_wrong"])
    assert len(outline.tags) < 30_000


def test_the_page_says_what_the_report_says(pages: dict[str, str]) -> None:
    texts = " ".join(" ".join(Outline(pages["failing"]).texts).split())
    for words in (
        "Not conformant", failing().headline, "Impossible under the policy: 3 of 128 values",
        "Improbable at significance 1e-06: the worst value", "everything before it passes (13 checks)",
        "token 11, head 3, cached position 5", "no value has a finite bound", *failing().missing, *failing().unknown,
        *failing().notes,
    ):  # fmt: skip
        assert words in texts, words
    assert "No step was checked." in pages["empty"]
    assert "No decision could be judged." in pages["empty"]
    assert "Improbable" not in pages["conformant"]
    assert "Impossible" not in pages["conformant"]


def test_a_cell_s_colour_and_symbol_follow_verdict_and_size() -> None:
    assert [level(PASS, x) for x in (0.0, 0.03, 0.05, 0.3, 1.0)] == list("aabcd")
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
    assert "fails in 1 of 3 runs" in wrong.detail
    assert "here is the first wrong step" in wrong.detail
    assert [cell.first for row in result.rows for cell in row.cells if cell].count(True) == 1
    unsure = rows["residual"].cells[1]
    assert unsure is not None
    assert (unsure.level, unsure.number) == ("open", "")
    data = json.loads(result.data)
    index = data["taps"].index("layers.0.router.logits")
    assert [states[index] for states in data["states"]] == ["g", "d", "d"]
    error, excess, limit, _, reason, amount = data["numbers"][0][index].split()
    assert (error, excess, limit, amount) == ("214", "1003", "12.1", "214")
    assert data["texts"][int(reason)].startswith("impossible under the policy: 3 of 128")
    assert len(data["taps"]) == sum(cell is not None for row in result.rows for cell in row.cells)


def test_every_check_has_its_dots_and_those_beyond_the_scale_their_edge() -> None:
    plot = error_plot(failing())
    assert plot.count('class="dot"') == plot.count('class="dot wrong"') == 1
    wrong = next(part for part in plot.split("<path") if 'class="dot wrong"' in part)
    assert wrong.count("M") == 3
    edges = error_plot(SAMPLES["not_finite"]())
    assert "nan" not in edges.lower()
    assert "inf" not in edges.lower().replace(">infinite<", "")
    assert error_plot(empty()) == ""
    assert len(error_plot(all_wrong())) < 1_000_000


def test_a_crowded_plot_keeps_every_failure() -> None:
    plot = error_plot(large())
    wrong = next(part for part in plot.split("<path") if 'class="dot wrong"' in part)
    assert wrong.count("M") == 1


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
