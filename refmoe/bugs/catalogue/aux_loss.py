# SPDX-License-Identifier: Apache-2.0
"""Bugs of the load-balancing loss: `refmoe.routers.literature.losses.load_balancing_loss` in plain NumPy, with one
mistake.

The last bug is a right loss in a wrong place: a `refmoe.bugs.generation_session.Session` with one method replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refmoe.bugs.generation_session import Session
from refmoe.bugs.mutant import LOSS, mutant


def softmax(x: Any) -> Any:
    """Softmax over the last axis. x: [..., E]   returns: [..., E]"""
    weight = np.exp(x - x.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


def frequencies(rows: Any, k: int) -> Any:
    """AUX-2  The average number of times that a token chooses each expert. rows: [n, E]   returns: [E]"""
    chosen = np.argsort(-rows, axis=-1, kind="stable")[:, :k]
    return np.bincount(chosen.ravel(), minlength=rows.shape[-1]) / len(rows)


def pool(logits: Sequence[Any], mask: Any) -> Any:
    """AUX-4, AUX-5: the rows of all layers that count. logits: per layer [T, E]   mask: booleans [T], or None
    returns: [n, E]"""
    return np.concatenate([layer if mask is None else layer[mask] for layer in logits])


def loss_of(rows: Any, k: int, probabilities: Any = None) -> Any:
    """AUX-1, with the given probabilities or the softmax of the rows. rows, probabilities: [n, E]   returns: a
    scalar"""
    mean = (softmax(rows) if probabilities is None else probabilities).mean(axis=0)
    return (frequencies(rows, k) * mean).sum() * rows.shape[-1]


@mutant(
    "aux-constant", breaks=["AUX-2"], touches=["loss"], severity="training-only", changes=LOSS,
    fix="count the choices of each expert apart: the loss must differ between balanced and collapsed routing",
    sources=[
        "https://github.com/huggingface/transformers/issues/28093",
        "https://github.com/huggingface/transformers/pull/28115",
        "https://github.com/axolotl-ai-cloud/axolotl/issues/1024",
    ],
)  # fmt: skip
def constant(ops: Any, logits: Sequence[Any], k: int, mask: Any = None) -> Any:
    """f is averaged over the experts as well, and so is equal for all of them. The loss is k whatever the routing."""
    rows = pool(logits, mask)
    return (frequencies(rows, k).mean() * softmax(rows).mean(axis=0)).sum() * rows.shape[-1]


@mutant(
    "aux-wrong-reduction", breaks=["AUX-2"], touches=["loss"], severity="training-only", changes=LOSS,
    fix="sum the expert mask over the k choices and average it over tokens; take no maximum",
    sources=["https://github.com/huggingface/transformers/pull/28256"],
)  # fmt: skip
def wrong_reduction(ops: Any, logits: Sequence[Any], k: int, mask: Any = None) -> Any:
    """The mask of chosen experts is reduced by a maximum over the wrong axis. f then says which experts were used at
    all, and is averaged over the experts."""
    rows = pool(logits, mask)
    used = (frequencies(rows, k) > 0).mean()
    return (used * softmax(rows).mean(axis=0)).sum() * rows.shape[-1]


@mutant(
    "aux-includes-padding", breaks=["AUX-5"], touches=["loss"], severity="training-only", changes=LOSS,
    fix="leave padding out of f and of P",
    sources=[
        "https://github.com/huggingface/transformers/issues/28505",
        "https://github.com/huggingface/transformers/pull/28517",
    ],
)  # fmt: skip
def includes_padding(ops: Any, logits: Sequence[Any], k: int, mask: Any = None) -> Any:
    """Padding tokens count in the loss like other tokens."""
    return loss_of(pool(logits, None), k)


@mutant(
    "aux-mask-misaligned", breaks=["AUX-5"], touches=["loss"], severity="training-only", changes=LOSS,
    fix="repeat the whole mask for each layer, in the order in which the layers' logits are joined",
    sources=["https://github.com/huggingface/transformers/pull/29363"],
)  # fmt: skip
def mask_misaligned(ops: Any, logits: Sequence[Any], k: int, mask: Any = None) -> Any:
    """The mask is repeated over the layers in the wrong order: each token's flag as often as there are layers. The
    logits hold one whole layer after another."""
    keep = slice(None) if mask is None else np.repeat(mask, len(logits))
    return loss_of(np.concatenate([*logits])[keep], k)


@mutant(
    "aux-double-softmax", breaks=["AUX-3"], touches=["loss"], severity="training-only", changes=LOSS,
    fix="take the softmax once: of logits, not of probabilities that the router has normalised",
    sources=[
        "https://github.com/huggingface/transformers/issues/45120",
        "https://github.com/huggingface/transformers/pull/45111",
    ],
)  # fmt: skip
def double_softmax(ops: Any, logits: Sequence[Any], k: int, mask: Any = None) -> Any:
    """The router returns probabilities, and the loss takes their softmax again. The result is nearly flat."""
    rows = pool(logits, mask)
    return loss_of(rows, k, softmax(softmax(rows)))


@mutant(
    "aux-leaks-into-inference", breaks=["AUX-5"], touches=["loss"], severity="low", changes=LOSS,
    fix="compute the loss in training only, or of the new tokens alone: asking for router logits must change nothing",
    sources=["https://github.com/huggingface/transformers/issues/29087"],
)  # fmt: skip
class WholeContext(Session):
    """Asking for router logits computes the loss in generation too. Its attention mask covers the cached tokens. In the
    first decode call the mask has more flags than there are rows, and the call fails."""

    def counted(self, tokens: Sequence[int]) -> Any:
        return np.ones(self.past + len(tokens), bool)
