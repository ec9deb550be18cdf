# SPDX-License-Identifier: Apache-2.0
"""A drawing as SVG."""

from __future__ import annotations

from xml.etree import ElementTree as xml

from refmoe.routers.pictures.picture import INK, Box, Drawing, Line, Shape


def svg_bytes(drawing: Drawing) -> bytes:
    """The whole file: no style sheet, no script, no font beyond the viewer's own."""
    width, height = _number(drawing.width), _number(drawing.height)
    root = xml.Element(
        "svg", xmlns="http://www.w3.org/2000/svg", width=width, height=height, viewBox=f"0 0 {width} {height}",
        role="img",
    )  # fmt: skip
    root.set("font-family", "sans-serif")
    xml.SubElement(root, "title").text = drawing.title
    for shape in drawing.shapes:
        root.append(_element(shape))
    xml.indent(root, " ")
    return bytes(xml.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _element(shape: Shape) -> xml.Element:
    if isinstance(shape, Box):
        x, y, width, height = map(_number, (shape.x, shape.y, shape.width, shape.height))
        box = xml.Element("rect", x=x, y=y, width=width, height=height, fill=shape.fill)
        if shape.opacity != 1:
            box.set("fill-opacity", _number(shape.opacity))
        if shape.says:
            xml.SubElement(box, "title").text = shape.says
        return box
    if isinstance(shape, Line):
        x1, y1, x2, y2 = map(_number, (shape.x1, shape.y1, shape.x2, shape.y2))
        return xml.Element("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=shape.color)
    text = xml.Element("text", x=_number(shape.x), y=_number(shape.y), fill=INK)
    text.set("font-size", str(shape.size))
    text.set("text-anchor", shape.anchor)
    text.text = shape.text
    return text


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")
