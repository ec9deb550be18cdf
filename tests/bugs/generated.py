# SPDX-License-Identifier: Apache-2.0
"""Faults drawn at random, patched into transformers, each with the names that are right for it.

A fault changes one array of one step: its output, an input or its matrix. The array is permuted, shifted, transposed,
scaled, zeroed, stale, duplicated, clamped or taken from elsewhere, along one axis, in some calls and layers. Or a
setting of the step has another value. The right names follow from what was drawn, never from what the verifier says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.spec.config import Config
from refmoe.traces.trace import Run
from tests.verifier.engines import model_named

CASES = (
    "mini-8x7b", "walking-skeleton", "window-chunks", "shared-prefix", "batch-ragged", "one-shot-chunked-stepwise",
    "dims-distinct", "four-layers", "top-3", "experts-12", "every-expert", "head-dim-free", "zero-row", "window-decode",
)  # fmt: skip
"""The golden cases that faults are drawn on."""

LAYOUT = {
    "attention_norm": "T D", "moe_norm": "T D", "final_norm": "T D", "attention.q": "T H d", "attention.k": "T K d",
    "attention.v": "T K d", "attention.q_rope": "T H d", "attention.k_rope": "T K d", "attention.probs": "H T S",
    "attention.context": "T H d", "attention.output": "T D", "attention_residual": "T D", "router.logits": "T E",
    "router.weights": "T k", "expert.gate": "T k F", "expert.up": "T k F", "expert.hidden": "T k F",
    "expert.output": "T k D", "moe.output": "T D", "residual": "T D", "logits": "T V",
}  # fmt: skip
"""The steps and the axes of their outputs."""
READS = {
    "attention_norm": {"x": "T D"}, "moe_norm": {"x": "T D"}, "final_norm": {"x": "T D"},
    "attention.q": {"x": "T D"}, "attention.k": {"x": "T D"}, "attention.v": {"x": "T D"},
    "attention.q_rope": {"x": "T H d"}, "attention.k_rope": {"x": "T K d"},
    "attention.probs": {"q": "T H d", "k": "S K d", "scores": "H T S"},
    "attention.context": {"v": "S K d", "probs": "H T S"}, "attention.output": {"x": "T H d"},
    "attention_residual": {"x": "T D", "y": "T D"}, "residual": {"x": "T D", "y": "T D"},
    "router.logits": {"x": "T D"}, "router.weights": {"logits": "T E"}, "expert.gate": {"x": "T D"},
    "expert.hidden": {"gate": "T k F", "up": "T k F"}, "expert.output": {"x": "T k F"},
    "moe.output": {"outputs": "T k D", "weights": "T k"}, "logits": {"x": "T D"},
}  # fmt: skip
"""The inputs of the steps and their axes."""
NOUNS = {
    "T": "token", "H": "head", "K": "key/value head", "E": "expert", "k": "slot", "S": "cached position",
    "F": "hidden unit", "D": "channel", "d": "channel", "V": "vocabulary item",
}  # fmt: skip
LINEAR = {
    "attention.q": "wq", "attention.k": "wk", "attention.v": "wv", "attention.output": "wo", "router.logits": "router",
    "expert.gate": "w1", "expert.up": "w3", "expert.output": "w2", "logits": "output",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The call and layer in which a step runs, and what the engine has computed so far."""

    run: Run
    layer: int
    memory: dict[Any, Any]
    """Arrays by call, layer and step."""
    runs: tuple[Run, ...]


Change = Callable[[Any, Place], Any]


@dataclass(frozen=True)
class Generated:
    """A fault that was drawn."""

    seed: int
    case: str
    step: str
    """The tap that is the first to be wrong."""
    place: str
    """``output``, the name of an input, ``weight`` or ``setting``."""
    kind: str
    axis: str
    detail: str
    accepts: tuple[str, ...]
    """Patterns, any of which a right name matches."""
    change: Change
    calls: tuple[str, ...] = ()
    """The kinds of calls that it acts in; empty: all."""
    layers: tuple[int, ...] = ()
    number: float | None = None
    """The number that a right name gives, to the precision of the dtype."""
    value: Any = None
    """The number or numbers of a setting."""
    rows: tuple[Any, ...] = ()
    """The rows that it is limited to: ``("first",)`` or ``("last",)`` token of each call, or ``("expert", e)``."""
    tokens_second: bool = False
    """Whether the tokens are the second axis of the array, as in [H, T, S]."""

    def acts(self, run: Run, layer: int) -> bool:
        return (not self.calls or run.op in self.calls) and (not self.layers or layer in self.layers)

    def __str__(self) -> str:
        limits = " ".join([*self.calls, *(f"L{i}" for i in self.layers), *map(str, self.rows)])
        return (
            f"{self.seed} {self.case} {self.step}/{self.place} {self.kind} {self.axis} {self.detail} {limits}".strip()
        )

    def named_by(self, name: str, where: str, precision: float) -> bool:
        """Whether a name, without its step, is right.   where: the rows that it is limited to, in words"""
        if self.axis in ("T", "S") and self.rows[:1] in (("first",), ("last",)) and re.match("tokens ", name):
            return True  # in a single row, every order of tokens that fits is the same
        text = f"{name} | {where}"
        if not any(re.search(pattern, text) for pattern in self.accepts):
            return False
        if self.number is None:
            return True
        found = [_number(text) for text in re.findall(r"-?(?:\d+/\d+|\d+\.?\d*(?:e[+-]?\d+)?)", name)]
        found += [number for text, number in (("log2(e)", 1.442695), ("ln(2)", 0.693147)) if text in name]
        return any(abs(each - self.number) <= precision * abs(self.number) + 1e-12 for each in found)


def _number(text: str) -> float:
    top, _, bottom = text.partition("/")
    return float(top) / float(bottom) if bottom else float(top)


# ---- drawing


def drawn_plainly(seed: int, cases: Sequence[str] = CASES) -> Generated:
    """A fault of this seed: a change of one array along one axis, or of a setting."""
    random = np.random.default_rng([20, seed])
    while True:
        case = str(random.choice(cases))
        step = str(random.choice(list(LAYOUT)))
        places = ["output", *READS.get(step, {}), *(["weight"] if step in LINEAR else []), "setting"]
        weights = np.array(
            [3.0]
            + [2.0 / max(len(READS.get(step, {})), 1)] * len(READS.get(step, {}))
            + [2.0] * (step in LINEAR)
            + [1.5]
        )
        place = str(random.choice(places, p=weights / weights.sum()))
        made = _drawn(random, seed, case, step, place)
        if made is not None:
            return made


def _drawn(random: Any, seed: int, case: str, step: str, place: str) -> Generated | None:
    model = model_named(case)
    config = model.config
    calls, layers = limits_of(random, model.runs, config.layers, step)
    limits: dict[str, Any] = {
        "seed": seed,
        "case": case,
        "step": step,
        "place": place,
        "calls": calls,
        "layers": layers,
    }
    sizes = {
        "D": config.dim, "H": config.heads, "K": config.kv_heads, "d": config.head_dim, "E": config.experts,
        "k": config.experts_per_token, "F": config.hidden_dim, "V": config.vocab, "T": 0, "S": 0,
    }  # fmt: skip
    if place == "setting":
        return _setting(random, limits, config)
    if place == "weight":
        dims = ("R", "C")
        name = LINEAR[step]
        sizes |= dict(zip(dims, shapes(config)[name], strict=True))
        limits["calls"] = ()
    else:
        dims = tuple((LAYOUT[step] if place == "output" else READS[step][place]).split())
    kinds = [
        "permuted",
        "exchanged",
        "shifted",
        "reversed",
        "scaled",
        "part scaled",
        "part zeroed",
        "duplicated",
        "halves",
    ]
    kinds += ["transposed", "all scaled", "each scaled"]
    if place != "weight":
        kinds += ["stale", "other layer", "clamped", "zeroed", "added"]
    kind = str(random.choice(kinds))
    axis = int(random.integers(len(dims)))
    dim = dims[axis]
    if place != "weight" and random.random() < 0.15 and dims[0] != "S":
        slots = dims[:2] == ("T", "k") and step != "router.weights" and random.random() < 0.6
        limits["rows"] = (
            ("expert", int(random.integers(config.experts))) if slots else (str(random.choice(["first", "last"])),)
        )
        limits["tokens_second"] = dims[0] == "H"
    return _change(random, limits, kind, axis, dim, dims, sizes)


def shapes(config: Config) -> dict[str, tuple[int, int]]:
    """The shapes of the matrices."""
    heads, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    dim, hidden = config.dim, config.hidden_dim
    return {
        "wq": (heads, dim), "wk": (kv, dim), "wv": (kv, dim), "wo": (dim, heads), "router": (config.experts, dim),
        "w1": (hidden, dim), "w3": (hidden, dim), "w2": (dim, hidden), "output": (config.vocab, dim),
    }  # fmt: skip


def limits_of(random: Any, runs: tuple[Run, ...], layers: int, step: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The calls and layers that a fault acts in; empty: all."""
    ops = sorted({run.op for run in runs})
    calls = (str(random.choice(ops)),) if random.random() < 0.35 and len(ops) > 1 else ()
    inside = step not in ("final_norm", "logits")
    chosen = (int(random.integers(layers)),) if inside and layers > 1 and random.random() < 0.3 else ()
    return calls, chosen


def words_of(step: str, place: str, dim: str) -> str:
    """A pattern of the nouns for an axis. In a linear step the axis of a channel is also one of its matrix."""
    nouns = {NOUNS.get(dim, ""), {"R": "row", "C": "column"}.get(dim, "")} - {""}
    if step in LINEAR:
        rows = {
            "attention.q": ("row", "channel", "head"),
            "attention.k": ("row", "channel", "key/value head"),
            "attention.v": ("row", "channel", "key/value head"),
        }
        if dim == "R":
            nouns |= set(
                rows.get(
                    step,
                    (
                        "row",
                        {
                            "router.logits": "expert",
                            "logits": "vocabulary item",
                            "expert.gate": "hidden unit",
                            "expert.up": "hidden unit",
                        }.get(step, "channel"),
                    ),
                )
            )
        if place == "output" and dim not in ("T", "k"):
            nouns |= {"row"}
        if dim == "C" or (place not in ("output", "weight") and dim not in ("T", "k")):
            nouns |= {"column", "channel", "hidden unit", "head"}
    return f"(?:{'|'.join(sorted(nouns))})s?"


def _change(
    random: Any, limits: dict[str, Any], kind: str, axis: int, dim: str, dims: tuple[str, ...], sizes: dict[str, int]
) -> Generated | None:
    n, step, place = sizes[dim], limits["step"], limits["place"]
    loose = dim in ("T", "S")
    noun = words_of(step, place, dim)
    said: dict[str, Any] = {**limits, "kind": kind, "axis": dim}

    def made(change: Callable[[Any], Any], *accepts: str, detail: str = "", number: float | None = None) -> Generated:
        return Generated(**said, detail=detail, accepts=accepts, change=lambda x, place: change(x), number=number)

    import torch

    def taken(x: Any, sources: Any) -> Any:
        return x.index_select(axis, torch.as_tensor(np.ascontiguousarray(sources)))

    if not loose and n < 2:
        return None
    if kind == "permuted" and not loose and n > 2:
        order = random.permutation(n)
        if (order == np.arange(n)).sum() > n - 2:
            return None
        return made(
            lambda x: taken(x, order),
            rf"{noun}.* (permuted|exchanged|shifted|in reverse|with their halves|interleaved|split|taken from)",
            detail="order" + ",".join(map(str, order)),
        )
    if kind == "exchanged" and not loose and n > 2:
        i, j = sorted(random.choice(n, 2, replace=False).tolist())
        order = np.arange(n)
        order[[i, j]] = order[[j, i]]
        return made(
            lambda x: taken(x, order),
            rf"{noun}.* {i} and {j} exchanged",
            *([rf"{noun}.* permuted", rf"{noun}.* in reverse"] if n <= 3 else []),
            detail=f"{i}<->{j}",
        )
    if kind == "shifted":
        by = int(random.choice([1, -1, 1, -1, 2]))
        ends = str(random.choice(["around", "repeat", "zero"])) if loose else "around"

        def shift(x: Any) -> Any:
            count = x.shape[axis]
            own = np.arange(count)
            sources = (own - by) % count if ends == "around" else np.clip(own - by, 0, count - 1)
            moved = taken(x, sources)
            if ends == "zero":
                outside = torch.as_tensor((own - by < 0) | (own - by >= count))
                moved = moved.masked_fill(outside.reshape([-1 if i == axis else 1 for i in range(x.ndim)]), 0.0)
            return moved

        if loose and abs(by) > 1 and ends != "around":
            return None
        small = (
            [
                rf"{noun}.* (in reverse|exchanged|permuted|halves|with the first and last|all replaced|taken from)",
                rf"{noun}.* (with the (first|last) zero|\d zeroed)",
            ]
            if loose or n <= 4
            else []
        )
        if loose and ends == "zero":
            small += [r"all values zeroed", rf"{noun}s? .*zero"]
        back = "-" if by > 0 else "+"
        # the columns of a matrix shifted one way read the channels of its input shifted the other way
        if step in LINEAR and (dim == "C" or (place == "x" and not loose)):
            small.append(rf"{'channel' if dim == 'C' else 'column'}s?.* shifted by \{back}{abs(by)}")
        # scores are products: queries moved one way are keys moved the other way
        if step == "attention.probs" and dim == "d":
            small.append(rf"channels shifted by \{back}{abs(by)}.* of the (rotated queries|cached keys)")
        return made(
            shift,
            rf"{noun}.* shifted by \{'+' if by > 0 else '-'}{abs(by)}",
            *([rf"{noun}.* halves exchanged"] if n == 2 * abs(by) else []),
            *small,
            detail=f"{by:+d} {ends}",
        )
    if kind == "reversed":
        small = [rf"{noun}.* (exchanged|permuted|shifted|with the first and last|halves)"] if loose or n <= 3 else []
        if step == "router.weights" and n == 2:
            small.append(r"times -1 of the logits")  # two weights exchanged are the softmax of the negated logits
        return made(lambda x: x.flip(axis), rf"{noun}.* in reverse order", *small)
    if kind == "halves" and not loose and n % 2 == 0 and n > 2:
        order = (np.arange(n) + n // 2) % n
        return made(lambda x: taken(x, order), rf"{noun}.* (with their halves exchanged|shifted|exchanged)")
    if kind in ("part scaled", "part zeroed") and not loose:
        count = int(random.integers(1, max(n // 3, 1) + 1))
        which = np.sort(random.choice(n, count, replace=False))
        if kind == "part zeroed" and random.random() < 0.5 and n % 4 == 0:
            start = int(random.integers(4)) * (n // 4)
            which = np.arange(start, start + n // 4)
        factor = 0.0 if kind == "part zeroed" else float(random.choice([0.5, 2.0, -1.0, 1.5, 0.9, 3.0, 0.25]))
        scale = np.ones(n)
        scale[which] = factor

        def part(x: Any) -> Any:
            return x * torch.as_tensor(scale, dtype=x.dtype).reshape([-1 if i == axis else 1 for i in range(x.ndim)])

        first = which[0]
        words = (
            [rf"{noun} {first}\b.* zeroed", rf"{noun}.*part \d of \d zeroed"]
            if not factor
            else [rf"{noun} {first}\b.* times"]
        )
        if dim == "k":
            words.append(rf"(all values zeroed|times .*) \|.*in slots? {first}\b")
        if step == "attention.context" and dim == "K":  # the query heads of the group have the same factor
            words.append(r"heads? .*(zeroed|times)")
        if factor and dims == ("H", "T", "S"):
            words.append(rf"heads? {first}\b.*times")
        return made(part, *words, detail=f"{which.tolist()[:6]} x{factor}", number=factor or None)
    if kind == "each scaled" and not loose and n <= 16:
        scale = np.round(random.uniform(0.5, 2.0, n), 2)

        def each(x: Any) -> Any:
            return x * torch.as_tensor(scale, dtype=x.dtype).reshape([-1 if i == axis else 1 for i in range(x.ndim)])

        return made(
            each,
            rf"a factor for each {noun}",
            *([rf"{noun} 0 and 1 times"] if n == 2 else []),
            detail=str(scale.tolist()[:4]),
        )
    if kind in ("all scaled", "zeroed"):
        factor = (
            0.0
            if kind == "zeroed"
            else float(random.choice([0.5, 2.0, -1.0, 1.1, 0.9, 3.0, 0.25, 1 / np.sqrt(sizes["d"])]))
        )
        words = (
            [r"^times .*|.* times .*(of the (scores|logits)|to the hidden state|added|subtracted)"]
            if factor
            else [r"zeroed|left out|subtracted|taken from"]
        )
        return made(
            lambda x: x * factor,
            *words,
            r"times",
            *([r"subtracted|added"] if limits["step"].endswith("residual") else []),
            detail=f"x{factor:.4g}",
            number=None if limits["step"].endswith("residual") and place != "output" else factor or None,
        )
    if kind == "duplicated":
        if loose:
            last = bool(random.random() < 0.5)
            return made(
                lambda x: taken(x, np.full(x.shape[axis], x.shape[axis] - 1 if last else 0)),
                rf"{noun}.* all replaced by the {'last' if last else 'first'}",
                rf"{noun}.* (shifted|taken from|all replaced|with the (first|last)|exchanged)",
                detail="last" if last else "first",
            )
        i, j = random.choice(n, 2, replace=False).tolist()
        order = np.arange(n)
        order[i] = j
        return made(
            lambda x: taken(x, order),
            rf"{noun}.* taken from other .*\({i} holds {j}\)",
            rf"{noun}s all replaced",
            rf"experts? with another's \w+ \({i} has that of {j}\)",
            detail=f"{i}<-{j}",
        )
    if kind == "transposed" and len(dims) > 1:
        i, j = sorted(random.choice(len(dims), 2, replace=False).tolist())

        def transposed(x: Any) -> Any:
            return x.transpose(i, j).reshape(x.shape)

        said["axis"] = dims[i] + dims[j]
        one, two = (NOUNS.get(dims[a], "") for a in (i, j))
        if place == "weight":
            return made(transposed, r"transposed")
        return made(
            transposed,
            rf"{one}s and {two}s transposed",
            r"(permuted|exchanged|interleaved|split|halves|shifted|reverse)"
            if not {"T", "S"} & {dims[i], dims[j]}
            else "transposed",
        )
    if kind == "clamped":
        return _clamped(random, said)
    if kind == "stale":
        return Generated(
            **said,
            detail="",
            accepts=(r"call before|first call|last token|taken from", r"tokens.* (shifted|replaced)"),
            change=_stale(step, place),
        )
    if kind == "other layer":
        return Generated(
            **{**said, "layers": ()},
            detail="",
            accepts=(r"layer|hidden state that enters|taken from embedding",),
            change=_other_layer(step, place),
        )
    if kind == "added":
        number = float(random.choice([0.5, 1.0, -0.25]))
        return made(
            lambda x: x + number,
            r"a number added to all values",
            r"each row off by a constant",
            r"a constant added",
            detail=f"+{number}",
        )
    return None


def _clamped(random: Any, said: dict[str, Any]) -> Generated:
    limit = float(random.choice([0.05, 0.1, 0.2, 0.5, 1.0, 2.0]))
    soft = bool(random.random() < 0.5)

    def change(x: Any, place: Place) -> Any:
        return (x.float() / limit).tanh().mul(limit).to(x.dtype) if soft else x.clamp(-limit, limit)

    kind = "soft-capped" if soft else "clamped"
    return Generated(
        **{**said, "kind": kind}, detail=str(limit), accepts=(kind, "clamped"), change=change, number=limit
    )


def _stale(step: str, place: str) -> Change:
    def change(x: Any, where: Place) -> Any:
        at = where.runs.index(where.run)
        key = (where.layer, step, place)
        before = [where.memory[i, *key] for i in range(at) if (i, *key) in where.memory]
        where.memory[at, *key] = x.clone()
        same = [each for each in before if each.shape == x.shape]
        return same[-1] if same and before[-1] is same[-1] else x

    return change


def _other_layer(step: str, place: str) -> Change:
    def change(x: Any, where: Place) -> Any:
        at = where.runs.index(where.run)
        before = where.memory.get((at, where.layer - 1, step, place))
        where.memory[at, where.layer, step, place] = x.clone()
        return x if before is None else before

    return change


def _setting(random: Any, limits: dict[str, Any], config: Any) -> Generated | None:
    step = limits["step"]

    def made(kind: str, number: float | None, *accepts: str, detail: str = "", value: Any = None) -> Generated:
        change: Change = value if callable(value) else lambda x, place: x
        return Generated(
            **limits, kind=kind, axis="", detail=detail, accepts=accepts, change=change, number=number, value=value
        )

    if step in ("attention_norm", "moe_norm", "final_norm"):
        kind = str(random.choice(["eps", "no gain", "gain plus one", "norm skipped", "mean subtracted", "no division"]))
        if kind == "eps":
            eps = float(random.choice([1e-4, 1e-3, 1e-2, 3e-3, 1e-6]))
            return made(kind, eps, r"eps", detail=str(eps), value=lambda x, place: eps)
        words = {
            "no gain": (r"gain left out",), "gain plus one": (r"1 added to the gain",),
            "norm skipped": (r"taken from",), "mean subtracted": (r"mean subtracted",),
            "no division": (r"division left out",),
        }[kind]  # fmt: skip
        return made(kind, None, *words)
    if step in ("attention.q_rope", "attention.k_rope"):
        kind = str(
            random.choice(["offset", "theta", "skipped", "interleaved", "sign", "divided", "from zero", "per sequence"])
        )
        if kind == "offset":
            by = int(random.choice([1, -1, 2, 3, 7, -2, 16]))
            return made(
                kind,
                float(by),
                r"positions (off by|from 0|left out|divided)",
                detail=f"{by:+d}",
                value=lambda p, place: p + by,
            )
        if kind == "theta":
            theta = float(random.choice([1e4, 5e5, 1e6, 2e4, 3e3, 12345.0]))
            return (
                made(kind, theta, r"theta", detail=str(theta), value=lambda p, place: theta)
                if theta != config.rope_theta
                else None
            )
        if kind == "divided":
            by_ = float(random.choice([2.0, 4.0, 8.0, 0.5, 1.5]))
            return made(
                kind, by_, r"positions divided by|positions left out", detail=str(by_), value=lambda p, place: p / by_
            )
        if kind == "from zero":
            return made(kind, None, r"positions (from 0|left out|off by)", value=lambda p, place: p - p[..., :1])
        if kind == "per sequence":
            return made(kind, None, r"positions off by", value=lambda p, place: p + 3 * place.run.sequence)
        words = {
            "skipped": (r"rotation left out|positions left out|positions from 0|taken from attention",),
            "interleaved": (r"neighbours paired",),
            "sign": (r"other sign",),
        }[kind]
        return made(kind, None, *words)
    if step == "attention.probs":
        kind = str(
            random.choice(
                [
                    "scale",
                    "soft cap",
                    "window",
                    "strict",
                    "cap of scores",
                    "no mask",
                    "head scale",
                    "unrotated keys",
                    "no cache",
                ]
            )
        )
        if kind == "scale":
            c = float(random.choice([0.5, 2.0, np.sqrt(config.head_dim), 1 / np.sqrt(config.head_dim), 1.1, 0.7]))
            return made(kind, c, r"times .*scores", detail=f"{c:.4g}", value=lambda s, place: s * c)
        if kind in ("soft cap", "cap of scores"):
            c = float(random.choice([0.05, 0.2, 0.5, 1.0, 3.0]))
            soft = kind == "soft cap"
            value = (lambda s, place: (s / c).tanh() * c) if soft else (lambda s, place: s.clamp(-c, c))
            return made(kind, c, r"soft-capped" if soft else r"clamped", detail=str(c), value=value)
        if kind == "head scale":
            import torch

            scale = np.round(random.uniform(0.5, 2.0, config.heads), 2)
            return made(
                kind,
                None,
                r"factor for each head",
                value=lambda s, place: s * torch.as_tensor(scale, dtype=s.dtype)[:, None, None],
            )
        if kind == "window":
            window = int(random.integers(1, 6))
            return (
                made(kind, float(window), r"window", detail=str(window), value=window)
                if window != config.window
                else None
            )
        words = {
            "strict": (r"own token",),
            "no mask": (r"every token of the call",),
            "unrotated keys": (r"keys not rotated",),
            "no cache": (r"cached tokens are hidden",),
        }[kind]
        return made(kind, None, *words)
    if step == "router.weights":
        kind = str(random.choice(["temperature", "not renormalised", "uniform", "sigmoid", "raw"]))
        if kind == "temperature":
            c = float(random.choice([0.5, 2.0, 1.25, 0.8]))
            return made(kind, c, r"times .*logits", detail=str(c), value=lambda x, place: x * c)
        words = {
            "not renormalised": (r"not renormalised",),
            "uniform": (r"equal weights|times 0\.?0* of the logits|all values",),
            "sigmoid": (r"sigmoids",),
            "raw": (r"raw logits",),
        }[kind]
        return made(kind, None, *words)
    if step == "expert.hidden":
        kind = str(random.choice(["swapped", "no activation", "no up", "sigmoid", "relu"]))
        words = {
            "swapped": (r"gate and up exchanged",),
            "no activation": (r"activation left out",),
            "no up": (r"factor of the gate left out",),
            "sigmoid": (r"sigmoid of the gate",),
            "relu": (r"ReLU",),
        }[kind]
        return made(kind, None, *words)
    if step == "moe.output":
        kind = str(random.choice(["first token's weights", "expert twice", "expert dropped", "no weights"]))
        expert = int(random.integers(config.experts))
        words = {
            "first token's weights": (r"tokens all replaced by the first of the weights",),
            "no weights": (r"taken from ones",), "expert dropped": (rf"expert {expert} zeroed",),
            "expert twice": (rf"expert {expert} times 2", rf"in expert {expert}\b"),
        }[kind]  # fmt: skip
        return made(kind, None, *words, detail=str(expert), value=expert)
    if step == "logits":
        return made("log-probabilities", None, r"log-probabilities")
    if step in LINEAR:
        kind = str(random.choice(["other layer", "another", "expert"]))
        name = LINEAR[step]
        if kind == "other layer" and config.layers > 1 and step != "logits":
            return made(kind, None, rf"{name} of (the layer before|the next layer|the other layer|layer \d)")
        other = {"wk": "wv", "wv": "wk", "w1": "w3", "w3": "w1"}.get(name)
        if kind == "another" and other:
            return made(kind, None, rf"{other} in the place of {name}")
        if kind == "expert" and name in ("w1", "w2", "w3"):
            i, j = random.choice(config.experts, 2, replace=False).tolist()
            return made(kind, None, rf"experts with another's {name}", detail=f"{i}<-{j}", value=(i, j))
    if step in ("attention_residual", "residual"):
        kind = str(random.choice(["not added", "added twice", "from the norm", "halved"]))
        norm = {"attention_residual": "attention_norm", "residual": "moe_norm"}[step]
        words = {
            "not added": (r"zeroed|taken from|subtracted",), "added twice": (r"added|times 2",),
            "from the norm": (rf"taken from {norm}",),
            "halved": (r"times 1/2|1/2 times|-1/2 times|times 0.5|-0.5",),
        }[kind]  # fmt: skip
        return made(kind, None, *words)
    return None
