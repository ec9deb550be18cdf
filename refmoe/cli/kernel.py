# SPDX-License-Identifier: Apache-2.0
"""``refmoe kernel``: check a kernel of your own by the laws of its contract."""

from __future__ import annotations

from typing import Any

import click

from refmoe.api.contract_process import Asked
from refmoe.cli.contract import check_options, show_checked
from refmoe.cli.guard import GuardedCommand
from refmoe.cli.options import Decimal, Integer, json_option, progress_bar
from refmoe.cli.sections import Sections
from refmoe.testing.contracts import check_kernel_apart

DTYPES = click.Choice(["float64", "float32", "float16", "bfloat16"])
COUNT = Integer(min=1)
CONTRACTS = ("moe", "plan", "attention")


@click.group("kernel", cls=Sections, short_help="Check a kernel of your own by the laws of its contract.")
def kernel_command() -> None:
    """Kernels: fused mixtures of experts, dispatch plans, and attention over a cache of pages.

    \b
    refmoe kernel check my_kernel.py:mixture
    """


@click.command("check", cls=GuardedCommand, short_help="Check a kernel of your own by the laws of its contract.")
@click.argument("kernel", metavar="MODULE:FUNCTION")
@click.option(
    "--contract", type=click.Choice(CONTRACTS), default="moe", show_default=True, help="What the kernel computes."
)
@click.option("--dtype", type=DTYPES, help="The dtype of its arrays; float32 if not given.  [moe, attention]")
@click.option("--weights-dtype", type=DTYPES, help="The dtype of routing weights, if not --dtype.  [moe]")
@click.option("--ids-dtype", type=click.Choice(["int64", "int32"]), help="The dtype of integers; int64 if not given.")
@click.option(
    "--framework", type=click.Choice(["numpy", "torch", "jax", "cupy"]),
    help="The library of the arrays that it takes; numpy if not given.",
)  # fmt: skip
@click.option(
    "--layout", "fused", type=click.Choice(["halves", "interleaved"]),
    help="Gate and up are one argument [E, 2 F, D]: one after the other, or in turn.  [moe]",
)  # fmt: skip
@click.option("--gate-first/--up-first", default=None, help="Gate stands before up, or behind it.  [moe]")
@click.option("--transposed", is_flag=True, default=None, help="Matrices have inputs before outputs.  [moe]")
@click.option(
    "--routing", type=click.Choice(["ids", "offsets"]), help="By ids and weights, or offsets of sorted rows.  [moe]"
)
@click.option("--buffer", is_flag=True, default=None, help="The last argument is the output.  [moe]")
@click.option("--expert-map", is_flag=True, default=None, help="A further argument [E] maps experts to here.  [moe]")
@click.option("--padding", is_flag=True, default=None, help="An id may be -1.  [moe, plan]")
@click.option("--repeats/--no-repeats", default=None, help="A token may name an expert twice.  [moe]")
@click.option("--strided/--no-strided", default=None, help="Arguments may be strided.  [moe]")
@click.option("--batch-invariant", is_flag=True, default=None, help="No bit depends on the batch.  [moe, attention]")
@click.option("--deterministic/--no-deterministic", default=None, help="Equal calls, equal bits.  [moe, attention]")
@click.option("--nan", type=click.Choice(["row", "unspecified"]), help="A token with a NaN.  [moe]")
@click.option("--accumulation", type=DTYPES, help="The dtype of sums, if narrower than float32.  [moe]")
@click.option("--block", type=COUNT, help="The number of tokens or slots of a block.  [moe, plan]")
@click.option("--multiple", type=COUNT, help="D and F are multiples of it.  [moe]")
@click.option("--least-tokens", type=Integer(min=0), help="The least number of tokens.  [moe]")
@click.option("--most-tokens", type=COUNT, help="The most tokens.  [moe, plan]")
@click.option("--most-experts", type=COUNT, help="The most experts.  [moe, plan]")
@click.option("--most-slots", type=COUNT, help="The largest k.  [moe]")
@click.option(
    "--kind", type=click.Choice(["blocks", "histogram", "offsets", "permutation"]), help="What a plan returns.  [plan]"
)
@click.option("--stable/--no-stable", default=None, help="An expert's slots are in rising order.  [plan]")
@click.option("--spare", type=click.Choice(["absent", "unspecified"]), help="Blocks behind the last one.  [plan]")
@click.option("--window", type=COUNT, help="The tokens that a query sees.  [attention]")
@click.option("--scale", type=Decimal(), help="The factor of scores.  [attention]")
@click.option("--page", type=COUNT, help="The only number of tokens of a page.  [attention]")
@click.option("--width", type=COUNT, help="The only width of a head.  [attention]")
@click.option("--held", type=click.Choice(["finite", "anything"]), help="What free memory holds.  [attention]")
@click.option(
    "--table-tail", type=click.Choice(["pages", "anything"]), help="The table behind the last page.  [attention]"
)
@click.option("--policy", metavar="NAME", help="The policy by which values are judged.  [moe, attention]")
@check_options(100)
@json_option
@click.pass_context
def check_command(
    context: click.Context, /, kernel: str, contract: str, examples: int, laws: tuple[str, ...], timeout: float,
    as_json: bool, **claims: Any,
) -> None:  # fmt: skip
    """Check the kernel FUNCTION of MODULE (or of a file.py) by every law that applies to it.

    \b
    refmoe kernel check my_package.moe:experts --framework torch --dtype bfloat16 --weights-dtype float32
    refmoe kernel check my_plan.py:align --contract plan --block 16 --padding

    MODULE is executed with your rights, in a process of its own. A kernel that ends this process, or does not return
    in time, breaks the law that is being tried.

    \b
    moe        f(x [T, D], w_gate [E, F, D], w_up [E, F, D], w_down [E, D, F], ids [T, k], weights [T, k]) -> [T, D]
    plan       f(ids [T, k], block, experts) -> (slots, experts of blocks, total)
    attention  f(q [S, H, C], keys [P, B, G, C], values [P, B, G, C], table [S, M], lengths [S]) -> [S, H, C]

    The options declare other arguments and what the kernel promises; [in brackets] the contracts that have them. Exit
    status 0: no law is broken. 1: a law is broken. 2: the input cannot be used. 3: no law is broken, and one could not
    be judged.
    """
    given = {name: claim for name, claim in claims.items() if claim is not None}
    asked = Asked(function=kernel, laws=laws, examples=examples, claims=given)
    context.exit(show_checked(check_kernel_apart(contract, asked, timeout, progress_bar), as_json))


assert isinstance(kernel_command, Sections)
kernel_command.section("Commands", check_command)
