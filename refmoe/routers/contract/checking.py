# SPDX-License-Identifier: Apache-2.0
"""All laws, or some of them, on one router."""

from __future__ import annotations

from collections.abc import Iterable

from refmoe.contracts.checking import Verdict, judge
from refmoe.routers.contract.laws import LAWS
from refmoe.routers.contract.subject import Subject


def judge_all(subject: Subject, count: int | None = None, only: Iterable[str] = ()) -> list[Verdict]:
    """Check every law, or those named.   count: of examples for each; that of the contract if not given"""
    return [judge(LAWS[name], subject, count) for name in (list(only) or list(LAWS))]
