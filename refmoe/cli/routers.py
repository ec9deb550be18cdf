"""``refmoe routers check``: test any router by the laws of routing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from refmoe.cli.options import json_option, progress_bar
from refmoe.errors import InputError, require
from refmoe.report.terminal import open_console

if TYPE_CHECKING:
    from refmoe.routers.contract import Verdict

BEHAVIOURS = click.Choice(["raise", "propagate", "unspecified"])
DTYPES = click.Choice(["float64", "float32", "float16", "bfloat16"])
Names = tuple[str, ...]


@click.group("routers", short_help="Test any router by the laws of routing.")
def routers_command() -> None:
    """A router is any callable logits [T, E] -> (ids [T, k], weights [T, k]).

    \b
    refmoe routers check my_router.py:route --experts 8 --top-k 2
    """


@routers_command.command("check")
@click.argument("router", metavar="MODULE:FUNCTION")
@click.option("--experts", type=int, required=True, help="The number of experts.")
@click.option("--top-k", type=int, required=True, help="The number of experts of a token.")
@click.option("--factory", is_flag=True, help="FUNCTION(experts, top_k) returns the router; k = E is tried as well.")
@click.option("--scoring", type=click.Choice(["softmax", "sigmoid", "other"]), default="softmax", show_default=True)
@click.option("--unnormalised", is_flag=True, help="The chosen weights keep their shares of all experts.")
@click.option("--scale", type=float, default=1.0, help="The factor of all weights.")
@click.option("--epsilon", type=float, default=0.0, help="Added to the sum that normalises.")
@click.option("--selection", type=click.Choice(["logits", "scores"]), default="scores", show_default=True,
              help="The numbers that the selection compares.")  # fmt: skip
@click.option("--tie", "ties", type=click.Choice(["lower", "higher", "unspecified"]), default="unspecified",
              show_default=True, help="Which of equal logits is chosen.")  # fmt: skip
@click.option("--any-order", is_flag=True, help="The ids of a token are in no particular order.")
@click.option("--nan", type=BEHAVIOURS, default="unspecified", help="A token with a NaN.")
@click.option("--infinity", type=BEHAVIOURS, default="unspecified", help="A token with a +Inf.")
@click.option("--all-masked", type=BEHAVIOURS, default="unspecified", help="A token of nothing but -Inf.")
@click.option("--dtype", type=DTYPES, default="float32", show_default=True, help="The dtype of the logits.")
@click.option("--arithmetic", type=DTYPES, help="The dtype it computes in, if not --dtype.")
@click.option("--weights-dtype", type=DTYPES, help="The dtype it rounds weights to, if not --arithmetic.")
@click.option("--framework", type=click.Choice(["numpy", "torch", "jax", "cupy"]), default="numpy", show_default=True)
@click.option("--capacity", type=int, help="Tokens that an expert takes of a batch.")
@click.option("--priority", type=click.Choice(["token", "choice", "weight"]), default="token", show_default=True)
@click.option("--examples", type=click.IntRange(1), default=200, show_default=True, help="Examples per law.")
@click.option("--law", "laws", multiple=True, metavar="NAME", help="Only this law; repeatable.")
@json_option
def check_command(router: str, factory: bool, examples: int, laws: Names, as_json: bool, **claims: Any) -> None:
    """Check the router FUNCTION of MODULE (or of a file.py) by every law that applies to it.

    \b
    refmoe routers check my_package.moe:route --experts 8 --top-k 2 --tie lower
    refmoe routers check my_router.py:route --experts 8 --top-k 2 --framework torch --dtype bfloat16

    The options declare how the router should behave, and the laws judge it by that declaration. Exit status 0: no law
    is broken. 1: a law is broken or could not be judged. 2: the input cannot be used.
    """
    require("hypothesis", "contract", "the contract of routers")
    from refmoe.routers.contract import Declaration, Subject, judge
    from refmoe.routers.contract.laws import LAWS

    if unknown := [name for name in laws if name not in LAWS]:
        raise InputError(f"--law {unknown[0]}: no such law, one of {', '.join(LAWS)} was expected")
    normalised, descending = not claims.pop("unnormalised"), not claims.pop("any_order")
    declaration = Declaration(normalised=normalised, descending=descending, **claims)
    found = load(router)
    parts: dict[str, Any] = {}
    if factory:
        made = found
        parts["with_top_k"] = lambda k: made(declaration.experts, k)
        found = made(declaration.experts, declaration.top_k)
    subject = Subject(found, declaration, **parts)
    verdicts = []
    with progress_bar("laws", len(laws or LAWS)) as advance:
        for name in laws or LAWS:
            verdicts.append(judge(LAWS[name], subject, examples))
            advance()
    show(verdicts, as_json)
    if any(verdict.outcome in ("fail", "not judged") for verdict in verdicts):
        raise SystemExit(1)


def load(where: str) -> Callable[..., Any]:
    """The function that ``module:function`` or ``file.py:function`` names. Raises InputError."""
    module_name, _, name = where.rpartition(":")
    if not module_name or not name:
        raise InputError(f"'{where}' is not MODULE:FUNCTION, such as my_package.moe:route")
    sys.path.insert(0, "")
    try:
        module = module_of(module_name)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{module_name} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"{module_name} has no function '{name}'")
    return found  # type: ignore[no-any-return]


def module_of(name: str) -> Any:
    """Import a module by its name or its file. Raises InputError for a file that is missing or is not Python."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name)
    if not path.is_file():
        raise InputError(f"{name} is no file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def show(verdicts: list[Verdict], as_json: bool) -> None:
    """Print a table of the laws, then each broken law with its smallest example."""
    from refmoe.routers.contract.report import as_data, explain, summary

    if as_json:
        click.echo(json.dumps({"laws": [as_data(verdict) for verdict in verdicts]}))
        return
    console = open_console(soft_wrap=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("law", "", "examples", ""):
        table.add_column(heading, no_wrap=heading != "", justify="right" if heading == "examples" else "left")
    for verdict in verdicts:
        failed = verdict.outcome == "fail"
        words = "smallest example below" if failed else verdict.words
        style = "bold red" if failed else "dim" if verdict.outcome != "pass" else None
        outcome = "FAIL" if failed else verdict.outcome
        table.add_row(verdict.law.name, outcome, str(verdict.examples or ""), words, style=style)
    console.print(table)
    for verdict in verdicts:
        if verdict.outcome == "fail":
            click.echo("\n" + explain(verdict))
    click.echo("\n" + summary(verdicts))
