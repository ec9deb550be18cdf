# SPDX-License-Identifier: Apache-2.0
"""A drawing as PNG, by matplotlib."""

from __future__ import annotations

import io

from refmoe.errors import InputError, require
from refmoe.routers.pictures.picture import INK, Box, Drawing, Line

SCALE = 2
"""Pixels per unit of the drawing."""
DPI = 100
LONGEST = 30000
"""The most pixels of a side."""
ALIGN = {"start": "left", "middle": "center", "end": "right"}


def png_bytes(drawing: Drawing) -> bytes:
    """The whole file. Raises InputError when matplotlib is not installed, or the picture is too long for it."""
    longest = round(SCALE * max(drawing.width, drawing.height))
    if longest > LONGEST:
        raise InputError(f"the picture would be {longest} pixels long, but a PNG may be {LONGEST}: write a .svg")
    figures = require("matplotlib.figure", "plots", "a PNG picture")
    patches = require("matplotlib.patches", "plots", "a PNG picture")
    lines = require("matplotlib.lines", "plots", "a PNG picture")
    figure = figures.Figure(figsize=(drawing.width * SCALE / DPI, drawing.height * SCALE / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    points = SCALE * 72 / DPI
    for shape in drawing.shapes:
        if isinstance(shape, Box):
            corner = (shape.x, shape.y)
            box = patches.Rectangle(corner, shape.width, shape.height, color=shape.fill, alpha=shape.opacity, lw=0)
            axes.add_patch(box)
        elif isinstance(shape, Line):
            ends = (shape.x1, shape.x2), (shape.y1, shape.y2)
            axes.add_line(lines.Line2D(*ends, color=shape.color, lw=points))
        else:
            axes.text(shape.x, shape.y, shape.text, ha=ALIGN[shape.anchor], size=shape.size * points, color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
