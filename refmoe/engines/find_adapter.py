"""From the name of an adapter to its class."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from refmoe.engines.adapter import Adapter
from refmoe.engines.adapters import SHIPPED
from refmoe.errors import InputError


def adapter_class(name: str) -> Callable[..., Adapter]:
    """The adapter of an engine.

    name: one of `SHIPPED`, with a dot in it any module, or a file that ends in ``.py``.
    Raises InputError when there is none.
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
    if not path.is_file():
        raise InputError(f"adapter '{name}': no such file, but one with a class Adapter was expected")
    spec = spec_from_file_location("refmoe_adapter", path)
    assert spec is not None
    assert spec.loader is not None
    # as for a script: it may import what lies beside it
    sys.path.insert(0, str(path.parent))
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
