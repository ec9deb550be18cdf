# SPDX-License-Identifier: Apache-2.0
"""``refmoe policies``: the numeric policies, and the fields in which they differ."""

from __future__ import annotations

from collections.abc import Sequence

import click

from refmoe.cli.guard import GuardedCommand
from refmoe.cli.options import json_option
from refmoe.cli.table import console, print_table
from refmoe.errors import InputError
from refmoe.profiles.cut_points import CUT_POINTS
from refmoe.profiles.load import BUDGETS, GROUPS, Difference, differences, policies, policy
from refmoe.profiles.policy import FIELDS, Policy
from refmoe.report.json_text import json_text


@click.command(
    "policies", cls=GuardedCommand, short_help="List the numeric policies, or print where some of them differ."
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--cut-points", is_flag=True, help="Explain every cut point and field, and the taps that show it.")
@json_option
def policies_command(names: tuple[str, ...], cut_points: bool, as_json: bool) -> None:
    """List the numeric policies; of one, print every field; of several, those in which they differ.

    \b
    refmoe policies
    refmoe policies --cut-points
    refmoe policies hf-bfloat16
    refmoe policies hf-bfloat16 mistral-bfloat16 my-engine.toml
    refmoe policies hf-float32 hf-float32+cache=float16

    A policy says which dtype an engine may round to at each cut point. NAME is one of those listed, or a .toml file
    with one table like those of refmoe/profiles/profiles.toml; either may be followed by changes.
    """
    if cut_points and names:
        raise InputError(f"--cut-points explains the cut points of every policy, but {names[0]} was given too")
    if cut_points:
        explain(as_json)
        return
    chosen = [policy(name) for name in names]
    if as_json:
        click.echo(json_text(as_data(chosen)))
        return
    if not chosen:
        print_table(("policy", "whose arithmetic"), [(each.name, each.about) for each in policies()], wrap=True)
        return
    rows = differences(chosen)
    if len(chosen) == 1:
        print_one(chosen[0])
        cells = [(row.field, row.values[0], ", ".join(shown_by(row.field)), about(row.field)) for row in rows]
        print_table(("field or cut point", "", "first shown by", "what it is"), cells, optional=(2, 3), wrap=True)
        return
    if not rows:
        click.echo("no difference")
        return
    print_table(("", *(each.name for each in chosen)), [(row.field, *row.values) for row in rows], wrap=True)


def about(field: str) -> str:
    """A cut point or field in words."""
    return CUT_POINTS[field].about if field in CUT_POINTS else FIELDS[field]


def shown_by(field: str) -> tuple[str, ...]:
    """The first taps that a rounding at a cut point can change. Empty for a field."""
    return CUT_POINTS[field].shown_by if field in CUT_POINTS else ()


def explain(as_json: bool) -> None:
    """Print every field, group and cut point with its meaning, its default and the taps that show it."""
    rows = [(name, "", "", words) for name, words in FIELDS.items()]
    rows += [(name, "", "", "all of " + ", ".join(parts)) for name, parts in GROUPS.items()]
    rows += [(name, cut.default, ", ".join(cut.shown_by), cut.about) for name, cut in CUT_POINTS.items()]
    if as_json:
        keys = ("name", "default", "shown_by", "about")
        click.echo(json_text({"cut_points": [dict(zip(keys, row, strict=True)) for row in rows]}))
        return
    print_table(("field or cut point", "default", "first shown by", "what it is"), rows, optional=(1, 2), wrap=True)


def print_one(chosen: Policy) -> None:
    """Print the parts of a policy that its table of fields lacks: the engine, and the sources."""
    place = console()
    place.print(f"{chosen.name}: {chosen.about}", style="bold", markup=False)
    place.print(f"source: {chosen.source}", markup=False)
    for name in BUDGETS:
        place.print(f"{name}: {getattr(chosen, name).source}", markup=False)
    for each in chosen.codes:
        place.print(f"{each.name}: {each.about}. {each.source}", markup=False)
    place.print()


def as_data(chosen: Sequence[Policy]) -> dict[str, object]:
    """The output of the command as JSON."""
    if not chosen:
        return {"policies": [{"name": each.name, "about": each.about} for each in policies()]}
    rows: tuple[Difference, ...] = differences(chosen)
    table: dict[str, object] = {row.field: dict(zip((p.name for p in chosen), row.values, strict=True)) for row in rows}
    if len(chosen) > 1:
        return {"policies": [each.name for each in chosen], "differences": table}
    sources = {name: getattr(chosen[0], name).source for name in BUDGETS}
    sources |= {each.name: each.source for each in chosen[0].codes}
    return {
        "name": chosen[0].name, "about": chosen[0].about, "source": chosen[0].source, "sources": sources,
        "fields": {row.field: row.values[0] for row in rows},
        "meanings": {row.field: about(row.field) for row in rows},
        "shown_by": {row.field: list(shown_by(row.field)) for row in rows if shown_by(row.field)},
    }  # fmt: skip
