# SPDX-License-Identifier: Apache-2.0
"""Laws of repetition: a router is a function and does not change its argument."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from refmoe.contracts.broken import LawBroken
from refmoe.contracts.formats import Floats
from refmoe.contracts.frameworks import to_numpy
from refmoe.contracts.law import Strategy
from refmoe.routers.contract.declaration import Declaration
from refmoe.routers.contract.examples import EVERYTHING, any_batch, batches
from refmoe.routers.contract.law import law
from refmoe.routers.contract.subject import Subject


def two_batches(d: Declaration) -> Strategy:
    return st.fixed_dictionaries({"logits": batches(d, EVERYTHING), "between": batches(d, EVERYTHING)})


@law(
    "repetition",
    "The same logits give the same bits, whatever was routed in between.",
    "A router is a function of its logits (ROUTE-1: no noise); determinism",
    two_batches,
)
def repetition(subject: Subject, logits: Floats, between: Floats) -> None:
    before = subject.route(logits)
    subject.route(between)
    after = subject.route(logits)
    same = (before.ids == after.ids) & ((before.weights == after.weights) | np.isnan(before.weights))
    for token in np.flatnonzero(~same.all(axis=1))[:1]:
        raise LawBroken(
            f"first ids {before.ids[token].tolist()}, weights {before.weights[token].tolist()}; then ids "
            f"{after.ids[token].tolist()}, weights {after.weights[token].tolist()}",
            int(token),
        )


@law(
    "results-kept",
    "A later call does not change the ids and weights that an earlier call returned.",
    "A router is a function; captured graphs and static buffers (vllm-project/vllm#52383) break this",
    two_batches,
)
def results_kept(subject: Subject, logits: Floats, between: Floats) -> None:
    returned = subject.call(subject.array(subject.input(logits)[0]), len(logits))
    before = subject.well_formed(*returned, len(logits), True)
    subject.call(subject.array(subject.input(between)[0]), len(between))
    after = subject.well_formed(*returned, len(logits), True)
    same = (before[0] == after[0]) & ((before[1] == after[1]) | np.isnan(before[1]))
    for token in np.flatnonzero(~same.all(axis=1))[:1]:
        raise LawBroken(
            f"the result had ids {before[0][token].tolist()}, weights {before[1][token].tolist()}; after another call "
            f"it has ids {after[0][token].tolist()}, weights {after[1][token].tolist()}",
            int(token),
        )


@law(
    "input-untouched",
    "The router does not write to its input.",
    "The experts read the same array; transformers#33969 (jitter in place)",
    any_batch,
)
def input_untouched(subject: Subject, logits: Floats) -> None:
    values = subject.input(logits)[0]
    given = subject.array(values)
    was = to_numpy(given).copy()
    subject.call(given, len(logits))
    now = to_numpy(given)
    if now.shape != was.shape:
        raise LawBroken(f"the input had shape {list(was.shape)} and has {list(now.shape)}")
    for token in np.flatnonzero(~((now == was) | np.isnan(was)).all(axis=1))[:1]:
        raise LawBroken(f"the input was {was[token].tolist()} and is {now[token].tolist()}", int(token))
