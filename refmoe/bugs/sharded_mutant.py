# SPDX-License-Identifier: Apache-2.0
"""Mutants of the sharded run on one layout. On a layout they are variations of one forward pass, like other mutants.

The function of such a mutant makes the wrong model: (config, parameters, layout) to `Model`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from refmoe.bugs.mutant import Mutant
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters
from refmoe.steps.sharded.layout import Layout

ONE_DEVICE = Layout(1, 1)


@dataclass(frozen=True)
class OnRanks(Mutant):
    """A mutant of the sharded run on one layout."""

    layout: Layout = ONE_DEVICE

    @property
    def in_one_pass(self) -> bool:
        return not self.equivalent

    def model(self, config: Config, parameters: Parameters) -> Model:
        """The sharded model of an engine with this bug. Raises InputError when the model does not fit the layout."""
        self.layout.check(config)
        made: Model = self.function(config, parameters, self.layout)
        return made


def on_ranks(mutant: Mutant, layout: Layout) -> OnRanks:
    """The mutant, which must change `PARALLEL`, on a layout."""
    return OnRanks(**{each.name: getattr(mutant, each.name) for each in fields(Mutant)}, layout=layout)
