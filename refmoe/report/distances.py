# SPDX-License-Identifier: Apache-2.0
"""The distances of a trace from a reference, on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from refmoe.report.terminal import WIDE, open_console
from refmoe.verifier.distances import Comparison
from refmoe.verifier.findings import as_set


def print_distances(comparison: Comparison, only: str | None = None) -> None:
    """Print the distance of each tap, run by run, then the routing decisions that differ.

    only: the name of a run; the taps of the others are left out.
    """
    console = open_console()
    headings = ["run", "tap", "relative RMS", "worst", "at"]
    if console.width >= WIDE:
        headings += ["found", "expected", "dtype"]
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("run", "tap", "dtype") else "right", no_wrap=True)
    for d in comparison.distances:
        if only in (None, d.run):
            at = ",".join(map(str, d.where))
            cells = [d.run, d.tap, f"{d.relative_rms:.2e}", f"{d.worst:.2e}", at]
            cells += [f"{d.found:.6g}", f"{d.expected:.6g}", d.dtype]
            table.add_row(*cells[: len(headings)])
    console.print(table)
    console.print()
    _print_missing(console, comparison)
    _print_routing(console, comparison)
    console.print("these are distances; for a verdict leave out --distances")


def _print_missing(console: Console, comparison: Comparison) -> None:
    for title, keys in (("not in the trace", comparison.missing), ("not in the reference", comparison.unknown)):
        names = sorted({key.rpartition("/")[2].rpartition("layers.")[2].lstrip("0123456789.") for key in keys})
        if names:
            console.print(f"{title}: {', '.join(names)}")


def _print_routing(console: Console, comparison: Comparison) -> None:
    if not comparison.decisions:
        console.print("routing: not compared, router.experts is not in both")
        return
    console.print(f"routing: {len(comparison.routing)} of {comparison.decisions} decisions differ")
    for r in comparison.routing[:10]:
        where = f"{r.run}, layer {r.layer}, token {r.token}"
        console.print(f"  {where}: found {as_set(r.found)}, expected {as_set(r.expected)}")
    if len(comparison.routing) > 10:
        console.print(f"  and {len(comparison.routing) - 10} more")
