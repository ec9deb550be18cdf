# SPDX-License-Identifier: Apache-2.0
"""A bug of a public kernel or router: its report, and a small function that has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Contract = Literal["moe", "plan", "attention", "router"]


@dataclass(frozen=True)
class KernelBug:
    """One bug. `make` returns a new function, as some of them remember earlier calls."""

    name: str
    words: str
    source: str
    """The address of the public report."""
    date: str
    """The day of the report, YYYY-MM-DD."""
    contract: Contract
    make: Callable[[], Callable[..., Any]]
    claims: Mapping[str, Any] = field(default_factory=dict)
    """The claims of the function, by the names of the contract's declaration."""


KERNEL_BUGS: dict[str, KernelBug] = {}
"""All bugs by name, in the order of `catalogue.py`."""


def bug(
    name: str, words: str, source: str, date: str, contract: Contract = "moe", **claims: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a faulty function that remembers nothing, which becomes a registered bug."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        KERNEL_BUGS[name] = KernelBug(
            name=name, words=words, source=f"https://github.com/{source}", date=date, contract=contract,
            make=lambda: function, claims=claims,
        )  # fmt: skip
        return function

    return register


def remembering_bug(
    name: str, words: str, source: str, date: str, contract: Contract = "moe", **claims: Any
) -> Callable[[Callable[[], Callable[..., Any]]], Callable[[], Callable[..., Any]]]:
    """Decorates a function that makes a faulty one with a memory of its own, which becomes a registered bug."""

    def register(make: Callable[[], Callable[..., Any]]) -> Callable[[], Callable[..., Any]]:
        KERNEL_BUGS[name] = KernelBug(
            name=name, words=words, source=f"https://github.com/{source}", date=date, contract=contract, make=make,
            claims=claims,
        )  # fmt: skip
        return make

    return register
