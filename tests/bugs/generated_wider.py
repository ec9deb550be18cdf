# SPDX-License-Identifier: Apache-2.0
"""More kinds of drawn faults: another tap, hidden or mixed cached positions, shards of a matrix, factors by expert or
layer, other rotations and gains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refmoe.spec.config import Config
from refmoe.traces.trace import Run
from tests.bugs.generated import CASES, LAYOUT, LINEAR, Generated, drawn_plainly, limits_of, shapes, words_of
from tests.verifier.engines import model_named

SOURCES = {
    ("attention.q", "x"): ("entering",), ("attention.k", "x"): ("entering",), ("attention.v", "x"): ("entering",),
    ("attention.output", "output"): ("entering", "attention_norm"),
    ("attention_residual", "x"): ("attention_norm",), ("attention_residual", "y"): ("attention_norm", "entering"),
    ("attention_residual", "output"): ("attention.output", "entering"),
    ("moe_norm", "x"): ("entering", "attention.output"), ("moe_norm", "output"): ("attention_residual",),
    ("router.logits", "x"): ("attention_residual", "entering", "attention_norm"),
    ("expert.gate", "x"): ("attention_residual", "entering"),
    ("moe.output", "output"): ("moe_norm", "attention_residual", "attention.output"),
    ("residual", "x"): ("moe_norm", "entering", "attention.output"), ("residual", "y"): ("moe_norm",),
    ("residual", "output"): ("moe.output", "attention_residual"),
}  # fmt: skip
"""The values [T, D] that may be in the place of others, by step and place."""
SLOTTED = ("expert.gate", "expert.up", "expert.hidden", "expert.output")
"""The steps with a row for each expert of a token."""


SHARE = 0.25
"""The share of the faults that are of these kinds."""


def draw(seed: int, cases: Sequence[str] = CASES) -> Generated:
    """A fault of this seed."""
    random = np.random.default_rng([21, seed])
    if random.random() >= SHARE:
        return drawn_plainly(seed, cases)
    while True:
        case = str(random.choice(cases))
        model = model_named(case)
        calls, layers = limits_of(random, model.runs, model.config.layers, "residual")
        limits = {"seed": seed, "case": case, "calls": calls, "layers": layers}
        made = _widened(random, limits, model.config, model.runs)
        if made is not None:
            return made


def _widened(random: Any, limits: dict[str, Any], config: Config, runs: tuple[Run, ...]) -> Generated | None:
    """A fault of one of these kinds.   limits: the arguments that all kinds share"""
    families: tuple[Callable[..., Generated | None], ...] = (
        _another_tap, _cached, _cached, _shards, _shards, _by_expert, _by_layer, _rotation, _gain,
    )  # fmt: skip
    return families[int(random.integers(len(families)))](random, limits, config, runs)


def _another_tap(random: Any, limits: dict[str, Any], config: Config, runs: tuple[Run, ...]) -> Generated:
    places = list(SOURCES)
    step, place = places[int(random.integers(len(places)))]
    source = str(random.choice(SOURCES[step, place]))
    said = "(the hidden state that enters|embedding|residual)" if source == "entering" else source.replace(".", r"\.")
    accepts = (rf"taken from {said}",)
    return Generated(
        **{**limits, "step": step, "place": place}, kind="another tap", axis="D", detail=source, accepts=accepts,
        change=lambda x, where: where.memory[source, where.layer], value=source,
    )  # fmt: skip


def _cached(random: Any, limits: dict[str, Any], config: Config, runs: tuple[Run, ...]) -> Generated | None:
    """Cached positions hidden, zero, exchanged, or one with the key or value of another."""
    import torch

    longest = max(run.past + len(run.tokens) for run in runs)
    if longest < 4:
        return None
    i, j = random.choice(longest - 1, 2, replace=False).tolist()
    kind = str(random.choice(["position hidden", "position zeroed", "positions exchanged", "position copied"]))
    if kind == "position hidden":
        return Generated(
            **{**limits, "step": "attention.probs", "place": "setting"}, kind=kind, axis="S", detail=str(i),
            accepts=(rf"cached positions? {i} hidden", r"cached token is hidden|cached tokens are hidden"),
            change=lambda x, where: x, value=i,
        )  # fmt: skip
    step, place = [("attention.probs", "k"), ("attention.context", "v")][int(random.integers(2))]

    def change(x: Any, where: Any) -> Any:
        order = np.arange(len(x))
        if kind == "position zeroed":
            return x * torch.as_tensor(order != i, dtype=x.dtype)[:, None, None]
        if max(i, j) < len(x):
            order[i] = j
            order[j] = i if kind == "positions exchanged" else j
        return x.index_select(0, torch.as_tensor(order))

    which = {
        "position zeroed": rf"cached position {i} zeroed",
        "positions exchanged": rf"cached positions {min(i, j)} and {max(i, j)} exchanged",
        "position copied": rf"cached positions taken from other .*\({i} holds {j}\)",
    }[kind]
    detail = f"{i}" if kind == "position zeroed" else f"{i}, {j}"
    return Generated(
        **{**limits, "step": step, "place": place}, kind=kind, axis="S", detail=detail, accepts=(which,), change=change
    )


def _shards(random: Any, limits: dict[str, Any], config: Config, runs: tuple[Run, ...]) -> Generated | None:
    """Rows or columns of a matrix in equal parts: two exchanged, one zero, one counted twice."""
    import torch

    step = str(random.choice(list(LINEAR)))
    shape = shapes(config)[LINEAR[step]]
    axis, parts = int(random.integers(2)), int(random.choice([2, 4]))
    count = shape[axis]
    if count % parts or count == parts:
        return None
    i, j = random.choice(parts, 2, replace=False).tolist()
    kind = str(random.choice(["shards exchanged", "shard zeroed", "shard twice"]))
    part: Any = np.arange(count) // (count // parts)
    order = np.arange(count)
    if kind == "shards exchanged":
        order[part == i], order[part == j] = np.flatnonzero(part == j), np.flatnonzero(part == i)
    scale = np.where(part == i, {"shard zeroed": 0.0, "shard twice": 2.0}.get(kind, 1.0), 1.0)

    def change(w: Any, where: Any) -> Any:
        times = torch.as_tensor(scale, dtype=w.dtype).reshape([-1 if axis == 0 else 1, 1 if axis == 0 else -1])
        return w.index_select(axis, torch.as_tensor(order)) * times

    noun, first = words_of(step, "weight", "RC"[axis]), i * (count // parts)
    accepts = {
        "shards exchanged": (rf"{noun}.* (halves exchanged|permuted|exchanged|shifted|split|interleaved)",),
        "shard zeroed": (
            rf"{noun}s? {first}\b.* zeroed",
            rf"{noun}.*part {i} of {parts} zeroed",
            rf"{noun} \d+ zeroed",
        ),
        "shard twice": (rf"{noun}s? {first}\b.* times 2", rf"{noun}.*part {i} of {parts} times 2"),
    }[kind]
    limits = {**limits, "step": step, "place": "weight", "calls": ()}
    if step == "logits":
        limits["layers"] = ()
    detail = f"{i} {j} of {parts}"
    return Generated(**limits, kind=kind, axis="RC"[axis], detail=detail, accepts=accepts, change=change)


def _by_expert(random: Any, limits: dict[str, Any], config: Config, runs: tuple[Run, ...]) -> Generated:
    """A factor for each expert, or of a few."""
    import torch

    step = str(random.choice(SLOTTED))
    scale = np.round(random.uniform(0.5, 2.0, config.experts), 2)
    if random.random() < 0.5:
        scale = np.where(np.arange(config.experts) == random.integers(config.experts), scale, 1.0)

    def change(x: Any, where: Any) -> Any:
        return x * torch.as_tensor(scale, dtype=x.dtype)[where.memory["experts"]][..., None]

    accepts = (r"a factor for each expert", r"experts? .*times", r"^times .*in experts? \d+")
    return Generated(
        **{**limits, "step": step, "place": "output"}, kind="factor by expert", axis="E",
        detail=str(scale.tolist()[:6]), accepts=accepts, change=change,
    )  # fmt: skip


def _by_layer(random: Any, limits: dict[str, Any], config: Config, runs: tuple[Run, ...]) -> Generated | None:
    """A factor for each layer."""
    if config.layers < 2:
        return None
    step = str(random.choice([step for step in LAYOUT if step not in ("final_norm", "logits")]))
    scale = np.round(random.uniform(0.5, 2.0, config.layers), 2).tolist()
    accepts = (r"a factor for each layer", r"layers? .*times")
    return Generated(
        **{**limits, "step": step, "place": "output", "layers": ()}, kind="factor by layer", axis="L",
        detail=str(scale), accepts=accepts, change=lambda x, where: x * scale[where.layer],
    )  # fmt: skip


def _rotation(random: Any, limits: dict[str, Any], config: Config, runs: tuple[Run, ...]) -> Generated | None:
    step = str(random.choice(["attention.q_rope", "attention.k_rope"]))
    kind = str(random.choice(["twice", "in part"]))
    if config.head_dim % 4:
        return None
    words = {"twice": r"turned twice|positions divided by 0\.5", "in part": r"only 1/2 of the pairs"}[kind]
    return Generated(
        **{**limits, "step": step, "place": "setting"}, kind=kind, axis="", detail="", accepts=(words,),
        change=lambda x, where: x,
    )  # fmt: skip


def _gain(random: Any, limits: dict[str, Any], config: Config, runs: tuple[Run, ...]) -> Generated | None:
    """The gain of another norm, or twice."""
    step = str(random.choice(["attention_norm", "moe_norm", "final_norm"]))
    kind = str(random.choice(["gain twice", "gain of final_norm"]))
    if (step, kind) == ("final_norm", "gain of final_norm"):
        return None
    words = {"gain twice": r"the gain applied twice", "gain of final_norm": r"the gain of final_norm"}[kind]
    limits = {**limits, "step": step, "place": "setting"}
    if step == "final_norm":
        limits["layers"] = ()
    return Generated(**limits, kind=kind, axis="", detail="", accepts=(words,), change=lambda x, where: x)
