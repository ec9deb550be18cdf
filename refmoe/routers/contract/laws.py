# SPDX-License-Identifier: Apache-2.0
"""All laws, in the order of reports. Importing a module registers its laws."""

from __future__ import annotations

from refmoe.routers.contract import selection  # isort: skip
from refmoe.routers.contract import weights  # isort: skip
from refmoe.routers.contract import symmetry  # isort: skip
from refmoe.routers.contract import special  # isort: skip
from refmoe.routers.contract import repetition  # isort: skip
from refmoe.routers.contract import capacity  # isort: skip
from refmoe.routers.contract import mixture  # isort: skip
from refmoe.routers.contract import losses  # isort: skip
from refmoe.routers.contract.law import LAWS

__all__ = ["LAWS", "capacity", "losses", "mixture", "repetition", "selection", "special", "symmetry", "weights"]
