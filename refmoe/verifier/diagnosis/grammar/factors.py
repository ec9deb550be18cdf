# SPDX-License-Identifier: Apache-2.0
"""Factors: all values, or those of some heads, channels, experts or layers, times a number. Zero is one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.formats import Format
from refmoe.spec.config import Config
from refmoe.verifier.diagnosis.grammar.fault import AXES, CLOSE, MOST_PER_VALUE, Fault, Search
from refmoe.verifier.diagnosis.grammar.laboratory import Laboratory
from refmoe.verifier.diagnosis.grammar.views import View, layer, masked, stored_again
from refmoe.verifier.diagnosis.grammar.where import listed
from refmoe.verifier.passes import Key

FACTOR_BITS = 12.0
"""The length of a fitted number. One that the model uses, such as head_dim, has KNOWN_BITS."""
KNOWN_BITS = 5.0
VECTOR_BITS = MOST_PER_VALUE
"""The length of one of several fitted numbers. It is what one value can prove at most, so that numbers that are fitted
to as many values prove nothing."""
MOST_GROUPS = 512
DIFFERENT = 0.999
"""The cosine of the angle above which two rows count as one."""
FIX = "look for a scale that is applied twice, or not at all, or for the inverse of it"
FIX_ZERO = "look for a part that is dropped, masked or never written"

Groups = Callable[[Laboratory, Key, tuple[int, ...]], Any]
"""The number of the group of each value of an array, in a shape that broadcasts."""


def factors(search: Search, view: View) -> Iterator[Fault]:
    """The factors that explain a view, the simplest grouping first."""
    if not view.pairs:
        return
    for noun, groups, count in _groupings(search, view):
        found = fitted(search, view, groups, count)
        if found is not None and (fault := _fault(search, view, noun, groups, found)) is not None:
            yield fault


def _groupings(search: Search, view: View) -> Iterator[tuple[str, Groups, int]]:
    yield "", no_groups, 1
    several = several_rows(search, view)
    for axis, dimension in enumerate(view.dims):
        if dimension in ("T", "S"):
            continue
        count = next(iter(view.pairs.values()))[0].shape[axis]
        if 2 <= count <= MOST_GROUPS and (several or not _one_each(view, axis)):
            yield AXES[dimension], along(axis), count
    if view.dims[:2] == ("T", "k"):
        yield "expert", _by_expert(len(view.dims)), search.lab.config.experts
    if len({layer(key) for key in search.failed}) > 1:
        yield "layer", _by_layer, search.lab.config.layers
    if view.dims[0] == "T" and len(view.dims) > 1:
        yield "token", along(0), max(len(pair[0]) for pair in view.pairs.values())


def _one_each(view: View, axis: int) -> bool:
    """Whether each slice along the axis has one value in a row. Then a number for each explains any single row."""
    rows = 2 if view.dims[:2] == ("T", "k") else 1
    return axis >= rows and len(view.dims) == rows + 1


def several_rows(search: Search, view: View) -> bool:
    """Whether two wrong rows of the right array differ, in more than size."""
    arrays = [masked(view, search, key, right) for key, (right, _) in view.pairs.items()]
    rows = [array.reshape(-1, array.shape[-1]) for array in arrays]
    # calls see different numbers of cached positions
    return len({each.shape[1] for each in rows}) > 1 or differ(np.concatenate(rows))


def differ(rows: Any) -> bool:
    """Whether two rows differ in more than size. Rows of zeros, or with a value that is not finite, do not count.

    rows: [n, D]
    """
    sizes = np.linalg.norm(rows, axis=1)
    able = (sizes > 0) & np.isfinite(sizes)
    rows = rows[able] / sizes[able][:, None]
    return bool(len(rows) and (np.abs(rows @ rows[0]) < DIFFERENT).any())


def no_groups(lab: Laboratory, key: Key, shape: tuple[int, ...]) -> Any:
    return np.zeros((1,) * len(shape), int)


def along(axis: int) -> Groups:
    def groups(lab: Laboratory, key: Key, shape: tuple[int, ...]) -> Any:
        return np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])

    return groups


def _by_expert(dims: int) -> Groups:
    def groups(lab: Laboratory, key: Key, shape: tuple[int, ...]) -> Any:
        chosen = lab.read((key[0], f"layers.{layer(key)}.router.experts"))
        return chosen.reshape(*chosen.shape, *[1] * (dims - 2))

    return groups


def _by_layer(lab: Laboratory, key: Key, shape: tuple[int, ...]) -> Any:
    return np.full((1,) * len(shape), layer(key) or 0)


def fitted(search: Search, view: View, groups: Groups, count: int) -> Any:
    """The factor of each group by least squares, NaN where it is unknown. None if they do not fit. returns: [count]"""
    along, size, rest, whole = np.zeros(count), np.zeros(count), 0.0, 0.0
    parts = []
    for key, (right, had) in view.pairs.items():
        at = np.broadcast_to(groups(search.lab, key, right.shape), right.shape)
        one, two, at = (masked(view, search, key, each).reshape(-1) for each in (right, had, at))
        along += np.bincount(at, one * two, count)
        size += np.bincount(at, one * one, count)
        parts.append((one, two, at))
    with np.errstate(all="ignore"):
        found = np.where(size > 0, along / size, np.nan)
    for one, two, at in parts:
        moved = one * np.nan_to_num(found, nan=1.0)[at]
        rest += float(((two - moved) ** 2).sum())
        whole += float(((two - one) ** 2).sum())
    return found if whole and rest <= CLOSE**2 * whole else None


def _fault(search: Search, view: View, noun: str, groups: Groups, found: Any) -> Fault | None:
    format = search.coarse if view.name else search.format
    values, radii, bits, names = [], [], 0.0, {}
    for g, factor in enumerate(found.tolist()):
        number, name, cost = simple(factor, format, search.lab.config)
        if math.isnan(factor) or abs(factor - 1) <= 2 * format.u or number == 1:
            values.append(1.0)
            radii.append(0.0)
            continue
        values.append(number)
        radii.append(abs(number) * format.u if cost > 1 else 0.0)
        names[g] = name
        bits += cost
    if not names:
        return None
    distinct = set(names.values())
    if len(distinct) > 1:
        bits = VECTOR_BITS * len(names)
    else:
        bits = bits / len(names) + (3.0 + 1.5 * min(len(names), len(values) - len(names)) if noun else 0.0)
    numbers, radius = np.array(values), np.array(radii)

    def move(lab: Laboratory, key: Key, x: Enclosure) -> Enclosure:
        at = groups(lab, key, x.mid.shape)
        scale, around = numbers[np.minimum(at, len(numbers) - 1)], radius[np.minimum(at, len(numbers) - 1)]
        moved = scaled(lab.ops.cut(search.step, x) if not view.name else x, scale, around)
        return stored_again(search, view, moved)

    what, about = _words(noun, names, distinct, view)
    fix = FIX_ZERO if distinct == {"0"} else FIX
    return Fault(name=what, about=about, fix=fix, bits=bits + 2.0 * bool(view.name), predict=view.predict(move))


def _words(noun: str, names: dict[int, str], distinct: set[str], view: View) -> tuple[str, str]:
    if not noun:
        name = next(iter(names.values()), "1")
        if name == "0":
            return f"all values zeroed{view.of}", f"all values{view.of} are zero"
        return f"times {name}{view.of}", f"all values{view.of} are {name} times what they should be"
    which = f"{noun}{'s' if len(names) > 1 else ''} {listed(list(names))}"
    if distinct == {"0"}:
        return f"{which} zeroed{view.of}", f"the values of {which}{view.of} are zero"
    if len(distinct) == 1:
        name = next(iter(distinct))
        return f"{which} times {name}{view.of}", f"the values of {which}{view.of} are {name} times what they should be"
    each = listed([f"{g}: {name}" for g, name in names.items()])
    return f"a factor for each {noun}{view.of}", f"each {noun}{view.of} has a factor of its own ({each})"


def scaled(x: Enclosure, scale: Any, radius: Any) -> Enclosure:
    """The enclosure times numbers that are known up to a radius. Zero and powers of two are exact."""
    exact = np.asarray(radius) == 0
    if exact.all() and np.all((scale == 0) | (np.abs(np.frexp(scale)[0]) == 0.5)):
        size = np.abs(scale)
        return Enclosure(
            x.settle().mid * scale,
            np.broadcast_to(x.settle().r, x.mid.shape) * size,
            np.broadcast_to(x.settle().v, x.mid.shape) * size**2,
            accumulation=x.accumulation,
        )
    product: Enclosure = x * Enclosure(
        scale, np.asarray(radius), np.asarray(radius) ** 2 / 3, accumulation=x.accumulation
    )
    return product


def simple(factor: float, format: Format, config: Config) -> tuple[float, str, float]:
    """A factor, its name and its length in bits. One near a number that the model uses, such as head_dim, takes it."""
    if math.isnan(factor):
        return 1.0, "1", 0.0
    known: dict[str, float] = {
        "0": 0.0,
        "-1": -1.0,
        "2": 2.0,
        "1/2": 0.5,
        "3": 3.0,
        "log2(e)": math.log2(math.e),
        "ln(2)": math.log(2),
    }
    sizes = {"head_dim": config.head_dim, "dim": config.dim, "experts_per_token": config.experts_per_token}
    for name, value in sizes.items():
        known |= {
            f"sqrt({name}) = {math.sqrt(value):.6g}": math.sqrt(value), f"{name} = {value}": float(value),
            f"1/sqrt({name}) = {1 / math.sqrt(value):.6g}": 1 / math.sqrt(value),
            f"1/{name} = {1 / value:.6g}": 1 / value,
        }  # fmt: skip
    for name, number in known.items():
        if abs(factor - number) <= 2 * format.u * max(abs(number), 0.25):
            return number, name, 1.0 if number == 0 else 2.0 if number in (-1.0, 2.0) else KNOWN_BITS
    return factor, f"{factor:.{max(2, min(7, round(format.precision * math.log10(2)) + 1))}g}", FACTOR_BITS
