# SPDX-License-Identifier: Apache-2.0
"""The contract of routers: laws by which anybody's router can be tested.

    from refmoe.routers.contract import Declaration, contract

    TestMyRouter = contract(my_router, Declaration(experts=8, top_k=2))

`docs/router-contract.md` is the manual. A `Declaration` states the claims of a router, and a `Subject` calls the
router. `judge` checks one law of `LAWS` and returns a `Verdict`. `contract` makes a pytest class of all laws.

The names are imported when they are first used, as pytest loads this package's plugin in every run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refmoe.contracts.checking import Verdict, judge
    from refmoe.routers.contract.arithmetic import ExpBudget
    from refmoe.routers.contract.checking import judge_all
    from refmoe.routers.contract.declaration import Declaration
    from refmoe.routers.contract.laws import LAWS
    from refmoe.routers.contract.pytest_items import contract
    from refmoe.routers.contract.subject import Subject

__all__ = ["LAWS", "Declaration", "ExpBudget", "Subject", "Verdict", "contract", "judge", "judge_all"]

_HOMES = {
    "Declaration": f"{__name__}.declaration",
    "ExpBudget": f"{__name__}.arithmetic",
    "LAWS": f"{__name__}.laws",
    "Subject": f"{__name__}.subject",
    "Verdict": "refmoe.contracts.checking",
    "contract": f"{__name__}.pytest_items",
    "judge": "refmoe.contracts.checking",
    "judge_all": f"{__name__}.checking",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
