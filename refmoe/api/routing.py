# SPDX-License-Identifier: Apache-2.0
"""Routers: what one of the literature does with tokens, and whether one of your own keeps the laws of routing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from refmoe.api.contract_process import TIMEOUT, Asked, Checked, check_apart
from refmoe.api.contracts import judge_laws, load_function, named_laws
from refmoe.api.progress import Bars, silent
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.errors import InputError, require
from refmoe.files.atomic import replacing
from refmoe.files.npy_file import is_npy, map_npy
from refmoe.routers.literature.family import FAMILY, Settings, run_router
from refmoe.routers.literature.record import Routing
from refmoe.routers.literature.statistics import LoadStatistics, load_statistics
from refmoe.routers.pictures.picture import draw
from refmoe.routers.pictures.png import png_bytes
from refmoe.routers.pictures.svg import svg_bytes
from refmoe.routers.pictures.terminal import print_routing
from refmoe.traces.trace import read_trace

if TYPE_CHECKING:
    from refmoe.routers.contract import Declaration, Subject, Verdict

ROUTERS = tuple(FAMILY)
"""The names of the routers of the literature."""
TOKENS, EXPERTS = 16, 8
LARGEST = 1 << 20
"""The most logits that a picture may have."""
WRITERS = {".svg": svg_bytes, ".png": png_bytes}


# ---- a router of the literature


@dataclass(frozen=True)
class Routed:
    """The choices that a router made."""

    name: str
    routing: Routing
    statistics: LoadStatistics
    losses: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The router, its source and its size."""
        return f"{self.name} ({FAMILY[self.name].source}): {describe_size(self.routing)}"

    @property
    def load(self) -> str:
        """The statistics in a sentence."""
        return describe_load(self.statistics)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return routing_facts(self.name, self.routing, self.statistics, dict(self.losses))

    def draw(self, out: Path) -> None:
        """Write the picture. Raises InputError unless the name ends in .svg or .png."""
        content = picture_writer(out)(draw(self.title, self.routing, self.statistics, self.load))
        with replacing(out) as temporary:
            temporary.write_bytes(content)


def route(name: str, logits: NDArray[Any], settings: Settings) -> Routed:
    """Route logits [T, E] with a router of the literature. Raises InputError for settings that it does not have."""
    ops: Any = ExactOps()
    routing, losses = run_router(name, ops, logits, settings)
    return Routed(name, routing, load_statistics(ops, routing), losses)


def picture_writer(out: Path) -> Callable[..., bytes]:
    """The function that makes the bytes of a picture. Raises InputError unless the name ends in .svg or .png."""
    if out.suffix not in WRITERS:
        raise InputError(f"{out}: a name that ends in .svg or .png was expected")
    return WRITERS[out.suffix]


@dataclass(frozen=True)
class Logits:
    """The logits to route: of a file, or made up."""

    tokens: int | None = None
    experts: int | None = None
    file: Path | None = None
    run: str | None = None
    layer: int | None = None

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
    if is_npy(path):
        if run is not None or layer is not None:
            raise InputError(f"{path}: --run and --layer choose from a trace, but this is a .npy file")
        array = map_npy(path)
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


def routing_facts(name: str, routing: Routing, statistics: LoadStatistics, losses: dict[str, Any]) -> dict[str, Any]:
    """The whole routing as plain values."""
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


# ---- a router of one's own


def check_router(
    router: Callable[..., Any] | str,
    *,
    factory: bool = False,
    examples: int | None = None,
    laws: Sequence[str] = (),
    ready: Callable[[], None] = lambda: None,
    tell: Callable[[Verdict], None] = lambda _verdict: None,
    **claims: Any,
) -> list[Verdict]:
    """Hold a router against the laws of routing, in this process.

    router: a callable logits [T, E] -> (ids [T, k], weights [T, k]), or ``module:function`` or ``file.py:function``
    factory: whether `router` is a function (experts, top_k) that returns the router; k = E is then tried as well
    laws: the names of those to try; empty: all   claims: the fields of `refmoe.routers.contract.Declaration`
    ready: called when the router is imported   tell: called with each verdict
    The router runs with the rights of this process and without a time limit: one that never returns, or ends the
    process by `os._exit`, does so here. What it raises, even SystemExit, breaks a law. Hypothesis may keep a cache in
    the folder ``.hypothesis``. `refmoe router check` runs it in a process of its own instead.
    Raises InputError for an unknown law, or a router that cannot be imported.
    """
    require("hypothesis", "contract", "the contract of routers")
    from refmoe.routers.contract import Subject
    from refmoe.routers.contract.laws import LAWS

    names, declaration = named_laws(laws, LAWS), declared(claims)
    found = load_function(router, "a router") if isinstance(router, str) else router
    subject = made_subject(found, declaration) if factory else Subject(found, declaration)
    ready()
    return judge_laws([LAWS[name] for name in names], subject, examples, tell)


def check_router_apart(asked: Asked, timeout: float = TIMEOUT, bars: Bars = silent) -> Checked:
    """`check_router` in a process of its own, in which a router may leave, crash or never return.

    timeout: seconds for each law, and for the import
    Raises InputError as `check_router` does.
    """
    require("hypothesis", "contract", "the contract of routers")
    from refmoe.routers.contract.law import CONTRACT
    from refmoe.routers.contract.laws import LAWS

    assert LAWS is CONTRACT.laws
    declared({name: claim for name, claim in asked.claims.items() if name != "factory"})
    return check_apart(check_router, CONTRACT, asked, timeout, bars)


def declared(claims: Mapping[str, Any]) -> Declaration:
    """The declaration of a router. Raises InputError for claims that contradict."""
    from refmoe.routers.contract import Declaration

    return Declaration(**claims)


def made_subject(factory: Callable[[int, int], Callable[..., Any]], declaration: Declaration) -> Subject:
    """The router that a factory makes. A factory that raises breaks every law."""
    from refmoe.contracts.broken import LawBroken, foreign
    from refmoe.routers.contract import Subject

    def make(k: int) -> Callable[..., Any]:
        with foreign("the factory", f" for top_k {k}"):
            router = factory(declaration.experts, k)
        if not callable(router):
            raise LawBroken(f"the factory returned {type(router).__name__}, but a router was expected")
        return router

    made: list[Callable[..., Any]] = []

    def router(logits: Any) -> Any:
        if not made:
            made.append(make(declaration.top_k))
        return made[0](logits)

    return Subject(router, declaration, with_top_k=make)


__all__ = [
    "EXPERTS", "ROUTERS", "TOKENS", "Logits", "Routed", "Settings", "check_router", "check_router_apart", "declared",
    "picture_writer", "print_routing", "route",
]  # fmt: skip
