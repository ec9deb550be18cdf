# SPDX-License-Identifier: Apache-2.0
"""The power of a server's evidence: of the known bugs, those that are seen by what it gives.

The table ``power.json`` beside this file is measured by ``python -m bench.server_power``. Each known bug is a server of
its own, which is asked about the model of `served`. A bug that this model does not show at all is unseen at each level.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from refmoe.arithmetic.formats import FLOAT32
from refmoe.engines.server.interview import PROMPT, Answers
from refmoe.engines.server.replies import Row
from refmoe.files.parsing import strict_json
from refmoe.files.reading import own_text
from refmoe.profiles.policy import Policy
from refmoe.verifier.findings import Power

FORMAT_VERSION = "1"
TABLE = "power.json"
FEW = 5
"""The entries of a row at the second level."""

TOKENS, LARGEST, PROMPTS, WHOLE = LEVELS = (
    "tokens alone",
    f"tokens and the {FEW} largest entries of each row",
    "tokens and whole distributions of prompts",
    "tokens and whole distributions",
)
"""All that a server may give, the least first."""
CONTAINED: Mapping[str, tuple[str, ...]] = {
    TOKENS: (), LARGEST: (TOKENS,), PROMPTS: (TOKENS,), WHOLE: (TOKENS, LARGEST, PROMPTS),
}  # fmt: skip
"""Per level those that it contains. It sees what they see."""


def level_of(answers: Answers, vocab: int) -> str:
    """The level of what a server has given."""
    prompts = [row for said in answers.said if said.way == PROMPT for row in said.rows.values()]
    others = [row for said in answers.said if said.way != PROMPT for row in said.rows.values()]
    if others and _least(others) >= vocab:
        return WHOLE
    if prompts and not others and _least(prompts) >= vocab:
        return PROMPTS
    return LARGEST if others and _least(others) >= min(FEW, vocab) else TOKENS


def _least(rows: list[Row]) -> int:
    return min(len(row.ids) for row in rows)


@cache
def table() -> dict[str, Any]:
    """The table of the package: per dtype the ids that are ``known``, and per level and dtype those ``seen``."""
    document: dict[str, Any] = strict_json(own_text("refmoe.engines.server", TABLE))
    assert document["format_version"] == FORMAT_VERSION
    return document


def power_of(level: str, policy: Policy) -> Power:
    """The power that was measured at a level, at the dtype of a policy."""
    dtype = policy.storage.name if not policy.storage.holds(FLOAT32) else FLOAT32.name
    known = table()["known"][dtype]
    seen = table()["seen"][level][dtype]
    return Power(
        taps=level,
        dtype=dtype,
        seen=len(seen),
        known=len(known),
        unseen=tuple(each for each in known if each not in seen),
    )
