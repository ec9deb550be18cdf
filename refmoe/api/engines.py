# SPDX-License-Identifier: Apache-2.0
"""The adapters of real engines: their options, the packages that they need, and an environment that has these."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refmoe.engines.adapter import Adapter, adapter_class
from refmoe.engines.adapters import SHIPPED
from refmoe.engines.environment import install as install_packages
from refmoe.engines.environment import requirements
from refmoe.engines.options import Listed, listed
from refmoe.errors import InputError
from refmoe.files.sentences import one_line


@dataclass(frozen=True)
class Engine:
    """An adapter, as a user sees it before anything is run."""

    adapter: str
    """The name for ``refmoe conform --adapter``."""
    about: str
    """The first sentence of its module."""
    requirements: tuple[str, ...]
    """The packages that pip installs for it; empty where it declares none."""
    options: tuple[Listed, ...]


def engines() -> list[Engine]:
    """The adapters that refmoe ships, by name."""
    return [engine(name) for name in SHIPPED]


def engine(name: str) -> Engine:
    """An adapter of refmoe's, or one of the user's: a file or a module, which is executed. Raises InputError."""
    make = _class(name)
    module = sys.modules.get(getattr(make, "__module__", ""))
    about = one_line((module.__doc__ if module else None) or "").partition(". ")[0].removesuffix(".")
    return Engine(adapter=name, about=about, requirements=requirements(make), options=tuple(listed(make)))


def install(name: str, folder: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """Make a virtual environment with an adapter's engine.   folder: new or empty   say: called with what is done

    returns: its Python.   Raises InputError.
    """
    return install_packages(name, _class(name), folder, say)


def _class(name: str) -> Callable[..., Adapter]:
    """Raises InputError also where the module of an adapter cannot be imported here."""
    try:
        return adapter_class(name)
    except InputError:
        raise
    except Exception as error:  # of whatever kind: it is a stranger's module
        raise InputError(
            f"adapter '{name}': cannot be imported by this Python: {type(error).__name__}: {one_line(error)}"
        ) from None


def engine_facts(found: Engine) -> dict[str, Any]:
    """An adapter as plain values."""
    return {
        "adapter": found.adapter, "about": found.about, "requirements": [*found.requirements],
        "options": [
            {"name": each.name, "default": each.default, "about": each.about, "takes": each.takes}
            for each in found.options
        ],
    }  # fmt: skip


__all__ = ["Engine", "Listed", "engine", "engine_facts", "engines", "install"]
