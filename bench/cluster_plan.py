# SPDX-License-Identifier: Apache-2.0
"""A plan for verifying 8x7B as a whole on several machines, simulated from rates that one machine was measured at.

A trace with all taps has the input of each layer, so that layers do not wait for each other. A layer is one piece of
work, as with `refmoe verify --executor dask:ADDRESS`. Each machine reads the weights of its layers from a disk of its
own, and judges a layer while it reads the next. It gets the taps of its layers, and returns a few kilobytes. The last
machine has the head as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from refmoe.checkpoints.names import parameter_shapes
from refmoe.jobs.estimate import estimate
from refmoe.spec.config import Config
from refmoe.traces.script import Call, plan

BFLOAT16 = 2
"""Bytes of a stored weight."""


@dataclass(frozen=True)
class Rates:
    """What one machine was measured at."""

    disk: float
    """Bytes of weights read from the disk in a second."""
    judged: float
    """Bytes of weights that a verdict on a few tokens takes in a second, where the files are in memory."""


@dataclass(frozen=True)
class Planned:
    """A verification on several machines."""

    machines: int
    layers: int
    """The layers of the machine that has most."""
    read: int
    """Bytes of weights that this machine reads."""
    moved: int
    """Bytes of the trace that this machine gets."""
    seconds: float
    """Until the last machine is done."""


def layer_bytes(config: Config) -> int:
    """Bytes of the weights of a layer in bfloat16, all experts among them."""
    head = sum(_size(config, name) for name in ("embedding", "final_norm", "output"))
    return (sum(_size(config, name) for name in parameter_shapes(config)) - head) // config.layers


def head_bytes(config: Config) -> int:
    """Bytes of the last norm and the output matrix in bfloat16."""
    return _size(config, "final_norm") + _size(config, "output")


def _size(config: Config, name: str) -> int:
    size = BFLOAT16
    for n in parameter_shapes(config)[name]:
        size *= n
    return size


def trace_bytes(config: Config, tokens: int) -> int:
    """Bytes of all taps of a layer in float32, for a prefill, and of the layer's input."""
    runs = plan([Call("prefill", 0, (0,) * tokens)], config.vocab)
    return estimate(config, runs, range(1, 2), "float32").trace + 4 * tokens * config.dim


def planned(config: Config, tokens: int, machines: int, rates: Rates) -> Planned:
    """The plan for some machines. Layers are dealt evenly; the machine with the head has the most of them."""
    layers = -(-config.layers // machines)
    read = layers * layer_bytes(config) + head_bytes(config)
    return Planned(
        machines=machines,
        layers=layers,
        read=read,
        moved=layers * trace_bytes(config, tokens),
        seconds=read / min(rates.disk, rates.judged),
    )


def plans(config: Config, tokens: int, rates: Rates, machines: Sequence[int] = (1, 2, 4, 8, 16, 32)) -> list[Planned]:
    """A plan for each number of machines."""
    return [planned(config, tokens, each, rates) for each in machines]
