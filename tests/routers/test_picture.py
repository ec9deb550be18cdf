# SPDX-License-Identifier: Apache-2.0
"""``refmoe router show``: the picture in the terminal, as SVG and PNG, and one sentence for every mistake."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.cli import main
from refmoe.routers.literature.capacity import admit
from refmoe.routers.literature.record import Routing
from refmoe.routers.literature.statistics import load_statistics
from refmoe.routers.pictures.picture import CELL, DROPPED, EMPTY, KEPT, LEFT, TOP, Box, Label, draw
from refmoe.routers.pictures.png import png_bytes
from refmoe.routers.pictures.svg import svg_bytes
from refmoe.routers.pictures.terminal import print_routing
from refmoe.traces.trace import Header, Run, write_trace

OPS: Any = ExactOps()
SVG = "{http://www.w3.org/2000/svg}"
Refmoe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refmoe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refmoe:
    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refmoe", "router", "show", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def example() -> Routing:
    """Three tokens, three experts, room for one: token 0 goes to 2, token 1 is dropped there, token 2 to 0 and 1."""
    ids = np.array([[2, 0], [2, 1], [0, 1]])
    asked = np.array([[True, False], [True, False], [True, True]])
    return admit(OPS, ids, np.array([[1.0, 0.5], [0.75, 0.25], [0.5, 0.25]]), 3, 1, asked)


def test_the_terminal_shows_every_cell_and_bar() -> None:
    stream = io.StringIO()
    print_routing(Console(file=stream, width=80, color_system=None), example(), load_statistics(OPS, example()))
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == [
        "       expert",
        "token    0  1  2",
        "    0    ·  · ██",
        "    1    ·  ·  x",
        "    2   ▓▓ ▒▒  ·",
        "░▒▓█ weight of the expert, small to large, x dropped, · not chosen",
        "",
        "expert  load: tokens that asked for the expert",
        "     0  █  1",
        "     1  █  1",
        "     2  █x  2, 1 dropped",
        "█ computed, x dropped, · free up to the capacity",
    ]


def test_a_key_explains_only_the_marks_that_are_there() -> None:
    routing = admit(OPS, np.array([[0], [1]]), np.ones((2, 1)), 2)
    stream = io.StringIO()
    print_routing(Console(file=stream, width=80, color_system=None), routing, load_statistics(OPS, routing))
    assert "drop" not in stream.getvalue()
    shapes = draw("t", routing, load_statistics(OPS, routing), "f").shapes
    assert not [shape for shape in shapes if isinstance(shape, Box) and shape.fill == DROPPED and shape.height]


def test_the_axes_and_all_colours_are_named() -> None:
    """Each axis has a title, and below the bars each colour of the picture is shown with words beside it."""
    routing = example()
    shapes = draw("t", routing, load_statistics(OPS, routing), "f").shapes
    labels = [shape for shape in shapes if isinstance(shape, Label)]
    assert [label.text for label in labels].count("expert") == 2
    assert "token" in [label.text for label in labels]
    foot = max(label.y for label in labels if label.text == "expert")
    words = [label for label in labels if label.y > foot]
    marks = [shape for shape in shapes if isinstance(shape, Box) and shape.y > foot]
    assert {box.fill for box in marks} == {KEPT, DROPPED, EMPTY}
    for box in marks:
        assert [label for label in words if label.x >= box.x + box.width and 0 <= label.y - box.y <= box.height]


def test_many_experts_get_narrow_columns_and_many_tokens_are_cut_off() -> None:
    stream = io.StringIO()
    ids = np.arange(70)[:, None] % 30
    routing = admit(OPS, ids, np.ones((70, 1)), 30)
    print_routing(Console(file=stream, width=80, color_system=None), routing, load_statistics(OPS, routing))
    lines = stream.getvalue().splitlines()
    assert lines[1] == "token  " + "0123456789" * 3
    assert lines[6] == "    4  " + "·" * 4 + "█" + "·" * 25
    assert lines[66] == "  and 6 more"


def boxes(root: Any, fill: str) -> list[tuple[float, float, str | None]]:
    """Column, row and words of the boxes of a colour inside the map."""
    found = []
    for box in root.iter(f"{SVG}rect"):
        column, row = (float(box.get("x")) - LEFT) / CELL, (float(box.get("y")) - TOP) / CELL
        if box.get("fill") == fill and row < 3:
            title = box.find(f"{SVG}title")
            found.append((column, row, None if title is None else title.text))
    return found


def test_the_svg_has_a_box_per_kept_and_per_dropped_slot() -> None:
    routing = example()
    content = svg_bytes(draw("a <title> & more", routing, load_statistics(OPS, routing), "facts"))
    root = xml.fromstring(content)
    assert root.findtext(f"{SVG}title") == "a <title> & more"
    assert boxes(root, KEPT) == [
        (2, 0, "token 0, expert 2, weight 1"),
        (0, 2, "token 2, expert 0, weight 0.5"),
        (1, 2, "token 2, expert 1, weight 0.25"),
    ]
    assert boxes(root, DROPPED) == [(2, 1, "token 1, expert 2, dropped")]
    assert len(boxes(root, EMPTY)) == 3
    says = [title.text for title in root.iter(f"{SVG}title")]
    assert "expert 2: asked 2, computed 1" in says
    opacities = [float(box.get("fill-opacity", "1")) for box in root.iter(f"{SVG}rect") if box.get("fill") == KEPT]
    assert opacities[:3] == [1.0, 0.575, 0.362]
    assert svg_bytes(draw("a <title> & more", routing, load_statistics(OPS, routing), "facts")) == content


def test_nothing_is_drawn_outside_the_canvas() -> None:
    routing = example()
    drawing = draw("t", routing, load_statistics(OPS, routing), "f")
    root = xml.fromstring(svg_bytes(drawing))
    for box in root.iter(f"{SVG}rect"):
        assert float(box.get("x", 0)) >= 0
        assert float(box.get("x", 0)) + float(box.get("width", 0)) <= drawing.width
        assert float(box.get("y", 0)) >= 0
        assert float(box.get("height", -1)) >= 0
        assert float(box.get("y", 0)) + float(box.get("height", 0)) <= drawing.height
    for label in (shape for shape in drawing.shapes if isinstance(shape, Label)):
        wide = {"start": 1.0, "middle": 0.5, "end": 0.0}[label.anchor] * 0.55 * label.size * len(label.text)
        assert label.x + wide <= drawing.width
        assert label.size <= label.y <= drawing.height


def test_the_png_has_the_colours_where_the_svg_has_them() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib not installed: pip install -e '.[plots]'")
    from matplotlib.image import imread

    routing = example()
    drawing = draw("title", routing, load_statistics(OPS, routing), "facts")
    content = png_bytes(drawing)
    assert content.startswith(b"\x89PNG")
    pixels = imread(io.BytesIO(content), format="png")
    assert pixels.shape[:2] == (int(drawing.height) * 2, int(drawing.width) * 2)

    def colour(column: int, row: int) -> list[int]:
        y, x = TOP + CELL * (row + 0.25), LEFT + CELL * (column + 0.5)
        return [round(255 * float(value)) for value in pixels[int(2 * y), int(2 * x), :3]]

    assert colour(2, 0) == [int(KEPT[i : i + 2], 16) for i in (1, 3, 5)]
    assert colour(0, 0) == [int(EMPTY[i : i + 2], 16) for i in (1, 3, 5)]
    kept, dropped = colour(1, 2), colour(2, 1)
    assert kept[2] > kept[0]
    assert dropped[0] > dropped[2]


def test_a_png_without_matplotlib_names_the_extra(
    refmoe: Refmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = refmoe("--out", tmp_path / "a.png")
    assert status == 2
    assert "a PNG picture needs the package 'matplotlib" in err
    assert "pip install 'refmoe[plots]'" in err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_out_writes_a_whole_picture(refmoe: Refmoe, tmp_path: Path, suffix: str) -> None:
    if suffix == "png":
        pytest.importorskip("matplotlib", reason="matplotlib not installed: pip install -e '.[plots]'")
    path = tmp_path / f"routing.{suffix}"
    status, out, _ = refmoe("--router", "st-moe", "--out", path)
    assert status == 0
    assert f"written: {path}" in out
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes().startswith(b"<?xml" if suffix == "svg" else b"\x89PNG")


def test_json_is_the_whole_routing(refmoe: Refmoe) -> None:
    status, out, _ = refmoe("--router", "switch", "--tokens", 10, "--experts", 4, "--capacity-factor", 1, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["capacity"] == 3
    assert np.array(found["ids"]).shape == np.array(found["kept"]).shape == (10, 1)
    assert sum(found["load"]["asked"]) == 10
    assert sum(found["load"]["kept"]) == np.sum(found["kept"]) <= 10
    assert max(found["load"]["kept"]) <= 3
    shares = [count / 10 for count in found["load"]["asked"] if count]
    assert found["load"]["entropy"] == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert found["load"]["variation"] == pytest.approx(np.std(found["load"]["asked"]) / 2.5)
    assert found["load"]["drop_rate"] == pytest.approx(1 - np.mean(found["kept"]))
    assert found["load"]["uncomputed"] == 10 - np.sum(found["kept"])
    assert found["losses"]["load balancing"] > 0
    assert refmoe("--router", "switch", "--seed", 5)[1] != refmoe("--router", "switch", "--seed", 6)[1]


def test_logits_of_a_file_and_of_a_trace(refmoe: Refmoe, tmp_path: Path) -> None:
    """Equal logits as .npy in float32, and as a bfloat16 tap of the second layer of the second run."""
    table = np.array([[1.0, 0.0, 2.0], [3.0, 0.5, 0.0]], np.float32)
    np.save(tmp_path / "logits.npy", table)
    runs = (
        Run(run="prefill", op="prefill", sequence=0, tokens=(1, 2), positions=(0, 1), past=0),
        Run(run="chunk1", op="chunk", sequence=0, tokens=(3, 4), positions=(2, 3), past=2),
    )
    key = "chunk1/layers.1.router.logits"
    write_trace(tmp_path / "trace.safetensors", Header(runs), {key: table.astype(ml_dtypes.bfloat16)})
    from_npy = refmoe("--logits", tmp_path / "logits.npy", "--json")
    from_trace = refmoe("--logits", tmp_path / "trace.safetensors", "--run", "chunk1", "--layer", 1, "--json")
    assert from_npy[0] == 0
    assert json.loads(from_npy[1])["ids"] == [[2, 0], [0, 1]]
    assert from_trace[1] == from_npy[1]
    status, _, err = refmoe("--logits", tmp_path / "trace.safetensors")
    assert (status, err.count("\n")) == (2, 1)
    assert "the trace has no 'prefill/layers.0.router.logits'" in err
    assert "there is no run 'x'" in refmoe("--logits", tmp_path / "trace.safetensors", "--run", "x")[2]


def save(path: Path, array: Any, **options: Any) -> None:
    np.save(path, array, **options)


NOT_NUMBERS = "cannot be read as a .npy file of numbers"
HUGE = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 1000000000), }".ljust(117) + b"\n"
BAD_FILES = {
    "one dimension": (lambda p: save(p, np.zeros(3)), "shape [3], but tokens by experts"),
    "no tokens": (lambda p: save(p, np.zeros((0, 3))), "shape [0, 3]"),
    "text": (lambda p: save(p, np.array([["a", "b"]])), "but real numbers were expected"),
    "complex": (lambda p: save(p, np.ones((2, 2), complex)), "complex128, but real numbers"),
    "not a number": (lambda p: save(p, np.array([[0.0, 1.0], [np.nan, 0.0]])), "token 1 for expert 0 is nan"),
    "infinite": (lambda p: save(p, np.array([[0.0, np.inf]])), "token 0 for expert 1 is inf"),
    "pickled": (lambda p: save(p, np.array([[1, None]], dtype=object), allow_pickle=True), NOT_NUMBERS),
    "cut off": (lambda p: (save(p, np.zeros((9, 9))), p.write_bytes(p.read_bytes()[:200])), NOT_NUMBERS),
    "a header alone": (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00"), NOT_NUMBERS),
    "a huge claim": (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\x76\x00" + HUGE), NOT_NUMBERS),
    "too many": (lambda p: save(p, np.zeros((1025, 1024), np.float16)), "at most 1048576"),
    "a zip": (lambda p: p.write_bytes(b"PK\x03\x04 nothing"), "logits.npy: "),
    "empty": (lambda p: p.write_bytes(b""), "logits.npy: "),
    "absent": (lambda p: None, "no such file"),
    "a folder": (lambda p: p.mkdir(), "is a folder"),
}  # fmt: skip


@pytest.mark.parametrize("fault", [*BAD_FILES])
def test_a_bad_file_is_one_sentence(refmoe: Refmoe, tmp_path: Path, fault: str) -> None:
    """Status 2, one line that names the file, and no picture."""
    make, expected = BAD_FILES[fault]
    make(tmp_path / "logits.npy")
    picture = tmp_path / "picture.svg"
    picture.write_text("old")
    status, out, err = refmoe("--logits", tmp_path / "logits.npy", "--out", picture)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("refmoe: ")
    assert expected in err
    assert "Traceback" not in err
    assert picture.read_text() == "old"
    assert not [*tmp_path.glob(".*")]


MISTAKES = {
    "another k": (("--router", "switch", "--top-k", 2), "--top-k 2 does not apply: switch is top-1"),
    "k of expert choice": (("--router", "expert-choice", "--top-k", 2), "expert-choice lets the experts choose"),
    "too many choices": (("--top-k", 9), "mixtral chooses 9 experts per token, but there are 8"),
    "two of one": (("--router", "glam", "--experts", 1), "glam chooses 2 experts per token, but there are 1"),
    "no capacity": (("--capacity-factor", 2), "--capacity-factor does not apply: mixtral drops no token"),
    "negative": (("--router", "switch", "--capacity-factor", -1), "is -1.0, but a positive number"),
    "nothing": (("--router", "switch", "--capacity-factor", 0), "is 0.0, but a positive number"),
    "no groups": (("--groups", 2), "mixtral has no groups"),
    "uneven groups": (("--router", "deepseek-v3", "--groups", 3), "--groups 3 does not divide the 8 experts"),
    "more groups": (("--router", "deepseek-v3", "--groups", 2, "--top-groups", 3), "--top-groups 3 exceeds --groups 2"),
    "few experts": (("--router", "deepseek-v3", "--groups", 8, "--top-k", 2), "exceeds the 1 experts of 1 of 8 groups"),
    "another picture": (("--out", "a.jpg"), "a name that ends in .svg or .png"),
    "no folder": (("--out", "/nowhere/a.svg"), "/nowhere/a.svg: cannot be written"),
    "a layer of nothing": (("--layer", 1), "--logits TRACE was expected"),
    "too large": (("--tokens", 10**7), "exceed the 1048576 logits"),
    "too long": (("--tokens", 900, "--out", "/tmp/a.png"), "pixels long, but a PNG may be 30000: write a .svg"),
    "given twice": (("--logits", "a.npy", "--tokens", 3), "cannot be given with it"),
}


@pytest.mark.parametrize("mistake", [*MISTAKES])
def test_a_mistake_is_one_sentence(refmoe: Refmoe, mistake: str) -> None:
    arguments, expected = MISTAKES[mistake]
    status, out, err = refmoe(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("refmoe: ")
    assert expected in err


def test_a_run_or_layer_of_an_npy_file_is_refused(refmoe: Refmoe, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    assert "but this is a .npy file" in refmoe("--logits", tmp_path / "a.npy", "--layer", 0)[2]


def test_the_heavy_imports_wait_until_a_png_is_asked_for() -> None:
    """Matplotlib takes longer to import than everything else."""
    script = "import sys, refmoe.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
