# SPDX-License-Identifier: Apache-2.0
"""A routing in the terminal: the heat map and the load bars in characters, legible without colour."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from refmoe.routers.literature.record import Routing
from refmoe.routers.literature.statistics import LoadStatistics
from refmoe.routers.pictures.picture import matrices

SHADES = "░▒▓█"
NARROW = 24
"""With more experts than this, a column is one character wide."""
ROWS = 64
"""The most tokens that are shown."""
BAR = 40
"""The longest load bar."""


def print_routing(console: Console, routing: Routing, statistics: LoadStatistics) -> None:
    """Print the picture: darker for more weight, x for a dropped token, a dot where a token does not go."""
    wide = routing.experts <= NARROW
    weight, asked, kept = matrices(routing)
    top = max(1.0, weight.max(initial=0.0))
    console.print(Text("       expert"))
    heading = "".join(f"{e:>3}" if wide else str(e % 10) for e in range(routing.experts))
    console.print(Text(f"token  {heading}"))
    for t in range(min(len(weight), ROWS)):
        line = Text(f"{t:>5}  ")
        for e in range(routing.experts):
            if kept[t, e]:
                # one shade per quarter of the weight; a weight of 1, or above by rounding, has the last shade
                shade = SHADES[min(3, int(4 * weight[t, e] / top))]
                line.append(f" {shade * 2}" if wide else shade, "blue")
            elif asked[t, e]:
                line.append("  x" if wide else "x", "bold red")
            else:
                line.append("  ·" if wide else "·", "dim")
        console.print(line)
    if len(weight) > ROWS:
        console.print(Text(f"  and {len(weight) - ROWS} more"))
    dropped = ", x dropped" if (asked & ~kept).any() else ""
    console.print(Text(f"{SHADES} weight of the expert, small to large{dropped}, · not chosen", "dim"))
    console.print()
    _print_bars(console, routing, statistics)


def _print_bars(console: Console, routing: Routing, statistics: LoadStatistics) -> None:
    most = max(1, *statistics.asked, routing.capacity or 0)
    unit = 1 if most <= BAR else BAR / most
    console.print(Text("expert  load: tokens that asked for the expert"))
    for e, (asked, kept) in enumerate(zip(statistics.asked, statistics.kept, strict=True)):
        line = Text(f"{e:>6}  ")
        line.append("█" * round(kept * unit), "blue")
        line.append("x" * (round(asked * unit) - round(kept * unit)), "bold red")
        free = 0 if routing.capacity is None else round(routing.capacity * unit) - round(asked * unit)
        line.append("·" * free, "dim")
        line.append(f"  {asked}" if asked == kept else f"  {asked}, {asked - kept} dropped")
        console.print(line)
    parts = ["█ computed"] + ["x dropped"] * any(a != k for a, k in zip(statistics.asked, statistics.kept, strict=True))
    parts += ["· free up to the capacity"] * (routing.capacity is not None)
    scale = f"; a mark is {most / BAR:.3g} tokens" if most > BAR else ""
    console.print(Text(f"{', '.join(parts)}{scale}", "dim"))
