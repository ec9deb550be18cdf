"""``refmoe route``: a picture of the choices that a router makes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.cli.options import PATH, json_option, record_of
from refmoe.errors import InputError
from refmoe.files.atomic import replacing
from refmoe.routers.literature.family import FAMILY, Settings, run_router
from refmoe.routers.literature.record import Routing
from refmoe.routers.literature.statistics import LoadStatistics, load_statistics
from refmoe.routers.pictures.picture import draw
from refmoe.routers.pictures.png import png_bytes
from refmoe.routers.pictures.svg import svg_bytes
from refmoe.routers.pictures.terminal import print_routing
from refmoe.traces.trace import read_trace

TOKENS, EXPERTS = 16, 8
LARGEST = 1 << 20
"""The most logits that a picture may have."""
MAGIC = b"\x93NUMPY"
WRITERS = {".svg": svg_bytes, ".png": png_bytes}
COUNT = click.IntRange(min=1)


@click.command("route", short_help="Show what a router does with tokens: a picture, loads and drops.")
@click.option("--router", "name", type=click.Choice([*FAMILY]), default="mixtral", show_default=True)
@click.option("--tokens", type=COUNT, metavar="T", help=f"Rows of made-up, normally distributed logits; {TOKENS}.")
@click.option("--experts", type=COUNT, metavar="E", help=f"Columns of made-up logits; {EXPERTS}.")
@click.option("--top-k", "k", type=COUNT, metavar="K", help="Experts per token; the router's own number if not given.")
@click.option("--capacity-factor", type=float, metavar="C", help="1 is T / E tokens; the router's own if not given.")
@click.option("--groups", type=COUNT, default=1, show_default=True, help="Groups of experts (deepseek-v3).")
@click.option("--top-groups", type=COUNT, default=1, show_default=True, help="Groups a token may use (deepseek-v3).")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of logits and noise.")
@click.option("--logits", "file", type=PATH, metavar="FILE", help="Real logits: [T, E] in a .npy file, or a trace.")
@click.option("--run", metavar="NAME", help="Which run of the trace; its first if not given.")
@click.option("--layer", type=click.IntRange(min=0), help="Which layer of the trace; 0 if not given.")
@click.option("--out", type=PATH, metavar="FILE", help="Also write the picture: .svg, or .png (extra 'plots').")
@json_option
def route_command(name: str, seed: int, out: Path | None, as_json: bool, **options: Any) -> None:
    """Route tokens with a router of the literature and show which experts they go to, and with what load.

    \b
    refmoe route --router switch --tokens 16 --experts 8 --capacity-factor 1
    refmoe route --router deepseek-v3 --experts 16 --top-k 4 --groups 4 --top-groups 2 --out routing.svg
    refmoe route --router mixtral --logits trace.safetensors --layer 3 --json
    """
    if out is not None and out.suffix not in WRITERS:
        raise InputError(f"{out}: a name that ends in .svg or .png was expected")
    logits = record_of(Logits, options).load(seed)
    ops: Any = ExactOps()
    settings = Settings(seed=seed, **options)
    routing, losses = run_router(name, ops, logits, settings)
    statistics = load_statistics(ops, routing)
    title = f"{name} ({FAMILY[name].source}): {describe_size(routing)}"
    facts = describe_load(statistics)
    if out is not None:
        content = WRITERS[out.suffix](draw(title, routing, statistics, facts))
        with replacing(out) as temporary:
            temporary.write_bytes(content)
    if as_json:
        click.echo(json.dumps(to_json(name, routing, statistics, losses)))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(title, markup=False)
    console.print()
    print_routing(console, routing, statistics)
    console.print()
    console.print(facts, markup=False)
    for what, loss in losses.items():
        console.print(f"{what} loss {float(loss):.6g}", markup=False)
    if out is not None:
        console.print(f"written: {out}", markup=False)


@dataclass(frozen=True)
class Logits:
    """The options that say which logits to route."""

    tokens: int | None
    experts: int | None
    file: Path | None
    run: str | None
    layer: int | None

    def load(self, seed: int) -> NDArray[Any]:
        """Logits [T, E] in float64, from the file or the seed. Raises InputError for options that contradict."""
        if self.file is None:
            if self.run is not None or self.layer is not None:
                raise InputError("--run and --layer choose from a trace, so --logits TRACE was expected")
            return made_up_logits(self.tokens or TOKENS, self.experts or EXPERTS, seed)
        if self.tokens is not None or self.experts is not None:
            raise InputError("--tokens and --experts are those of --logits FILE and cannot be given with it")
        return read_logits(self.file, self.run, self.layer)


def made_up_logits(tokens: int, experts: int, seed: int) -> NDArray[Any]:
    """Standard normal logits [T, E] from a seed. Raises InputError when there are too many for a picture."""
    if tokens * experts > LARGEST:
        raise InputError(f"{tokens} tokens times {experts} experts exceed the {LARGEST} logits of a picture")
    return np.random.default_rng(seed).standard_normal((tokens, experts))


def read_logits(path: Path, run: str | None, layer: int | None) -> NDArray[Any]:
    """Logits [T, E] in float64, from a .npy file or a trace. Raises InputError when they are not finite numbers."""
    try:
        with path.open("rb") as stream:
            is_npy = stream.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if is_npy:
        if run is not None or layer is not None:
            raise InputError(f"{path}: --run and --layer choose from a trace, but this is a .npy file")
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"{path}: not a .npy file of numbers: {error}") from None
    else:
        array = traced_logits(path, run, layer or 0)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(
            f"{path}: the array has shape {list(array.shape)}, but tokens by experts, [T, E], was expected"
        )
    if array.size > LARGEST:
        raise InputError(f"{path}: {array.size} logits, but a picture may have at most {LARGEST}")
    if array.dtype.kind not in "fiu" and array.dtype.name not in ("bfloat16", "float16"):
        raise InputError(f"{path}: the array holds {array.dtype}, but real numbers were expected")
    logits = np.asarray(array, np.float64)
    if not np.isfinite(logits).all():
        t, e = np.argwhere(~np.isfinite(logits))[0].tolist()
        raise InputError(f"{path}: the logit of token {t} for expert {e} is {logits[t, e]}, but a number was expected")
    return logits


def traced_logits(path: Path, run: str | None, layer: int) -> NDArray[Any]:
    """The tap router.logits of one run and layer. Raises InputError when the trace has none."""
    trace = read_trace(path)
    names = [entry.run for entry in trace.header.runs]
    chosen = names[0] if run is None else run
    if chosen not in names:
        raise InputError(f"{path}: there is no run '{chosen}'; the runs are {', '.join(names)}")
    key = f"{chosen}/layers.{layer}.router.logits"
    if key not in trace.tensors:
        raise InputError(f"{path}: the trace has no '{key}'")
    return trace.get(chosen, f"layers.{layer}.router.logits")


def describe_size(routing: Routing) -> str:
    """The numbers of tokens, experts and choices in words."""
    tokens, k = routing.ids.shape
    each = f"capacity {routing.capacity}" if routing.capacity is not None else "no capacity"
    choices = "" if k == routing.experts and routing.capacity is not None else f"top-{k}, "
    return f"{tokens} tokens, {routing.experts} experts, {choices}{each}"


def describe_load(statistics: LoadStatistics) -> str:
    """The statistics in a sentence."""
    full = math.log(len(statistics.asked))
    parts = [
        f"entropy {float(statistics.entropy):.3f} of {full:.3f}",
        f"coefficient of variation {float(statistics.variation):.3f}",
        f"{100 * float(statistics.drop_rate):.1f} % dropped",
        f"{statistics.uncomputed} token{'s' * (statistics.uncomputed != 1)} without an expert",
    ]
    return ", ".join(parts)


def to_json(name: str, routing: Routing, statistics: LoadStatistics, losses: dict[str, Any]) -> dict[str, Any]:
    """The whole routing as JSON."""
    return {
        "router": name,
        "experts": routing.experts,
        "capacity": routing.capacity,
        "ids": routing.ids.tolist(),
        "weights": routing.weights.tolist(),
        "asked": routing.asked.tolist(),
        "kept": routing.kept.tolist(),
        "positions": routing.positions.tolist(),
        "load": {
            "asked": statistics.asked,
            "kept": statistics.kept,
            "entropy": float(statistics.entropy),
            "variation": float(statistics.variation),
            "drop_rate": float(statistics.drop_rate),
            "uncomputed": statistics.uncomputed,
        },
        "losses": {what: float(loss) for what, loss in losses.items()},
    }
