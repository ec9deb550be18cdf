"""What a condition looks at, and how one is registered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from refmoe.spec.config import Config
from refmoe.suite.case import Case
from refmoe.traces.trace import Run

Floats = np.ndarray[Any, np.dtype[np.float64]]


FLOAT32_EXP_ZERO = 104.0
"""exp(-104) is under half of float32's smallest number: a term that far below the largest is exactly zero."""


@dataclass(frozen=True)
class Observed:
    """A case and every tap of its golden."""

    case: Case
    arrays: Mapping[str, np.ndarray[Any, Any]]
    """``<run>/<tap>`` to values."""

    @property
    def config(self) -> Config:
        return self.case.config

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        return self.case.runs()

    @cached_property
    def sequences(self) -> dict[int, list[Run]]:
        """The runs of each sequence, in order."""
        found: dict[int, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.sequence, []).append(run)
        return found

    def layers(self, tap: str) -> Iterator[tuple[Run, np.ndarray[Any, Any]]]:
        """A tap of every layer of every run."""
        for run in self.runs:
            for i in range(self.config.layers):
                yield run, self.arrays[f"{run.run}/layers.{i}.{tap}"]

    def normed(self) -> Iterator[Floats]:
        """The input of every norm: [T, D]."""
        for run in self.runs:
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

    def counts(self) -> Iterator[tuple[Run, np.ndarray[Any, Any]]]:
        """Tokens per expert, for each layer of each run: [E]."""
        for run, chosen in self.layers("router.experts"):
            yield run, np.bincount(chosen.ravel(), minlength=self.config.experts)

    def lengths(self) -> list[int]:
        """How many tokens each sequence begins with."""
        return [len(runs[0].tokens) for runs in self.sequences.values()]


@dataclass(frozen=True)
class Condition:
    """Something that has to hold for certain mistakes to show."""

    name: str
    group: str
    what: str
    needs: tuple[str, ...]
    """The words of the catalogue of known bugs that this condition answers."""
    holds: Callable[[Observed], bool]


CONDITIONS: dict[str, Condition] = {}
"""Every condition by its name, in the order of the table."""

Predicate = Callable[[Observed], Any]


def condition(group: str, name: str, what: str, *needs: str) -> Callable[[Predicate], Predicate]:
    """Register a predicate under its name."""

    def register(holds: Predicate) -> Predicate:
        CONDITIONS[name] = Condition(name, group, what, needs, lambda seen: bool(holds(seen)))
        return holds

    return register
