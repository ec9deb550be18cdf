# SPDX-License-Identifier: Apache-2.0
"""The traces that conditions observe, and the registry of conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmoe.spec.config import Config
from refmoe.suite.case import Case
from refmoe.traces.trace import Run

Floats = NDArray[np.float64]


FLOAT32_EXP_ZERO = 104.0
"""exp(-104) is under half of float32's smallest number, so a logit 104 below the largest gets a zero."""


@dataclass(frozen=True)
class Observed:
    """A case and every tap of its golden."""

    case: Case
    arrays: Mapping[str, NDArray[Any]]
    """The arrays by ``<run>/<tap>``."""

    @property
    def config(self) -> Config:
        return self.case.config

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        return self.case.runs()

    @cached_property
    def read(self) -> tuple[Run, ...]:
        """The runs whose outputs the golden has."""
        return tuple(run for run in self.runs if run.read)

    @cached_property
    def sequences(self) -> dict[int, list[Run]]:
        """The runs of each sequence, in order."""
        found: dict[int, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.sequence, []).append(run)
        return found

    def layers(self, tap: str) -> Iterator[tuple[Run, NDArray[Any]]]:
        """One tap of every layer of every run that is read."""
        for run in self.read:
            for i in range(self.config.layers):
                yield run, self.arrays[f"{run.run}/layers.{i}.{tap}"]

    def normed(self) -> Iterator[Floats]:
        """The input of every norm: [T, D]."""
        for run in self.read:
            yield self.arrays[f"{run.run}/embedding"]
        for tap in ("attention_residual", "residual"):
            yield from (array for _, array in self.layers(tap))

    def ranked(self) -> Iterator[Floats]:
        """The router's logits in falling order, one [T, E] for each layer of each run."""
        for _, logits in self.layers("router.logits"):
            yield -np.sort(-logits, axis=-1)

    def router_mass(self) -> Floats:
        """Softmax over all experts, largest first, of every decision: [decisions, E]."""
        ranked = np.concatenate([*self.ranked()])
        weight = np.exp(ranked - ranked[:, :1])
        return np.asarray(weight / weight.sum(axis=-1, keepdims=True))

    def counts(self) -> Iterator[tuple[Run, NDArray[Any]]]:
        """Tokens per expert, for each layer of each run: [E]."""
        for run, chosen in self.layers("router.experts"):
            yield run, np.bincount(chosen.ravel(), minlength=self.config.experts)

    def lengths(self) -> list[int]:
        """The number of tokens in each sequence's first call."""
        return [len(runs[0].tokens) for runs in self.sequences.values()]


@dataclass(frozen=True)
class Condition:
    """A condition under which certain mistakes show."""

    name: str
    group: str
    what: str
    needs: tuple[str, ...]
    """The needs of known bugs that this condition satisfies, as the catalogue of bugs writes them."""
    holds: Callable[[Observed], bool]


CONDITIONS: dict[str, Condition] = {}
"""All conditions by name, in the order of the table."""

Predicate = Callable[[Observed], Any]


def condition(group: str, name: str, what: str, *needs: str) -> Callable[[Predicate], Predicate]:
    """Register a predicate under its name."""

    def register(holds: Predicate) -> Predicate:
        CONDITIONS[name] = Condition(
            name=name, group=group, what=what, needs=needs, holds=lambda seen: bool(holds(seen))
        )
        return holds

    return register
