# SPDX-License-Identifier: Apache-2.0
"""Plots of a verification as SVG text: all checks against their limits, and a value against its legal interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from refmoe.report.summary import excess_share, in_order
from refmoe.report.wording import number, visible
from refmoe.verifier.findings import FAIL, Check, Element, Report

COLUMN, TOP, HEIGHT, LEFT, FOOT = 42, 48, 300, 84, 140
AXIS = "multiples of the limit"
GRID = 2
"""The grid, in pixels, that marks are moved to. It is finer than a mark; of marks on one point, one is drawn."""

CROWD = 3000
"""The most checks that a plot shows one by one."""

DECADES = (-6, 6)
"""The powers of ten at the edges of the plot. Values beyond them are drawn at the edge."""


def error_plot(report: Report) -> str:
    """Plot all checks on a log scale: a dot at excess / limit, a cross at error / allowed error where that is above 1.

    An error below 1 is legal and not drawn: every honest engine comes close to 1, since it rounds to nearest.
    Steps go from left to right in order of computation, and so do the layers within a step. Of marks at one point only
    one is drawn, so the size of the plot has a bound.
    """
    steps = in_order(check.step for check in report.checks)
    if not steps:
        return ""
    shown = worst_of_each(report.checks) if crowded(report) else report.checks
    layers = sorted({check.layer for check in report.checks if check.layer is not None})
    low, high = _decades(value for check in shown for value in (_impossible(check), excess_share(check)))
    width = LEFT + COLUMN * len(steps) + 16
    start = dict(zip(steps, range(LEFT, width, COLUMN), strict=False))
    offset = {layer: 18 * (i + 0.5) / len(layers) for i, layer in enumerate(layers)}

    def y(value: float) -> float:
        if math.isinf(value):
            return TOP - 24
        power = math.log10(value) if value > 0 else -math.inf
        if power < low:
            return TOP + HEIGHT + 20
        return TOP + HEIGHT * (high - min(power, high)) / (high - low)

    def spots(*, failed: bool, excess: bool) -> Iterable[tuple[float, float]]:
        for check in shown:
            value = excess_share(check) if excess else _impossible(check)
            if (check.verdict == FAIL) == failed and not math.isnan(value):
                inside = 9 if check.layer is None else offset[check.layer]
                yield start[check.step] + 3 + 20 * (not excess) + inside, y(value)

    marks = [
        _marks("dot", spots(failed=False, excess=True), "h0"),
        _marks("diamond wrong", spots(failed=True, excess=True), "m0-5l5 5-5 5-5-5z"),
        _marks(
            "dot wrong", (*spots(failed=True, excess=False), *spots(failed=False, excess=False)), "m-4-4l8 8m0-8l-8 8"
        ),
    ]
    frame = [_frame(steps, low, high, width), _limit(y(1.0), width)]
    size = f'viewBox="0 0 {width} {TOP + HEIGHT + FOOT}" width="{width}" height="{TOP + HEIGHT + FOOT}"'
    title = "Distance of every check from its limit, by step in order of computation"
    return f'<svg class="plot" role="img" aria-label="{title}" {size}>{"".join(frame + marks)}</svg>'


def _impossible(check: Check) -> float:
    """The error of a check in units of the allowed error where that is above 1; NaN where it is legal."""
    return check.worst_error if check.worst_error > 1 else math.nan


def crowded(report: Report) -> bool:
    """Whether there are too many checks to show: then the plot shows, per tap, only the outstanding ones."""
    return len(report.checks) > CROWD


def worst_of_each(checks: Iterable[Check]) -> list[Check]:
    """Per tap, over all runs: every failed check, and the checks with the largest error and the largest excess."""
    failed = []
    errors: dict[str, tuple[float, Check]] = {}
    excesses: dict[str, tuple[float, Check]] = {}
    for check in checks:
        if check.verdict == FAIL:
            failed.append(check)
            continue
        for kept, value in ((errors, check.worst_error), (excesses, excess_share(check))):
            if not math.isnan(value) and (check.tap not in kept or value > kept[check.tap][0]):
                kept[check.tap] = value, check
    return failed + [check for _, check in (*errors.values(), *excesses.values())]


def _decades(values: Iterable[float]) -> tuple[int, int]:
    powers = [math.log10(value) for value in values if 0 < value < math.inf]
    low, high = min(powers, default=-2.0), max(powers, default=0.0)
    return max(DECADES[0], min(-1, math.floor(low))), min(DECADES[1], max(1, math.ceil(high)))


def _marks(name: str, spots: Iterable[tuple[float, float]], shape: str) -> str:
    kept = sorted({(GRID * round(x / GRID), GRID * round(y / GRID)) for x, y in spots})
    path = "".join(f"M{x} {y}{shape}" for x, y in kept)
    return f'<path class="{name}" d="{path}"/>' if path else ""


def _frame(steps: list[str], low: int, high: int, width: int) -> str:
    bands = [
        f'<rect class="band" x="{LEFT + COLUMN * i}" y="{TOP - 36}" width="{COLUMN}" height="{HEIGHT + 66}"/>'
        for i in range(0, len(steps), 2)
    ]
    lines = []
    for power in range(low, high + 1):
        at = TOP + HEIGHT * (high - power) / (high - low)
        label = f"{10.0**power:g}" if -4 < power < 5 else f"1e{power}"
        lines.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{width - 16}"/>')
        lines.append(f'<text class="tick" x="{LEFT - 10}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    edges = ((TOP - 20, "infinite"), (TOP + HEIGHT + 24, "0"))
    lines += [f'<text class="tick" x="{LEFT - 10}" y="{at}" text-anchor="end">{name}</text>' for at, name in edges]
    foot = TOP + HEIGHT + 44
    labels = []
    for i, step in enumerate(steps):
        x, name = LEFT + COLUMN * (i + 0.5) + 4, visible(step)
        name = name if len(name) <= 20 else name[:19] + "…"
        turn = f'transform="translate({x:g} {foot}) rotate(-55)"'
        labels.append(f'<text class="tick" text-anchor="end" {turn}>{escape(name)}</text>')
    middle = TOP + HEIGHT / 2
    title = f'<text class="tick" text-anchor="middle" transform="translate(16 {middle:g}) rotate(-90)">{AXIS}</text>'
    return "".join([*bands, *lines, *labels, title])


def _limit(at: float, width: int) -> str:
    label = f'<text class="tick" x="{width - 18}" y="{at - 6:.1f}" text-anchor="end">limit</text>'
    return f'<path class="limit" d="M{LEFT} {at:.1f}H{width - 16}"/>{label}'


def interval_plot(element: Element) -> str:
    """Plot the value found beside the legal interval. Empty if either is infinite or NaN."""
    points = (element.low, element.high, element.expected, element.found)
    if not all(map(math.isfinite, points)):
        return ""
    left, right = min(points), max(points)
    span = right - left
    if not 0 < span < math.inf:
        return ""

    def x(value: float) -> float:
        return round(8 + 84 * (value - left) / span, 2)

    low, high, found = x(element.low), x(element.high), x(element.found)
    title = f"Found {number(element.found)}; legal from {number(element.low)} to {number(element.high)}"
    middle = (low + high) / 2
    return (
        f'<svg class="interval" role="img" aria-label="{title}" width="100%" height="84">'
        f'<line class="grid" x1="0" x2="100%" y1="42" y2="42"/>'
        f'<rect class="legal" x="{low}%" y="30" width="{high - low:.2f}%" height="24"/>'
        f'<line class="expected" x1="{x(element.expected)}%" x2="{x(element.expected)}%" y1="26" y2="58"/>'
        f'<svg x="{found}%" y="42" overflow="visible"><path class="dot wrong" d="M-6-6l12 12m0-12l-12 12"/></svg>'
        f'<text class="tick" x="{middle:.2f}%" y="76" text-anchor="middle">legal</text>'
        f'<text class="tick" x="{found}%" y="20" text-anchor="middle">found</text></svg>'
    )
