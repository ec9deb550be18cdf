# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of servers: ask a server on this machine few questions, and judge it."""

from __future__ import annotations

from functools import cache

from refmoe.engines.server.asking import Address, Client
from refmoe.engines.server.judging import Model
from refmoe.engines.server.served import served_case
from refmoe.engines.server.verdict import Asking, Verdict, examine
from refmoe.profiles.load import policy
from tests.engines.server.fake import Answer, Spoil, serving

LENGTHS = (6, 4, 3)
COUNT = 5
LIMIT = 60.0
"""Seconds for a request that must succeed, even on a busy machine."""


@cache
def model(dtype: str = "float32") -> Model:
    """The model for servers, judged by the policy of a dtype."""
    case = served_case()
    return Model("case served", case.config, case.checkpoint().parameters, policy(dtype))


def asked(
    answer: Answer, spoil: Spoil = lambda *_: False, *, limit: float = LIMIT, dtype: str = "float32",
    diagnose: bool = False, wanted: str | None = None,
) -> Verdict:  # fmt: skip
    """The verdict on a fake server."""
    with serving(answer, spoil) as url:
        asking = Asking(
            Client(Address(url), limit), wanted=wanted, diagnose=diagnose, lengths=LENGTHS, count=COUNT
        )  # fmt: skip
        return examine(asking, model(dtype), lambda _: policy(dtype))
