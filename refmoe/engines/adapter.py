# SPDX-License-Identifier: Apache-2.0
"""Adapters: the interface of one, its name as a class, and the command that serves it.

An adapter is a class named ``Adapter``. It lives in a module of `refmoe.engines.adapters`, in a file, or in any other
module that can be imported. `refmoe.engines.serve` speaks the protocol for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from numpy.typing import NDArray

from refmoe.engines.adapters import SHIPPED
from refmoe.engines.options import options_of
from refmoe.errors import InputError
from refmoe.files.python_file import module_from_file
from refmoe.files.scratch import Scratch
from refmoe.traces.trace import Run

Arrays = dict[str, NDArray[Any]]
"""Keys ``<run>/<tap>``, arrays in the dtype in which the engine holds them."""


class Skipped(Exception):
    """Raised by an adapter for a model or a run that its engine does not support."""

    def __init__(self, reason: str, issue: str | None = None) -> None:
        """reason: one sentence.   issue: the URL of an issue about it."""
        super().__init__(reason)
        self.reason = reason
        self.issue = issue


def refuse_shifted(engine: str, run: Run) -> None:
    """Raises Skipped for a run whose tokens have other positions than slots of the cache.

    engine: the name of one in whose cache a slot is a position
    """
    if run.positions != tuple(range(run.past, run.past + len(run.tokens))):
        raise Skipped(
            f"a slot of {engine}'s cache is a position: {run.run} has {run.past} tokens before it, and starts at "
            f"position {run.positions[0]}"
        )


class Adapter(Protocol):
    """An engine behind the protocol. Its constructor takes the options of the command line as keyword strings.

    It may also have `layouts`, some of `protocol.LAYOUTS`, the preferred one first; without it, it reads ``"hf"``. As
    class attributes it may have `options`, per option an `Option`; `requirements`, what pip installs for it; and
    `unwanted`, packages that these bring and that are removed again.
    """

    name: str
    """The engine's name: ``"transformers"``."""
    version: str
    """The version of the engine that is installed."""
    dtypes: tuple[str, ...]
    """Some of `protocol.DTYPES`."""
    taps: tuple[str, ...]
    """The taps that a run can give: some of `protocol.TAPS`, ``"logits"`` or ``"logprobs"`` among them."""
    abilities: tuple[str, ...]
    """Some of `protocol.ABILITIES`. `protocol.UNREAD` need not be named."""
    policies: Mapping[str, str]
    """Per dtype the policy that describes how the engine rounds. Without an entry, the policy of the dtype's name."""

    def load(self, checkpoint: Path, dtype: str) -> None:
        """Load a model, in place of the one before. Raises Skipped."""

    def run(self, runs: Sequence[Run], taps: Collection[str]) -> Arrays:
        """Execute all runs of a case, in order, from empty caches.

        A run whose `past` is less than its sequence has seen begins with the cache cut to that many tokens.
        Arrays of a run that is not `read` are ignored; a `Recorder` does not keep them.
        taps: names without layer; arrays of other taps are ignored.
        returns: keys ``<run>/<tap>``, such as ``prefill/layers.0.moe_norm``, with the taps' full names and the shapes
        of golden/FORMAT.md. Logits may be those of each run's last position.   Raises Skipped.
        """


# ---- from a name to a class


def adapter_class(name: str) -> Callable[..., Adapter]:
    """The class of an adapter.

    name: one of `SHIPPED`, any module with a dot in its name, or a file that ends in ``.py``.
    Raises InputError when there is no such adapter.
    """
    if name.endswith(".py"):
        module = _from_file(name)
    elif "." in name:
        module = _from_module(name)
    elif name in SHIPPED:
        module = import_module(f"refmoe.engines.adapters.{name}")
    else:
        raise InputError(
            f"adapter '{name}': refmoe has none of this name, but one of {', '.join(SHIPPED)} was expected, or one of "
            f"your own: a file, ./{name}.py, or a module whose name has a dot, package.{name}, and whose package is on "
            "PYTHONPATH (PYTHONPATH=. for the current folder)"
        )
    if not hasattr(module, "Adapter"):
        raise InputError(f"adapter '{name}': has no class Adapter, but refmoe/engines/adapter.py says what one is")
    found: Callable[..., Adapter] = module.Adapter
    return found


def _from_module(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"adapter '{name}': there is no module {name} on PYTHONPATH (PYTHONPATH=. for the current folder)"
        ) from None


def _from_file(name: str) -> ModuleType:
    path = Path(name).absolute()
    # like a script, the file may import modules that lie beside it
    sys.path.insert(0, str(path.parent))
    return module_from_file(path, "refmoe_adapter", "a Python file with a class Adapter")


# ---- the command that serves one


@contextmanager
def adapter_command(
    name: str, options: Sequence[str], python: Path | None
) -> Iterator[tuple[list[str], Mapping[str, str]]]:
    """The command that serves an adapter, and the variables by which its Python finds this refmoe.

    python: the interpreter, or None for this one.   Raises InputError for an option that is not ``key=value``.
    """
    options_of(options)
    with Scratch("path") as scratch:
        folder = scratch.path
        # a folder with refmoe alone: packages beside it may be built for another Python
        (folder / "refmoe").symlink_to(Path(__file__).resolve().parents[1], target_is_directory=True)
        interpreter = sys.executable if python is None else str(python)
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        yield [interpreter, "-P", "-m", "refmoe.engines.serve", name, *options], {"PYTHONPATH": path}
