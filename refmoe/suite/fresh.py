# SPDX-License-Identifier: Apache-2.0
"""Fresh cases: the cases of the suite with other weights and tokens, by a seed of the user's own.

An engine that returns stored goldens passes the suite. It fails a fresh case, of which no golden is stored: the
verifier computes what it compares with from the weights, on the spot.

The weights come from the weight formula with another seed, and the case's own exponents and edits. The tokens are
renamed by a permutation of the vocabulary. So everything holds that the tokens alone make true: lengths, repetitions,
positions, equal sequences. Tokens 0, 1, 2 and the last one of the vocabulary keep their names, since they are special
in many vocabularies. So do tokens whose embedding the case edits. Conditions that depend on the values of weights may
not hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from refmoe.suite.case import Case
from refmoe.traces.script import Call, Packed

EMBEDDING = "embedding"
"""The name of the parameter whose rows belong to tokens."""
SPECIAL = (0, 1, 2)
"""Tokens that mean no token, the beginning and the end of a text in many vocabularies."""


def fresh_case(case: Case, seed: int) -> Case:
    """The case with other weights and tokens.   seed: any integer from 0; equal seeds give equal cases"""
    renamed = permutation(case, seed)
    return replace(
        case,
        seed=number(seed, case.name, "weights"),
        calls=tuple(_renamed(call, renamed) for call in case.calls),
        digest=hashlib.sha256(f"{case.digest} fresh {seed}".encode()).hexdigest(),
    )


def label(name: str, seed: int | None) -> str:
    """The name of a case in a trace: with other weights it is no golden case.   seed: None for the case itself"""
    return name if seed is None else f"{name} fresh {seed}"


def number(seed: int, *names: object) -> int:
    """An integer of 64 bits that depends on the seed and the names."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def permutation(case: Case, seed: int) -> Mapping[int, int]:
    """Per token its new name."""
    kept = fixed_tokens(case)
    free = [token for token in range(case.config.vocab) if token not in kept]
    shuffled = sorted(free, key=lambda token: number(seed, case.name, "token", token))
    return {token: token for token in kept} | dict(zip(free, shuffled, strict=True))


def fixed_tokens(case: Case) -> set[int]:
    """The tokens that keep their names: the ends of the vocabulary, and those with an edited row in the embedding."""
    fixed = {token for token in (*SPECIAL, case.config.vocab - 1) if token < case.config.vocab}
    for edit in case.edits:
        if fnmatchcase(EMBEDDING, edit["parameter"]):
            fixed |= set(_rows(edit))
    return fixed


def _rows(edit: Mapping[str, Any]) -> list[int]:
    """The rows that an edit names, as its target or as the row to copy."""
    rows = [edit[name] for name in ("row", "copy") if edit.get(name) is not None]
    return [*rows, *(row for row, _, _ in edit.get("entries", ()))]


def _renamed(call: Call | Packed, names: Mapping[int, int]) -> Call | Packed:
    if isinstance(call, Packed):
        return Packed(tuple(tuple(names[token] for token in segment) for segment in call.segments))
    return call._replace(tokens=tuple(names[token] for token in call.tokens))
