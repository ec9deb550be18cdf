# SPDX-License-Identifier: Apache-2.0
"""Options of adapters: what an adapter declares about each, and the adapter that given ones make.

Names and defaults are those of the constructor's parameters. The class attribute `options` adds what a name cannot say.
An adapter without that attribute still has its options listed, and unknown ones refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from refmoe.errors import InputError
from refmoe.files.numbers import integer

if TYPE_CHECKING:
    from refmoe.engines.adapter import Adapter


@dataclass(frozen=True)
class Option:
    """The declaration of an option by its adapter, beside its name and default."""

    about: str
    """The purpose of the option, without a full stop."""
    choices: tuple[str, ...] = ()
    """The values that it takes. Without any, it takes an integer from 1."""
    text: str = ""
    """A noun phrase for its value, if that may be any text."""


TORCH_THREADS = Option("the threads of torch; sums over another number have other bits")
"""The declaration of `threads`, for engines that compute by torch."""


@dataclass(frozen=True)
class Listed:
    """An option as a user sees it."""

    name: str
    default: str | None
    """None: it has to be given."""
    about: str
    takes: str
    """A noun phrase for its values."""


def options_of(arguments: Sequence[str]) -> Mapping[str, str]:
    """The options of an adapter from arguments ``key=value``. Raises InputError."""
    options = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"option '{argument}': key=value was expected")
        options[key] = value
    return options


def listed(make: Callable[..., Adapter]) -> list[Listed]:
    """The options of an adapter, in the order of its constructor's parameters."""
    declared = declared_options(make)
    return [
        Listed(
            name=name,
            default=None if parameter.default is Parameter.empty else str(parameter.default),
            about=declared[name].about if name in declared else "",
            takes=_takes(declared[name]) if name in declared else "a text",
        )
        for name, parameter in _named(make).items()
    ]


def declared_options(make: Callable[..., Adapter]) -> Mapping[str, Option]:
    """The class attribute `options`, empty where the adapter has none."""
    declared: Mapping[str, Option] = getattr(make, "options", {})
    return declared


def made(name: str, make: Callable[..., Adapter], given: Mapping[str, str]) -> Adapter:
    """An adapter with these options. Raises InputError for an option that it lacks or needs, and for a wrong value."""
    parameters, declared = _named(make), declared_options(make)
    for key, value in given.items():
        if key not in parameters and not _takes_any(make):
            known = f"only {', '.join(parameters)} was expected" if parameters else "it takes none"
            raise InputError(f"option '{key}': adapter '{name}' has none of this name; {known}")
        if key in declared and not _fits(declared[key], value):
            raise InputError(f"option {key} is '{value}', but {_takes(declared[key])} was expected")
    for key, parameter in parameters.items():
        if parameter.default is Parameter.empty and key not in given:
            raise InputError(f"option '{key}': adapter '{name}' needs it; --option {key}=VALUE was expected")
    return make(**given)


def _parameters(make: Callable[..., Any]) -> Mapping[str, Parameter]:
    try:
        return signature(make).parameters
    except (TypeError, ValueError):  # a callable of an extension module may have none
        return {"options": Parameter("options", Parameter.VAR_KEYWORD)}


def _named(make: Callable[..., Any]) -> dict[str, Parameter]:
    several = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    return {name: each for name, each in _parameters(make).items() if each.kind not in several}


def _takes_any(make: Callable[..., Any]) -> bool:
    return any(each.kind is Parameter.VAR_KEYWORD for each in _parameters(make).values())


def _fits(option: Option, value: str) -> bool:
    return bool(option.text) or (value in option.choices if option.choices else (integer(value) or 0) >= 1)


def _takes(option: Option) -> str:
    if not option.choices:
        return option.text or "an integer from 1"
    return f"{'one of ' if len(option.choices) > 1 else ''}{', '.join(option.choices)}"
