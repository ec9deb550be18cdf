# SPDX-License-Identifier: Apache-2.0
"""``refmoe router``: show what a router does with tokens, and check any router by the laws of routing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refmoe.api.contract_process import Asked
from refmoe.api.routing import (
    EXPERTS,
    ROUTERS,
    TOKENS,
    Logits,
    Settings,
    check_router_apart,
    picture_writer,
    print_routing,
    route,
)
from refmoe.cli.contract import check_options, show_checked
from refmoe.cli.guard import OUTPUT, GuardedCommand
from refmoe.cli.options import PATH, Decimal, Integer, json_option, progress_bar, record_of
from refmoe.cli.sections import Sections
from refmoe.cli.table import console
from refmoe.report.json_text import json_text

if TYPE_CHECKING:
    pass

COUNT = Integer(min=1)
BEHAVIOURS = click.Choice(["raise", "propagate", "unspecified"])
DTYPES = click.Choice(["float64", "float32", "float16", "bfloat16"])
Names = tuple[str, ...]


@click.group("router", cls=Sections, short_help="Show what a router does; check one of your own.")
def router_command() -> None:
    """Routers: those of the literature, and your own.

    \b
    refmoe router show --router switch
    refmoe router check my_router.py:route --experts 8 --top-k 2
    """


@click.command(
    "show", cls=GuardedCommand, short_help="Show what a router does with tokens: a picture, loads and drops."
)
@click.option(
    "--router", "name", type=click.Choice(ROUTERS), default="mixtral", show_default=True,
    help="The router of the literature.",
)  # fmt: skip
@click.option("--tokens", type=COUNT, metavar="T", help=f"Rows of made-up, normally distributed logits; {TOKENS}.")
@click.option("--experts", type=COUNT, metavar="E", help=f"Columns of made-up logits; {EXPERTS}.")
@click.option("--top-k", "k", type=COUNT, metavar="K", help="Experts per token; the router's own number if not given.")
@click.option(
    "--capacity-factor", type=Decimal(), metavar="C", help="1 is T / E tokens; the router's own if not given."
)
@click.option("--groups", type=COUNT, default=1, show_default=True, help="Groups of experts (deepseek-v3).")
@click.option("--top-groups", type=COUNT, default=1, show_default=True, help="Groups a token may use (deepseek-v3).")
@click.option("--seed", type=Integer(min=0), default=0, show_default=True, help="Seed of logits and noise.")
@click.option("--logits", "file", type=PATH, metavar="FILE", help="Real logits: [T, E] in a .npy file, or a trace.")
@click.option("--run", metavar="NAME", help="The run of the trace; its first if not given.")
@click.option("--layer", type=Integer(min=0), help="The layer of the trace; 0 if not given.")
@click.option("--out", type=OUTPUT, metavar="FILE", help="Also write the picture: .svg, or .png (extra 'plots').")
@json_option
def show_command(name: str, seed: int, out: Path | None, as_json: bool, **options: Any) -> None:
    """Route tokens with a router of the literature and show which experts they go to, and with what load.

    \b
    refmoe router show --router switch --tokens 16 --experts 8 --capacity-factor 1
    refmoe router show --router deepseek-v3 --experts 16 --top-k 4 --groups 4 --top-groups 2 --out routing.svg
    refmoe router show --router mixtral --logits trace.safetensors --layer 3 --json
    """
    if out is not None:
        picture_writer(out)
    logits = record_of(Logits, options).load(seed)
    routed = route(name, logits, Settings(seed=seed, **options))
    if out is not None:
        routed.draw(out)
    if as_json:
        click.echo(json_text(routed.to_dict()))
        return
    place = console()
    place.print(routed.title, markup=False)
    place.print()
    print_routing(place, routed.routing, routed.statistics)
    place.print()
    place.print(routed.load, markup=False)
    for what, loss in routed.losses.items():
        place.print(f"{what} loss {float(loss):.6g}", markup=False)
    if out is not None:
        place.print(f"written: {out}", markup=False)


@click.command("check", cls=GuardedCommand, short_help="Check a router of your own by the laws of routing.")
@click.argument("router", metavar="MODULE:FUNCTION")
@click.option("--experts", type=Integer(), required=True, help="The number of experts.")
@click.option("--top-k", type=Integer(), required=True, help="The number of experts of a token.")
@click.option("--factory", is_flag=True, help="FUNCTION(experts, top_k) returns the router; k = E is tried as well.")
@click.option(
    "--scoring", type=click.Choice(["softmax", "sigmoid", "other"]), default="softmax", show_default=True,
    help="The function from logit to weight.",
)  # fmt: skip
@click.option(
    "--normalised/--no-normalised", default=True, show_default=True,
    help="Whether the chosen weights sum to the scale, or keep their shares of all experts.",
)  # fmt: skip
@click.option("--scale", type=Decimal(), default=1.0, show_default=True, help="The factor of all weights.")
@click.option("--epsilon", type=Decimal(), default=0.0, show_default=True, help="Added to the sum that normalises.")
@click.option(
    "--selection", type=click.Choice(["logits", "scores"]), default="scores", show_default=True,
    help="The numbers that the selection compares.",
)  # fmt: skip
@click.option(
    "--ties", type=click.Choice(["lower", "higher", "unspecified"]), default="unspecified", show_default=True,
    help="The expert that is chosen of those with equal logits.",
)  # fmt: skip
@click.option(
    "--descending/--no-descending", default=True, show_default=True,
    help="Whether the ids of a token are in order of falling logit.",
)  # fmt: skip
@click.option("--nan", type=BEHAVIOURS, default="unspecified", show_default=True, help="A token with a NaN.")
@click.option("--infinity", type=BEHAVIOURS, default="unspecified", show_default=True, help="A token with a +Inf.")
@click.option("--all-masked", type=BEHAVIOURS, default="unspecified", show_default=True, help="A token of only -Inf.")
@click.option("--dtype", type=DTYPES, default="float32", show_default=True, help="The dtype of the logits.")
@click.option("--arithmetic", type=DTYPES, help="The dtype it computes in, if not --dtype.")
@click.option("--weights-dtype", type=DTYPES, help="The dtype it rounds weights to, if not --arithmetic.")
@click.option(
    "--framework", type=click.Choice(["numpy", "torch", "jax", "cupy"]), default="numpy", show_default=True,
    help="The library of the arrays that it takes.",
)  # fmt: skip
@click.option("--capacity", type=Integer(), help="Tokens that an expert takes of a batch.")
@click.option(
    "--priority", type=click.Choice(["token", "choice", "weight"]), default="token", show_default=True,
    help="The order in which choices fill the capacity.",
)  # fmt: skip
@check_options(200)
@json_option
@click.pass_context
def check_command(
    context: click.Context, /, router: str, factory: bool, examples: int, laws: Names, timeout: float, as_json: bool,
    **claims: Any,
) -> None:  # fmt: skip
    """Check the router FUNCTION of MODULE (or of a file.py) by every law that applies to it.

    \b
    refmoe router check my_package.moe:route --experts 8 --top-k 2 --ties lower
    refmoe router check my_router.py:route --experts 8 --top-k 2 --framework torch --dtype bfloat16

    MODULE is executed with your rights, in a process of its own. A router that ends this process, or does not return
    in time, breaks the law that is being tried. What it prints is told on standard error.

    A router is any callable logits [T, E] -> (ids [T, k], weights [T, k]). The options declare how it should behave,
    by the names of `refmoe.routers.contract.Declaration`, and the laws judge it by that declaration. Exit status 0: no
    law is broken. 1: a law is broken. 2: the input cannot be used. 3: no law is broken, and one could not be judged.
    """
    asked = Asked(function=router, laws=laws, examples=examples, claims={**claims, "factory": factory})
    context.exit(show_checked(check_router_apart(asked, timeout, progress_bar), as_json))


assert isinstance(router_command, Sections)
router_command.section("Commands", show_command, check_command)
