"""What an engine's adapter is, and the vocabulary of the protocol.

An adapter is a class named ``Adapter`` in a module of `refmoe.engines.adapters`, in a file, or in any other module that
can be imported (`refmoe.engines.find_adapter`). `refmoe.engines.serve` speaks the protocol for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from refmoe.spec.taps import LAYER_TAPS, MODEL_TAPS
from refmoe.traces.trace import Run

PROTOCOL = "1"
"""The version of the protocol."""

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""What an engine can be asked to compute in."""

TAPS = ("embedding", *LAYER_TAPS, "final_norm", "logits")
"""Every tap without its layer, in order of computation."""
assert set(TAPS) == {*LAYER_TAPS, *MODEL_TAPS}

ABILITIES = ("chunk", "decode", "sequences")
"""chunk: several tokens on top of a cache. decode: one token on top of a cache. sequences: more than one sequence, each
with a cache of its own."""

LAYOUTS = ("hf", "mistral")
"""How a checkpoint may be laid out on disk."""

Arrays = dict[str, np.ndarray[Any, Any]]
"""Keys ``<run>/<tap>``, arrays in the dtype in which the engine holds them."""


class Skipped(Exception):
    """Raised by an adapter for what its engine does not support, or not yet."""

    def __init__(self, reason: str, issue: str | None = None) -> None:
        """reason: one sentence.   issue: the URL of an issue about it."""
        super().__init__(reason)
        self.reason = reason
        self.issue = issue


class Adapter(Protocol):
    """An engine behind the protocol. Its constructor takes the options of the command line as keyword strings.

    It may also have `layouts`, some of `LAYOUTS`, the preferred one first; without it, it reads ``"hf"``.
    """

    name: str
    """Of the engine: ``"transformers"``."""
    version: str
    """Of the engine as it is installed."""
    dtypes: tuple[str, ...]
    """Some of `DTYPES`."""
    taps: tuple[str, ...]
    """Some of `TAPS`, those that a run can give; ``"logits"`` is one of them."""
    abilities: tuple[str, ...]
    """Some of `ABILITIES`."""
    policies: Mapping[str, str]
    """Per dtype the policy of refmoe that says how the engine rounds; else the generic one of the dtype's name."""

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Load a model, in place of the one before. Raises Skipped."""

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """All runs of a case, in order, from empty caches.

        A run with `past` less than its sequence has seen begins with the cache cut to that many tokens.
        taps: names without layer; what is returned beyond them is not looked at.
        returns: keys ``<run>/<tap>`` with the taps' full names and shapes as golden/FORMAT.md has them, such as
        ``prefill/layers.0.moe_norm``.   Raises Skipped.
        """
