"""All laws, in the order in which they are reported: importing a module registers its laws."""

from __future__ import annotations

from refmoe.routing.contract import selection  # isort: skip
from refmoe.routing.contract import weights  # isort: skip
from refmoe.routing.contract import symmetry  # isort: skip
from refmoe.routing.contract import special  # isort: skip
from refmoe.routing.contract import repetition  # isort: skip
from refmoe.routing.contract import capacity  # isort: skip
from refmoe.routing.contract import mixture  # isort: skip
from refmoe.routing.contract import losses  # isort: skip
from refmoe.routing.contract.law import LAWS

__all__ = ["LAWS", "capacity", "losses", "mixture", "repetition", "selection", "special", "symmetry", "weights"]
