# SPDX-License-Identifier: Apache-2.0
"""Views of a failed step: its output, and each input that its output determines.

A view has the right array and the array that the engine must have had, if the fault is there. Then a fault is sought
in plain arrays: permuted, scaled, taken from elsewhere. Its effect on the output follows by the step itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.spec.taps import layer_of
from refmoe.verifier.diagnosis.grammar.fault import Search
from refmoe.verifier.diagnosis.grammar.laboratory import LINEAR, NORMS, Inputs, Laboratory
from refmoe.verifier.passes import Key

Move = Callable[[Laboratory, Key, Enclosure], Enclosure | None]
"""Changes an array as a fault may. None where the fault cannot act."""

WELL = 1e4
"""The largest condition number of a matrix that is inverted."""


@dataclass(frozen=True)
class View:
    """An array of the step: its output, or one of its inputs."""

    name: str
    """The name of the input; empty for the output."""
    dims: tuple[str, ...]
    pairs: dict[Key, tuple[Any, Any]]
    """Per failed tap: the right array, and the one that the engine had if the fault is here. Empty if it is unknown."""
    base: Callable[[Laboratory, Key], Enclosure]
    lift: Callable[[Laboratory, Key, Enclosure], Enclosure]
    """The enclosure of the tap from an array of this view."""

    def predict(self, move: Move) -> Callable[[Laboratory, Key], Enclosure | None]:
        def at(lab: Laboratory, key: Key) -> Enclosure | None:
            moved = move(lab, key, self.base(lab, key))
            return None if moved is None else self.lift(lab, key, moved)

        return at

    @property
    def of(self) -> str:
        """The place in words, to follow a noun."""
        return f" of {self.name}" if self.name else ""


INPUT_DIMS = {
    "attention.q_rope": {"x": "T H d"}, "attention.k_rope": {"x": "T K d"},
    "attention.scores": {"q": "T H d", "k": "S K d"}, "attention.probs": {"scores": "H T S"},
    "attention.context": {"probs": "H T S", "v": "S K d"}, "attention.output": {"x": "T H d"},
    "router.weights": {"logits": "T E"}, "expert.hidden": {"gate": "T k F", "up": "T k F"},
    "expert.output": {"x": "T k F"}, "moe.output": {"outputs": "T k D", "weights": "T k"},
    "attention_residual": {"x": "T D", "y": "T D"}, "residual": {"x": "T D", "y": "T D"},
}  # fmt: skip
"""The inputs of a step that may be permuted, and their dimensions. Other steps read one input: "T D"."""

WORDS = {
    ("attention.scores", "q"): "the rotated queries", ("attention.scores", "k"): "the cached keys",
    ("attention.probs", "scores"): "the scores", ("attention.context", "probs"): "the mixing probabilities",
    ("attention.context", "v"): "the cached values", ("attention.output", "x"): "the contexts that it reads",
    ("router.weights", "logits"): "the logits that it reads", ("expert.hidden", "gate"): "the gate",
    ("expert.hidden", "up"): "the factor of the gate", ("expert.output", "x"): "the hidden units that it reads",
    ("moe.output", "outputs"): "the experts' outputs", ("moe.output", "weights"): "the weights that it reads",
    ("attention_residual", "x"): "the hidden state", ("attention_residual", "y"): "what is added to the hidden state",
    ("residual", "x"): "the hidden state", ("residual", "y"): "what is added to the hidden state",
}  # fmt: skip


def words_for(step: str, name: str) -> str:
    return WORDS.get((step, name), "the input")


def output(search: Search) -> View:
    """The output of the step."""
    return View(
        name="",
        dims=tuple(search.dims),
        pairs={key: (search.lab.right(key).mid, search.lab.found(key)) for key in search.failed},
        base=lambda lab, key: lab.right(key),
        lift=lambda lab, key, x: x,
    )


def inputs(search: Search) -> Iterator[View]:
    """Every input of the step that may be moved, with its array under the fault where the output determines it."""
    step = search.step
    if step == "embedding":
        return
    choices = [(*each, _inverse(search, each[0])) for each in INPUT_DIMS.get(step, {"x": "T D"}).items()]
    if step in NORMS:
        choices.append(("x", "T D", _unnormed_in_part))
    for name, dims, inverse in choices:
        pairs: dict[Key, tuple[Any, Any]] = {}
        with np.errstate(all="ignore"):
            for key in search.failed:
                right = search.lab.inputs(key)[name].mid
                had = (
                    None if inverse is None else inverse(search.lab, key, search.lab.inputs(key), search.lab.found(key))
                )
                if had is None or had.shape != right.shape or not np.isfinite(had).all():
                    pairs = {}
                    break
                pairs[key] = (right, had)
        yield View(words_for(step, name), tuple(dims.split()), pairs, *_through(name))


def _through(name: str) -> tuple[Any, Any]:
    def base(lab: Laboratory, key: Key) -> Any:
        return lab.inputs(key)[name]

    def lift(lab: Laboratory, key: Key, x: Enclosure) -> Any:
        return lab.compute(key, {**lab.inputs(key), name: x})

    return base, lift


Inverse = Callable[[Laboratory, Key, Inputs, Any], Any]


def _inverse(search: Search, name: str) -> Inverse | None:
    """The function that computes an input from the output and the other inputs. None if the output does not tell."""
    step = search.step
    if step in ("attention_residual", "residual"):
        other = "y" if name == "x" else "x"
        return lambda lab, key, given, found: found - given[other].mid
    if step in NORMS:
        return _unnormed
    if step in ("attention.q_rope", "attention.k_rope"):
        return _unrotated
    if step == "expert.hidden" and name == "up":
        return lambda lab, key, given, found: found / lab.ops.silu(given["gate"]).mid
    if step == "moe.output" and name == "weights":
        return _weights_of
    if step in LINEAR and not step.startswith("expert."):
        return _unprojected
    if step in ("expert.gate", "expert.up", "expert.output"):
        return _unprojected_slots if step == "expert.output" else None
    return None


def _unnormed(lab: Laboratory, key: Key, given: Inputs, found: Any) -> Any:
    """The input of a norm up to a factor of each row: the one that it has."""
    if not np.all(given["gain"]):
        return None
    shape = found / given["gain"]
    return shape * np.sqrt((given["x"].mid ** 2).mean(-1, keepdims=True) + given["eps"])


def _unnormed_in_part(lab: Laboratory, key: Key, given: Inputs, found: Any) -> Any:
    """The input of a norm, if more than half of each row is right."""
    shape, right = _unnormed(lab, key, given, found), given["x"].mid
    if shape is None:
        return None
    ratio = right / shape
    return shape * np.median(np.where(np.isfinite(ratio), ratio, 1.0), axis=-1, keepdims=True)


def _unrotated(lab: Laboratory, key: Key, given: Inputs, found: Any) -> Any:
    back = {**given, "x": Enclosure(found), "positions": -given["positions"]}
    return lab.compute(key, back).mid


def _weights_of(lab: Laboratory, key: Key, given: Inputs, found: Any) -> Any:
    """The weights with which the experts' outputs were added: least squares for each token. returns: [T, k]"""
    outputs = given["outputs"].mid
    if outputs.shape[2] < 2 * outputs.shape[1]:
        return None
    solved = [least_squares(y.T, row) for y, row in zip(outputs, found, strict=True)]
    return None if any(each is None for each in solved) else np.stack(solved)


def _unprojected(lab: Laboratory, key: Key, given: Inputs, found: Any) -> Any:
    matrix = lab.inputs(key)["weight"].values
    back = pseudo_inverse(matrix)
    return None if back is None else (found.reshape(len(found), -1) @ back.T).reshape(given["x"].mid.shape)


def _unprojected_slots(lab: Laboratory, key: Key, given: Inputs, found: Any) -> Any:
    backs = [pseudo_inverse(held.values) for held in given["weight"]]
    if any(back is None for back in backs):
        return None
    return np.stack(
        [[backs[e] @ y for e, y in zip(es, ys, strict=True)] for es, ys in zip(given["experts"], found, strict=True)]
    )


def least_squares(a: Any, b: Any, unique: bool = True) -> Any:
    """The solution of a x = b with the least error. None if a value is not finite.

    unique: whether there is no solution where columns depend on each other
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or min(a.shape, default=0) < 1:
        return None
    solved, _, rank, _ = np.linalg.lstsq(a, b, rcond=None)
    return solved if rank == a.shape[1] or not unique else None


def pseudo_inverse(matrix: Any) -> Any:
    """The left inverse of a matrix [m, n]. None if columns depend on each other."""
    if matrix.shape[0] < matrix.shape[1] or not np.isfinite(matrix).all():
        return None
    sizes = np.linalg.svd(matrix, compute_uv=False)
    return np.linalg.pinv(matrix) if sizes[-1] * WELL > sizes[0] else None


def stored_again(search: Search, view: View, x: Enclosure) -> Enclosure:
    """A changed array as the step reads it: an input that is computed may be rounded to the storage dtype."""
    return x.cut(search.evidence.policy.storage) if view.name else x


def tokens_of(view: View, search: Search, key: Key, array: Any) -> Any:
    """The part of an array that belongs to wrong tokens, if the view has tokens."""
    if "T" not in view.dims:
        return array
    return np.compress(search.wrong_tokens(key), array, axis=view.dims.index("T"))


def masked(view: View, search: Search, key: Key, array: Any, by_slot: bool = True) -> Any:
    """The array with zeros in the rows that are right, if the view has these rows.   by_slot: or in whole tokens"""
    if "T" not in view.dims:
        return array
    axis = view.dims.index("T")
    if by_slot and view.dims[:2] == ("T", "k") and search.dims[:2] == ["T", "k"]:
        wrong = ~search.right_rows(key, search.lab)
        wrong = wrong.reshape(array.shape[:2]) if wrong.any() else np.ones(array.shape[:2], bool)
        return array * wrong.reshape(*wrong.shape, *[1] * (array.ndim - 2))
    wrong = search.wrong_tokens(key)
    return array * wrong.reshape([-1 if i == axis else 1 for i in range(array.ndim)])


def layer(key: Key) -> int | None:
    return layer_of(key[1])
