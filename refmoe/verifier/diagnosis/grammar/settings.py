# SPDX-License-Identifier: Apache-2.0
"""Settings of a step with other values. A fault replaces some inputs of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.verifier.diagnosis.grammar.fault import Fault
from refmoe.verifier.diagnosis.grammar.laboratory import Laboratory
from refmoe.verifier.passes import Key

At = Callable[[Laboratory, Key], Any]
"""The value of an input at a tap. None where the fault cannot act."""


def constant(value: Any) -> At:
    """A function that gives this value at every tap."""
    return lambda lab, key: value


def setting(name: str, about: str, fix: str, bits: float, **changes: At) -> Fault:
    """The step with some inputs replaced.   changes: per input, its value at a tap; None where it cannot act"""

    def predict(lab: Laboratory, key: Key) -> Enclosure | None:
        given = lab.inputs(key)
        for each, change in changes.items():
            value = change(lab, key)
            if value is None:
                return None
            given[each] = value
        found: Enclosure = lab.compute(key, given)
        return found

    return Fault(name=name, about=about, fix=fix, bits=bits, predict=predict)
