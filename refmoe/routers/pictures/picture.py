# SPDX-License-Identifier: Apache-2.0
"""A routing as a drawing: tokens by experts, and the load of every expert below."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refmoe.routers.literature.record import Routing
from refmoe.routers.literature.statistics import LoadStatistics

CELL = 18
LEFT = 52
TOP = 84
GAP = 44
"""Between the map and the highest bar: the titles of the bars stand there."""
BARS = 96
KEY_LINE = 20
LETTER = 6
"""The width of a letter of the usual size, at most."""
INK = "#1b1f24"
KEPT = "#1f5fa8"
DROPPED = "#c0392b"
EMPTY = "#eef1f4"


@dataclass(frozen=True)
class Box:
    """A filled rectangle. A viewer shows `says` when the pointer is on it."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    opacity: float = 1.0
    says: str = ""


@dataclass(frozen=True)
class Line:
    """A straight stroke."""

    x1: float
    y1: float
    x2: float
    y2: float
    color: str


@dataclass(frozen=True)
class Label:
    """A line of text; (x, y) is the end, start or middle of its baseline."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    size: int = 11


Shape = Box | Line | Label


@dataclass(frozen=True)
class Drawing:
    """Shapes in the order of painting, y downwards, in units of a pixel."""

    width: float
    height: float
    title: str
    shapes: tuple[Shape, ...]


def matrices(routing: Routing) -> tuple[Any, Any, Any]:
    """Weight, asked and kept per token and expert: float [T, E] and twice booleans [T, E]."""
    ids = np.asarray(routing.ids)
    rows = np.arange(len(ids))[:, None]
    weight = np.zeros((len(ids), routing.experts))
    asked = np.zeros_like(weight, dtype=bool)
    kept = np.zeros_like(asked)
    weight[rows, ids] = np.asarray(routing.weights, np.float64)
    asked[rows, ids] = routing.asked
    kept[rows, ids] = routing.kept
    return weight, asked, kept


def draw(title: str, routing: Routing, statistics: LoadStatistics, facts: str) -> Drawing:
    """A heat map with a row per token and a column per expert, below it a bar per expert, and a key to the colours.

    A cell is darker for more weight and has a cross where the token was dropped. A bar is blue for computed slots and
    red for dropped ones, with a line at the capacity.
    """
    key = _key(routing)
    longest = max(LETTER * len(facts), *(LEFT + LETTER * len(words) for _, words in key))
    width = max(LEFT + CELL * routing.experts + 16, 16 + max(7.5 * len(title), longest))
    start = _base(routing) + 44
    height = start + KEY_LINE * len(key) + 4
    head = (Box(0, 0, width, height, fill="#ffffff"), Label(8, 20, title, size=13), Label(8, 38, facts))
    lines = (shape for i, (marks, words) in enumerate(key) for shape in _key_line(start + KEY_LINE * i, marks, words))
    return Drawing(width, height, title, (*head, *_map(routing), *_bars(routing, statistics), *lines))


def _base(routing: Routing) -> float:
    """The height at which the bars stand."""
    return TOP + CELL * len(routing.ids) + GAP + BARS


Key = list[tuple[tuple[Shape, ...], str]]
"""Lines of a key: marks, drawn from (0, 0), and their meaning."""


def _key(routing: Routing) -> Key:
    """The meaning of the colours and lines that this picture has."""
    _, asked, kept = matrices(routing)
    ramp = tuple(Box(13 * i, 0, 12, 12, fill=KEPT, opacity=shade) for i, shade in enumerate((0.15, 0.575, 1.0)))
    lines: Key = [
        (ramp, "the token goes to this expert: the darker, the larger its weight"),
        ((Box(0, 0, 38, 12, fill=EMPTY),), "the token does not go to this expert"),
    ]
    if (asked & ~kept).any():
        cross = (Line(16, 3, 22, 9, color=DROPPED), Line(16, 9, 22, 3, color=DROPPED))
        dropped = Box(0, 0, 38, 12, fill=DROPPED, opacity=0.15)
        lines.append(((dropped, *cross), "the token asked for this expert and was dropped: it is full"))
    lines.append(((Box(0, 0, 38, 12, fill=KEPT),), "bar: the tokens that the expert computed"))
    if (asked & ~kept).any():
        lines.append(((Box(0, 0, 38, 12, fill=DROPPED, opacity=0.6),), "bar: the tokens that were dropped"))
    if routing.capacity is not None:
        lines.append(((Line(0, 6, 38, 6, color=INK),), "line: the capacity of an expert"))
    return lines


def _key_line(y: float, marks: tuple[Shape, ...], words: str) -> Iterator[Shape]:
    for mark in marks:
        if isinstance(mark, Box):
            yield replace(mark, x=mark.x + 8, y=mark.y + y)
        elif isinstance(mark, Line):
            yield replace(mark, x1=mark.x1 + 8, y1=mark.y1 + y, x2=mark.x2 + 8, y2=mark.y2 + y)
    yield Label(LEFT, y + 10, words)


def _map(routing: Routing) -> Iterator[Shape]:
    weight, asked, kept = matrices(routing)
    top = max(1.0, weight.max(initial=0.0))
    yield Label(LEFT, TOP - 22, "expert")
    yield Label(LEFT - 8, TOP - 6, "token", anchor="end")
    for e in range(routing.experts):
        yield Label(LEFT + CELL * (e + 0.5), TOP - 6, str(e), anchor="middle", size=10)
    for t, row in enumerate(weight):
        y = TOP + CELL * t
        yield Label(LEFT - 8, y + CELL - 5, str(t), anchor="end", size=10)
        yield Box(LEFT, y, CELL * routing.experts - 1, CELL - 1, fill=EMPTY)
        for e in np.flatnonzero(asked[t]).tolist():
            x, says = LEFT + CELL * e, f"token {t}, expert {e}"
            if kept[t, e]:
                shade = 0.15 + 0.85 * row[e] / top
                yield Box(
                    x, y, CELL - 1, CELL - 1, fill=KEPT, opacity=round(shade, 3), says=f"{says}, weight {row[e]:.4g}"
                )
            else:
                yield Box(x, y, CELL - 1, CELL - 1, fill=DROPPED, opacity=0.15, says=f"{says}, dropped")
                yield Line(x + 4, y + 4, x + CELL - 5, y + CELL - 5, color=DROPPED)
                yield Line(x + 4, y + CELL - 5, x + CELL - 5, y + 4, color=DROPPED)


def _bars(routing: Routing, statistics: LoadStatistics) -> Iterator[Shape]:
    base = _base(routing)
    yield Label(LEFT, base - BARS - 16, "load: tokens that asked for each expert")
    most = max(1, *statistics.asked, routing.capacity or 0)
    for e, (asked, kept) in enumerate(zip(statistics.asked, statistics.kept, strict=True)):
        x, high, solid = LEFT + CELL * e, BARS * asked / most, BARS * kept / most
        says = f"expert {e}: asked {asked}, computed {kept}"
        yield Box(x + 2, base - high, CELL - 5, high - solid, fill=DROPPED, opacity=0.6, says=says)
        yield Box(x + 2, base - solid, CELL - 5, solid, fill=KEPT, opacity=1.0, says=says)
        yield Label(x + CELL / 2, base + 14, str(e), anchor="middle", size=10)
        yield Label(x + CELL / 2, base - high - 3, str(asked), anchor="middle", size=9)
    yield Line(LEFT, base, LEFT + CELL * routing.experts, base, color=INK)
    yield Label(LEFT - 8, base + 14, "expert", anchor="end")
    if routing.capacity is not None:
        y = base - BARS * routing.capacity / most
        yield Line(LEFT, y, LEFT + CELL * routing.experts, y, color=INK)
        yield Label(LEFT - 8, y + 4, f"C={routing.capacity}", anchor="end", size=10)
