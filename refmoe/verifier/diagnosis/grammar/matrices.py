# SPDX-License-Identifier: Apache-2.0
"""The matrix of a step: taken from elsewhere, transposed, its rows or columns in another order, scaled or zeroed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.verifier.diagnosis.grammar.factors import (
    VECTOR_BITS,
    along,
    differ,
    factors,
    fitted,
    no_groups,
    scaled,
    simple,
)
from refmoe.verifier.diagnosis.grammar.fault import CLOSE, Fault, Search
from refmoe.verifier.diagnosis.grammar.laboratory import LINEAR, Held, Laboratory
from refmoe.verifier.diagnosis.grammar.orders import in_short, laws, nearest_slices, order_in_words, orders
from refmoe.verifier.diagnosis.grammar.pointwise import rounded
from refmoe.verifier.diagnosis.grammar.views import View, layer, least_squares, output
from refmoe.verifier.diagnosis.grammar.where import listed
from refmoe.verifier.passes import Key

MOST_EXPERTS = 64
"""The most experts for which an exchange is sought, because every expert computes every token."""
FIX = "look at how this matrix is loaded, split, fused or reshaped"
Change = Callable[[Laboratory, Key, int | None], Any]
"""The changed matrix of a tap's layer, and of an expert where there are some. None where it cannot be."""


def matrices(search: Search) -> Iterator[Fault]:
    """The faults of the matrix of a step that has one."""
    if search.step not in LINEAR:
        return
    name = LINEAR[search.step]
    yield from _replaced(search, name)
    yield from _rescaled(search, name)
    if search.step.startswith("expert."):
        yield from _experts(search, name)
    if search.step in ("attention.q", "attention.k", "attention.v"):
        flat = _flat(search, name)
        yield from factors(search, flat)
        yield from orders(search, flat)
    yield from _columns(search, name)


def _flat(search: Search, name: str) -> View:
    """The output with its heads as rows of the matrix."""
    whole = output(search)

    def flat(values: Any) -> Any:
        return values.reshape(len(values), -1)

    return View(
        name=name,
        dims=("T", "R"),
        pairs={key: (flat(right), flat(had)) for key, (right, had) in whole.pairs.items()},
        base=lambda lab, key: lab.right(key).map(lambda part: flat(np.broadcast_to(part, lab.right(key).mid.shape))),
        lift=lambda lab, key, x: x.reshape(len(x.mid), -1, lab.config.head_dim),
    )


def with_matrix(name: str, about: str, bits: float, change: Change) -> Fault:
    """The step with its matrix changed."""
    kept: dict[Any, Any] = {}

    def changed(lab: Laboratory, key: Key, expert: int | None) -> Any:
        at = (layer(key), expert)
        if at not in kept:
            values = change(lab, key, expert)
            kept[at] = None if values is None else Held(np.ascontiguousarray(values))
        return kept[at]

    def predict(lab: Laboratory, key: Key) -> Enclosure | None:
        given = lab.inputs(key)
        held: Any = given["weight"]
        if isinstance(held, list):
            used = set(given["experts"].reshape(-1).tolist())
            held = [changed(lab, key, e) if e in used else each for e, each in enumerate(held)]
        else:
            held = changed(lab, key, None)
        if held is None or (isinstance(held, list) and any(each is None for each in held)):
            return None
        found: Enclosure = lab.compute(key, {**given, "weight": held})
        return found

    return Fault(name=name, about=about, fix=FIX, bits=bits, predict=predict)


def _own(lab: Laboratory, key: Key, name: str, expert: int | None, to: int | None = None) -> Any:
    """A matrix as an engine holds it. None where there is no such layer, or it is the layer's own.

    to: another layer
    """
    at = layer(key)
    if to is not None and (to == at or not 0 <= to < lab.config.layers):
        return None
    held = lab.weight(name, at if to is None else to, expert) if at is not None else lab.weight(name, None)
    return held.rounded(lab.policy.at("weights"))


def _of_layer(name: str, other: Callable[[int, int], int]) -> Change:
    """The matrix of another layer.   other: from the number of the layer and the count of layers"""

    def change(lab: Laboratory, key: Key, expert: int | None) -> Any:
        return _own(lab, key, name, expert, other(layer(key) or 0, lab.config.layers))

    return change


def _always(number: int) -> Callable[[int, int], int]:
    return lambda at, count: number


def _rearranged(name: str, change: Callable[[Any], Any]) -> Change:
    """The matrix with its elements elsewhere.   change: from [m, n] to [m, n], or None where it cannot be"""

    def changed(lab: Laboratory, key: Key, expert: int | None) -> Any:
        return change(_own(lab, key, name, expert))

    return changed


def _in_the_place(name: str, other: str) -> Change:
    def change(lab: Laboratory, key: Key, expert: int | None) -> Any:
        values = _own(lab, key, other, expert)
        return values if values.shape == _own(lab, key, name, expert).shape else None

    return change


def _ordered(law: Any, axis: int) -> Callable[[Any], Any]:
    """Rows (axis 0) or columns (1) in the order of a law."""

    def change(values: Any) -> Any:
        sources = law(values.shape[axis])
        if sources is None:
            return None
        moved = np.take(values, np.maximum(sources, 0), axis=axis)
        return np.where(np.expand_dims(np.asarray(sources) < 0, 1 - axis), 0.0, moved)

    return change


ALIKE = {
    "wk": "wv", "wv": "wk", "w1": "w3", "w3": "w1", "wq": "wo", "wo": "wq", "output": "embedding",
}  # fmt: skip
"""The matrix that may be in the place of another, where their shapes are equal."""
SHARDS = tuple((part, parts) for parts in (2, 4) for part in range(parts))
"""Equal parts of a matrix, each with their number."""
IN_MEMORY: tuple[tuple[str, float, Callable[[Any], Any]], ...] = (
    ("transposed", 3.0, lambda w: w.T if w.shape[0] == w.shape[1] else None),
    ("transposed in memory", 3.5, lambda w: w.T.reshape(w.shape)),
    ("read as if transposed in memory", 3.5, lambda w: w.reshape(w.shape[::-1]).T),
)


def _replaced(search: Search, name: str) -> Iterator[Fault]:
    """The matrix of another layer or step, transposed, or with its rows or columns in the order of a law."""
    layers = search.lab.config.layers
    if search.step != "logits" and layers > 1:
        others: list[tuple[str, float, Callable[[int, int], int]]] = [
            ("the layer before", 4.0, lambda at, count: at - 1), ("the next layer", 4.0, lambda at, count: at + 1),
            ("the next layer, the last of the first", 4.5, lambda at, count: (at + 1) % count),
            ("the layer before, the first of the last", 4.5, lambda at, count: (at - 1) % count),
            *((f"layer {j}", 5.0, _always(j)) for j in range(min(layers, 8))),
        ]  # fmt: skip
        for words, bits, other in others:
            words = "the other layer" if layers == 2 and bits == 4.5 else words
            about = f"{name} of {words} is in the place of its own"
            yield with_matrix(f"{name} of {words}", about, bits, _of_layer(name, other))
    if name in ALIKE:
        words = f"{ALIKE[name]} in the place of {name}"
        yield with_matrix(words, f"the step multiplies with {words}", 3.0, _in_the_place(name, ALIKE[name]))
    for words, bits, change in IN_MEMORY:
        about = f"{name} is {words}, so that its elements are in the wrong places"
        yield with_matrix(f"{name} {words}", about, bits, _rearranged(name, change))
    for part, parts in SHARDS:
        short = f"columns of {name} with part {part} of {parts} times 2"
        yield with_matrix(short, f"the {short}", 5.5, _rearranged(name, _counted_twice(part, parts)))
    shape = _own(search.lab, search.failed[0], name, 0 if search.step.startswith("expert.") else None).shape
    for words, bits, law, _ in laws("D", True):
        for axis, noun in ((0, "rows"), (1, "columns")):
            short = f"{noun} of {name} {in_short(law(shape[axis]), noun[:-1], words)}"
            yield with_matrix(short, f"the {short}", bits + 1.5, _rearranged(name, _ordered(law, axis)))


def _counted_twice(part: int, parts: int) -> Callable[[Any], Any]:
    """Columns of one of several equal parts times 2: a sum over shards that has one of them twice."""

    def change(values: Any) -> Any:
        count = values.shape[1]
        if count % parts or count == parts:
            return None
        return values * np.where(np.arange(count) // (count // parts) == part, 2.0, 1.0)

    return change


def _rescaled(search: Search, name: str) -> Iterator[Fault]:
    """The matrix, its rows, or the input times numbers, where these are rounded again to the storage dtype."""
    whole = output(search)
    rows = len(_own(search.lab, search.failed[0], name, 0 if search.step.startswith("expert.") else None))
    flat = flattened(whole)
    for words, groups, count in (("", no_groups, 1), ("row", along(len(flat.dims) - 1), rows)):
        found = fitted(search, flat, groups, count)
        if found is None:
            continue
        numbers = np.array([simple(factor, search.coarse, search.lab.config)[0] for factor in found.tolist()])
        numbers = np.where(np.abs(numbers - 1) <= 8 * search.u, 1.0, numbers)
        moved = np.flatnonzero(numbers != 1)
        if not moved.size or len(set(numbers[moved].tolist())) > 1:
            continue
        said = simple(float(numbers[moved[0]]), search.coarse, search.lab.config)
        which = f"row{'s' * (len(moved) > 1)} {listed(moved.tolist())} of {name}" if words else name
        bits = said[2] + 1.0 + (3.0 + 1.5 * len(moved) if words else 0.0)
        for tolerance in (1e-2, 1e-3):
            scale = np.array([rounded(number, tolerance) if number else 0.0 for number in numbers])[:, None]
            what = "zeroed" if said[1] == "0" else f"times {said[1]}"
            yield with_matrix(
                f"{which} {what}", f"{which} is {said[1]} times what it should be", bits,
                _rearranged(name, _times(scale)),
            )  # fmt: skip
        if not words:
            yield _of_input(search, said[1], bits, float(numbers[0]))


def _times(scale: Any) -> Callable[[Any], Any]:
    return lambda values: values * scale


def _of_input(search: Search, number: str, bits: float, factor: float) -> Fault:
    def predict(lab: Laboratory, key: Key) -> Enclosure:
        given = lab.inputs(key)
        x = scaled(given["x"], np.asarray(factor), np.asarray(abs(factor) * search.u))
        found: Enclosure = lab.compute(key, {**given, "x": x.cut(search.evidence.policy.storage)})
        return found

    return Fault(
        name=f"times {number} of the input",
        about=f"the input is {number} times what it should be",
        fix=FIX,
        bits=bits + 1.0,
        predict=predict,
    )


def flattened(view: View) -> View:
    """The view of an output with all axes behind the row in one."""
    kept = 2 if view.dims[:2] == ("T", "k") else 1

    def flat(values: Any) -> Any:
        return values.reshape(*values.shape[:kept], -1)

    pairs = {key: (flat(right), flat(had)) for key, (right, had) in view.pairs.items()}
    return View(name="", dims=(*view.dims[:kept], "R"), pairs=pairs, base=view.base, lift=view.lift)


@dataclass(frozen=True)
class Product:
    """Rows of one layer's product: x [n, D], found y [n, O] and its error [n, O].   matrices: [n, O, D] or [O, D]"""

    x: Any
    matrices: Any
    had: Any
    error: Any


def _product(search: Search, name: str) -> Product | None:
    """The wrong rows of all failed calls of one layer."""
    lab, at = search.lab, layer(search.failed[0])
    x, had, own = [], [], []
    by_expert = search.step.startswith("expert.")
    for key in search.failed:
        if layer(key) != at:
            continue
        given, found = lab.inputs(key), lab.found(key)
        wrong = ~search.right_rows(key, lab)
        wrong = wrong if wrong.any() else np.ones(len(wrong), bool)
        rows = given["x"].mid
        if by_expert:
            k = given["experts"].shape[1]
            rows = rows.reshape(-1, rows.shape[-1]) if rows.ndim == 3 else np.repeat(rows, k, 0)
            own.append(given["experts"].reshape(-1)[wrong])
            found = found.reshape(len(rows), -1)
        x.append(rows.reshape(len(found), -1)[wrong])
        had.append(found.reshape(len(found), -1)[wrong])
    rows, found = np.concatenate(x)[:MOST_ROWS], np.concatenate(had)[:MOST_ROWS]
    w = _own(lab, search.failed[0], name, 0 if by_expert else None)
    if rows.size * len(w) > 2_000_000 or w.shape[1] > 512:
        return None
    if by_expert:
        each = np.stack([_own(lab, search.failed[0], name, e) for e in range(lab.config.experts)])
        w = each[np.concatenate(own)[:MOST_ROWS]]
        right = np.einsum("nod,nd->no", w, rows)
    else:
        right = rows @ w.T
    error = found - right
    size = np.linalg.norm(error)
    return Product(rows, w, found, error) if np.isfinite(size) and size else None


COLUMN_BITS = 6.0
"""The least length of the description of single columns."""
MOST_ROWS = 64
"""The most rows of a product that are read."""


def _columns(search: Search, name: str) -> Iterator[Fault]:
    """Columns scaled, zeroed, exchanged or permuted, by least squares over all failed calls of a layer."""
    product = _product(search, name) if search.least > COLUMN_BITS else None
    if product is None:
        return
    rows, w, had = product.x, product.matrices, product.had
    yield from _scaled_columns(search, name, product)
    yield from _permuted_columns(search, name, product)
    if w.ndim == 3:
        yield from _exchanged_of_experts(search, name, product)
        return
    yield from _exchanged_columns(search, name, rows, w, product.error)
    solved = least_squares(rows, had)
    if solved is not None:
        solved = solved.T
        for axis, noun in ((1, "columns"), (0, "rows")):
            sources = nearest_slices(np.moveaxis(solved, axis, 0), np.moveaxis(w, axis, 0))
            if sources is not None:
                yield _reordered(name, noun, axis, sources)
    elif (channels := least_squares(w, had.T)) is not None:
        sources = nearest_slices(channels, rows.T)
        if sources is not None:
            back = np.empty(len(sources), int)
            if len(set(sources.tolist())) == len(sources):
                back[sources] = np.arange(len(sources))
                yield _reordered(name, "columns", 1, back)


def _permuted_columns(search: Search, name: str, product: Product) -> Iterator[Fault]:
    """Any order of the columns: every pair of a column and a channel has an unknown share in the result."""
    count = product.x.shape[1]
    w = (
        product.matrices
        if product.matrices.ndim == 3
        else np.broadcast_to(product.matrices, (len(product.x), *product.matrices.shape))
    )
    rows = w.shape[0] * w.shape[1]
    if count**2 > MOST_UNKNOWN or rows < 1.1 * count**2 or search.least < 20.0:
        return
    effects = np.einsum("noi,nj->noij", w, product.x).reshape(rows, -1)[: 2 * count**2]
    share = least_squares(effects, product.had.reshape(-1)[: 2 * count**2])
    if share is None:
        return
    sources = share.reshape(count, count).argmax(1)
    back = np.empty(count, int)
    if len(set(sources.tolist())) == count:
        back[sources] = np.arange(count)
        yield _reordered(name, "columns", 1, back)


MOST_UNKNOWN = 1100
"""The most unknown shares that are solved for."""


def _exchanged_of_experts(search: Search, name: str, product: Product) -> Iterator[Fault]:
    """Two columns exchanged, or one a copy of another, in every expert: the pair with the least error."""
    x, w, error = product.x, product.matrices, product.error
    count = x.shape[1]
    if count > 96:
        return
    # with column i as column j: the error is x_i (w_j - w_i). All products of columns and errors at once
    along_errors = np.einsum("nod,no,ni->di", w, error, x)  # [of column d, at x_i]
    products = np.einsum("nod,noe,ni->dei", w, w, x**2)
    own = np.arange(count)
    effect = along_errors.T - along_errors[own, own][:, None]  # [i, j]
    size = np.einsum("jji->ij", products) - 2 * products[own, :, own] + products[own, own, own][:, None]
    total = float((error**2).sum())
    with np.errstate(all="ignore"):
        left = np.nan_to_num(total - 2 * effect + size, nan=np.inf)
    np.fill_diagonal(left, np.inf)
    i, j = np.unravel_index(int(left.argmin()), left.shape)
    sources = own.copy()
    sources[i] = j
    yield _reordered(name, "columns", 1, sources)
    gap = x[:, :, None] - x[:, None, :]
    turned = np.einsum("no,nod->nd", error, w)
    # with channel i of the input as channel j: the error is (x_j - x_i) w_i
    norms = np.einsum("nod,nod->nd", w, w)
    aligned = np.einsum("nij,ni->ij", -gap, turned)
    left = total - 2 * aligned + np.einsum("nij,ni->ij", gap**2, norms)
    np.fill_diagonal(left, np.inf)
    i, j = np.unravel_index(int(left.argmin()), left.shape)
    yield _channel_of_input(search, count, int(i), int(j))
    aligned = -(np.einsum("nij,ni->ij", gap, turned) - np.einsum("nij,nj->ij", gap, turned))
    squares = np.einsum("nod,noe->nde", w, w)
    width = norms[:, :, None] + norms[:, None, :] - 2 * squares
    left = total - 2 * aligned + np.einsum("nij,nij->ij", gap**2, width)
    np.fill_diagonal(left, np.inf)
    i, j = sorted(np.unravel_index(int(left.argmin()), left.shape))
    sources = own.copy()
    sources[[i, j]] = sources[[j, i]]
    yield _reordered(name, "columns", 1, sources)


def _reordered(name: str, noun: str, axis: int, sources: Any) -> Fault:
    words, listing, bits = order_in_words(sources, noun[:-1])

    def change(lab: Laboratory, key: Key, e: int | None) -> Any:
        values = _own(lab, key, name, e)
        return np.take(values, sources, axis=axis) if values.shape[axis] == len(sources) else None

    return with_matrix(f"{noun} of {name} {words}", f"{noun} of {name} hold others: {listing}", bits + 1.5, change)


def _scaled_columns(search: Search, name: str, product: Product) -> Iterator[Fault]:
    """Columns times numbers, or channels of the input: the effect is linear in these."""
    w = product.matrices if product.matrices.ndim == 3 else product.matrices[None]
    effects = (product.x[:, None, :] * w).reshape(-1, w.shape[-1])
    error = product.error.reshape(-1)
    if len(effects) < effects.shape[1] + 4 or not differ(product.x):
        return  # the input of a single row may be anything
    more = least_squares(effects, error)
    if more is None or not np.linalg.norm(error - effects @ more) <= CLOSE * np.linalg.norm(error):
        return
    tolerance = max(16 * search.u, 1e-4)
    more = np.where(np.abs(more) <= 4 * tolerance, 0.0, more)
    factor = np.where(np.abs(1 + more) <= 4 * tolerance, 0.0, 1 + more)
    moved = np.flatnonzero(factor != 1)
    if not moved.size:
        return
    others = factor[moved]
    which = f"column{'s' * (len(moved) > 1)} {listed(moved.tolist())} of {name}"
    shortest = min(len(moved), len(factor) - len(moved) + 4)
    if not others.any():
        words, bits = f"{which} zeroed", 3 + 1.5 * shortest
    elif np.ptp(others) <= 8 * tolerance * np.abs(others).max():
        number, said, cost = simple(float(np.median(others)), search.coarse, search.lab.config)
        factor[moved] = rounded(number, max(tolerance, 1e-3))
        words, bits = f"{which} times {said if cost < 12 else f'{factor[moved][0]:.5g}'}", cost + 1.5 * shortest
    else:
        words, bits = f"a factor for each column of {name}", VECTOR_BITS * len(moved)
    scale, radius = factor, np.where(np.isin(factor, (0.0, 1.0)), 0.0, np.abs(factor) * search.u)

    def predict(lab: Laboratory, key: Key) -> Enclosure | None:
        given = lab.inputs(key)
        x = given["x"]
        if search.step == "attention.output":
            x = x.reshape(x.mid.shape[0], -1)
        if x.mid.shape[-1] != len(scale):
            return None
        # the number may be in the matrix or in the input: both round once
        found: Enclosure = lab.compute(
            key, {**given, "x": scaled(x, scale, radius).cut(search.evidence.policy.storage)}
        )
        return found

    yield Fault(name=words, about=words, fix=FIX, bits=bits + 1.5, predict=predict)


def _exchanged_columns(search: Search, name: str, rows: Any, w: Any, error: Any) -> Iterator[Fault]:
    """Two columns exchanged: then the error has rank one."""
    u, s, v = np.linalg.svd(error, full_matrices=False)
    if len(s) > 1 and s[1] > CLOSE * s[0]:
        return

    def along(vectors: Any, direction: Any) -> Any:
        gap = vectors[:, None, :] - vectors[None, :, :]
        with np.errstate(all="ignore"):
            return np.nan_to_num(np.abs(gap @ direction) / np.linalg.norm(gap, axis=-1))

    if len(w[0]) > 256:
        return
    score = along(rows.T, u[:, 0]) * along(w.T, v[0])
    i, j = sorted(np.unravel_index(int(np.argmax(score)), score.shape))
    sources = np.arange(len(score))
    sources[[i, j]] = sources[[j, i]]
    yield _reordered(name, "columns", 1, sources)
    for one, two in ((i, j), (j, i)):  # or one holds the other's
        sources = np.arange(len(score))
        sources[one] = two
        yield _reordered(name, "columns", 1, sources)

    gap = np.linalg.norm(rows.T[:, None, :] - rows.T[None, :, :], axis=-1)
    with np.errstate(all="ignore"):
        single = np.abs(w.T @ v[0]) / np.linalg.norm(w.T, axis=-1)
    score = single[:, None] * along(rows.T, u[:, 0]) * (gap > 0)
    i, j = np.unravel_index(int(np.argmax(score)), score.shape)
    yield _channel_of_input(search, len(score), int(i), int(j))


def _channel_of_input(search: Search, count: int, i: int, j: int) -> Fault:
    """Channel i of the input holds channel j."""
    sources = np.arange(count)
    sources[i] = j
    words, listing, bits = order_in_words(sources, "channel")

    def predict(lab: Laboratory, key: Key) -> Enclosure:
        given = lab.inputs(key)
        x = given["x"]
        flat = x.reshape(x.mid.shape[0], -1) if search.step == "attention.output" else x
        found: Enclosure = lab.compute(key, {**given, "x": flat[..., sources]})
        return found

    return Fault(
        name=f"channels {words} of the input",
        about=f"channels of the input: {listing}",
        fix=FIX,
        bits=bits + 1.5,
        predict=predict,
    )


# ---- experts


def _experts(search: Search, name: str) -> Iterator[Fault]:
    """The hypothesis that expert e has the matrix of expert p(e), found by trying every expert on every token."""
    lab, count = search.lab, search.lab.config.experts
    if count > MOST_EXPERTS:
        return
    votes = np.zeros((count, count))
    seen = np.zeros(count)
    for key in search.failed[:8]:
        given, found = lab.inputs(key), lab.found(key)
        if not isinstance(given["weight"], list):
            return
        distances = []
        for by in range(count):
            rolled = [given["weight"][(e + by) % count] for e in range(count)]
            distances.append(((search.rough.compute(key, {**given, "weight": rolled}).mid - found) ** 2).sum(-1))
        for e in range(count):
            mine = given["experts"] == e
            if mine.any():
                seen[e] += 1
                for by in range(count):
                    votes[e, (e + by) % count] += float(distances[by][mine].sum())
    sources = np.where(seen > 0, votes.argmin(1), np.arange(count))
    if (sources == np.arange(count)).all():
        return
    moved = [f"{e} has that of {p}" for e, p in enumerate(sources.tolist()) if e != p]
    _, _, bits = order_in_words(_completed(sources, seen > 0), "expert")

    def change(lab: Laboratory, key: Key, e: int | None) -> Any:
        return _own(lab, key, name, int(sources[e or 0]))

    yield with_matrix(
        f"experts with another's {name} ({listed(moved)})", f"experts compute with another's {name}: {listed(moved)}",
        min(bits, 4.0 + 2.0 * len(moved)), change,
    )  # fmt: skip


def _completed(sources: Any, seen: Any) -> Any:
    """The map of experts, where those that nobody chose may hold anything."""
    free = [e for e in range(len(sources)) if e not in set(sources[seen].tolist())]
    whole = sources.copy()
    unseen = np.flatnonzero(~seen)
    for e, other in zip(unseen, free, strict=False):
        whole[e] = other
    return whole
