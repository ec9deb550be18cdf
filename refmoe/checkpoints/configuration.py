# SPDX-License-Identifier: Apache-2.0
"""The check of a configuration, wherever it comes from: a file, a case, or an argument."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from refmoe.spec.config import Config

REAL = ("norm_eps", "rope_theta")
"""The fields that are real numbers. All others are integers."""


LARGEST = {
    "layers": 1 << 12, "experts": 1 << 14, "heads": 1 << 14, "kv_heads": 1 << 14, "head_dim": 1 << 14, "dim": 1 << 22,
    "hidden_dim": 1 << 24, "vocab": 1 << 26,
}  # fmt: skip
"""Bounds far above any model. Beyond them, a list of the weights' names alone would fill the memory."""
LARGEST_OTHER = 1 << 40
"""The bound of every other integer."""
MOST_EXPERTS = 1 << 17
"""The bound of the experts of all layers together."""
BASES = 2.0**-8, 2.0**512
"""The bases of angles for which `refmoe.arithmetic.exact.elementary.unit_circle` is defined."""


class ConfigError(ValueError):
    """A configuration that is not a Mixtral; the message names the field, its value and the reason."""


def checked(values: Mapping[str, Any]) -> Config:
    """The configuration with these fields.

    values: field of `Config` to its value.   Raises ConfigError for a value that breaks a clause CONFIG-1 to CONFIG-5,
    and for a field that is unknown or missing.
    """
    names = [field.name for field in fields(Config)]
    for name in values:
        if name not in names:
            raise ConfigError(f"unknown field '{name}', but one of {', '.join(names)} was expected")
    for name in names:
        if name in values:
            _check_field(name, values[name])
    try:
        config = Config(**values)
    except TypeError as error:
        raise ConfigError(str(error).removeprefix("Config.__init__() ")) from None
    _check_together(config)
    return config


def _check_field(name: str, value: Any) -> None:
    if name in REAL:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{name} = {value!r}, but a finite number was expected")
    elif not (name == "window" and value is None):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} = {value!r}, but an integer was expected")
        if value < 1:
            raise ConfigError(f"{name} = {value}, but at least 1 was expected")
        if value > LARGEST.get(name, LARGEST_OTHER):
            raise ConfigError(f"{name} = {value}, but at most {LARGEST.get(name, LARGEST_OTHER)} was expected")


def _check_together(config: Config) -> None:
    if config.heads % config.kv_heads:
        raise ConfigError(
            f"kv_heads = {config.kv_heads} does not divide heads = {config.heads}: "
            "each key/value head must serve the same number of query heads"
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim = {config.head_dim} is odd, but rotary embedding turns pairs of elements")
    if config.experts_per_token > config.experts:
        raise ConfigError(
            f"experts_per_token = {config.experts_per_token} exceeds experts = {config.experts}: "
            "a token cannot choose more experts than there are"
        )
    if config.layers * config.experts > MOST_EXPERTS:
        raise ConfigError(
            f"layers = {config.layers} times experts = {config.experts} was found, but at most {MOST_EXPERTS} experts "
            "in all layers were expected"
        )
    if config.norm_eps < 0:
        raise ConfigError(f"norm_eps = {config.norm_eps!r} is negative, but it is added under a square root")
    low, high = BASES
    if not low <= config.rope_theta <= high:
        raise ConfigError(f"rope_theta = {config.rope_theta:g}, but a base from {low:g} to {high:g} was expected")
