# SPDX-License-Identifier: Apache-2.0
"""Laws of the auxiliary losses, which are callables from logits [T, E] to a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refmoe.arithmetic.exact import elementary
from refmoe.contracts.broken import LawBroken, foreign
from refmoe.contracts.formats import Floats, Format, Ints
from refmoe.contracts.frameworks import to_numpy
from refmoe.contracts.law import Need, Strategy
from refmoe.routers.contract.bounds import exp_error, unit
from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.examples import batches, coarse, plain
from refmoe.routers.contract.law import law
from refmoe.routers.contract.subject import Subject

BALANCE = Need("a load-balancing loss", lambda s: s.balance_loss is not None)
Z_LOSS = Need("a router z-loss", lambda s: s.z_loss is not None)


def loss_of(subject: Subject, loss: Callable[[Any], Any] | None, logits: Floats) -> float:
    assert loss is not None
    given = subject.array(logits)
    with foreign("the loss", f" on {len(logits)} tokens"):
        found = to_numpy(loss(given))
    if found.size != 1:
        raise LawBroken(f"found a loss of shape {list(found.shape)}, one number was expected")
    return float(found.reshape(-1)[0])


def probabilities(logits: Floats) -> Floats:
    parts = elementary.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(parts / parts.sum(axis=1, keepdims=True))


def balanced(subject: Subject) -> float:
    """The loss of a balanced load, which determines the convention: k, unless declared otherwise."""
    return float(subject.declaration.top_k) if subject.balanced is None else subject.balanced


def balance_bound(d: Declaration, logits: Floats) -> float:
    """The relative error of the loss. As every term is positive, the worst exp and T + 2 E + 16 roundings bound it."""
    size = np.abs(logits - logits.max(axis=1, keepdims=True)).max()
    error = 2 * float(exp_error(d, size, np.zeros(())))
    return float(np.expm1(error + (len(logits) + 2 * d.experts + 16) * np.log1p(unit(d)))) + d.stored.unit


def even_tables(d: Declaration) -> Strategy:
    """Equal logits, which are ties, or logits by which each expert is first choice of equally many tokens."""

    def turns(height: int) -> Floats:
        return np.array([np.roll(height * (d.experts - 1.0 - np.arange(d.experts)), t) for t in range(d.experts)])

    level = st.builds(lambda tokens, c: np.full((tokens, d.experts), float(c)), st.integers(1, 8), st.integers(0, 3))
    return st.fixed_dictionaries({"logits": st.one_of(level, st.integers(1, 2).map(turns))})


@law(
    "balance-loss-even",
    "Where all probabilities are equal, or all experts take turns, the load-balancing loss has its balanced value, "
    "whatever the ties.",
    "AUX-1; Fedus et al. 2021, section 2.2",
    even_tables,
    BALANCE,
)
def balance_loss_even(subject: Subject, logits: Floats) -> None:
    found, expected = loss_of(subject, subject.balance_loss, logits), balanced(subject)
    if not abs(found - expected) <= expected * balance_bound(subject.declaration, logits):
        raise LawBroken(f"found {found!r}, expected {expected!r}")


def distinct(drawn: Ints, form: Format) -> Floats:
    """Rows of different numbers, at least 2 apart, so that the choices are known."""
    order = np.argsort(np.argsort(drawn, axis=1, kind="stable"), axis=1, kind="stable")
    return np.asarray((2.0 * order) % 240, np.float64)


def loss_tables(d: Declaration) -> Strategy:
    return st.fixed_dictionaries({"logits": batches(d, (distinct,), 9)})


@law(
    "balance-loss-values",
    "The load-balancing loss is E times the sum of f_e P_e, for every table.",
    "AUX-1 to AUX-3; Fedus et al. 2021, eq. 4 to 6",
    loss_tables,
    BALANCE,
)
def balance_loss_values(subject: Subject, logits: Floats) -> None:
    d = subject.declaration
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, : d.top_k]
    frequency = np.bincount(chosen.reshape(-1), minlength=d.experts) / len(logits)
    expected = float(d.experts * (frequency * probabilities(logits).mean(axis=0)).sum())
    expected *= balanced(subject) / d.top_k
    found = loss_of(subject, subject.balance_loss, logits)
    if not abs(found - expected) <= expected * balance_bound(d, logits):
        raise LawBroken(f"found {found!r}, expected {expected!r}: f = {frequency.tolist()}")


def z_tables(d: Declaration) -> Strategy:
    return st.fixed_dictionaries(
        {"logits": batches(d, (coarse, plain)), "shift": st.sampled_from([0.0, 128.0, -128.0])}
    )


@law(
    "z-loss-values",
    "The router z-loss is the mean over tokens of the square of log sum exp, (c + log E)^2 where all logits are c.",
    "AUX-6, AUX-7; Zoph et al. 2022, eq. 5",
    z_tables,
    Z_LOSS,
)
def z_loss_values(subject: Subject, logits: Floats, shift: float) -> None:
    d = subject.declaration
    given = np.round(logits) + shift
    largest = given.max(axis=1)
    each = largest + elementary.log(elementary.exp(given - largest[:, None]).sum(axis=1))
    expected = float((each * each).mean())
    size = np.abs(given - largest[:, None]).max(axis=1)
    error = exp_error(d, size, np.zeros(())) + unit(d) * (d.experts + d.exp_budget.constant + 4 * np.abs(each) + 4)
    bound = float((error * (2 * np.abs(each) + error)).mean()) + expected * (len(given) + 4) * unit(d)
    found = loss_of(subject, subject.z_loss, given)
    if not abs(found - expected) <= bound + d.stored.unit * expected:
        raise LawBroken(f"found {found!r}, expected {expected!r} within {bound:.2g}")
