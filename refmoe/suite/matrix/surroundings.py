# SPDX-License-Identifier: Apache-2.0
"""Mutants of tokenizer, sampler and loss: each is held against the vectors of its kind, or against a law of generation.

They cost little beside a forward pass, so all of them are judged each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.generation_session import Session, unchanged_by_router_logits
from refmoe.bugs.mutant import LOSS, SAMPLER, TOKENIZER
from refmoe.bugs.vector_checks import Sampler, Text, read_vectors, wrong
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.errors import InputError
from refmoe.files.reading import read_bytes
from refmoe.routers.literature.losses import load_balancing_loss
from refmoe.spec.config import Config
from refmoe.spec.model import Model
from refmoe.text.tokenizer import Tokenizer

Outside = dict[str, dict[str, list[str]]]
"""Per mutant and file of vectors, the names of the vectors that it gets wrong. A law counts as a file."""

FILES = {
    TOKENIZER: ("tokenizer-v1.json", "tokenizer-v3.json"), SAMPLER: ("sampler.json",), LOSS: ("losses.json",),
}  # fmt: skip
"""The files of vectors for a mutant, by the part that it changes."""
RIGHT: Mapping[str, Callable[..., Any]] = {TOKENIZER: Text, SAMPLER: Sampler, LOSS: load_balancing_loss}
"""The right implementation of each part."""
LAW = "generation"
"""The law of `refmoe.bugs.generation_session`, for bugs that put a right value in a wrong place."""
UNCHANGED = "router-logits-change-no-token"

SMALL = Config(
    dim=16, layers=2, heads=4, kv_heads=2, head_dim=8, hidden_dim=24, vocab=32, experts=5, experts_per_token=2
)
PROMPT = (3, 1, 4)
NEW_TOKENS = 4


def outside() -> tuple[str, ...]:
    """The ids of the mutants that are judged here."""
    return tuple(each.id for each in MUTANTS.values() if each.changes in FILES and not each.equivalent)


def judge_outside(golden: Path) -> Outside:
    """The vectors that each mutant gets wrong. The name ``-`` stands for the specification, which should have none.

    Raises InputError for a file of vectors, or its vocabulary, that is missing or not the right one.
    """
    found: Outside = {}
    for changes, names in FILES.items():
        tried: list[tuple[str, Callable[..., Any]]] = [("-", RIGHT[changes])]
        tried += [(name, MUTANTS[name].function) for name in outside() if MUTANTS[name].changes == changes]
        for name in names:
            content = read_vectors(golden / "vectors" / name)
            vocabulary = read_vocabulary(content, golden / "vectors" / name) if changes == TOKENIZER else None
            for mutant, function in tried:
                if not is_session(function):
                    _note(found, mutant, f"vectors/{name}", wrong(built(function, changes, vocabulary), content))
        for mutant, function in tried:
            if is_session(function):
                _note(found, mutant, LAW, broken_laws(function))
    _note(found, "-", LAW, broken_laws(Session))
    return found


def _note(found: Outside, mutant: str, where: str, names: list[str]) -> None:
    if names:
        found.setdefault(mutant, {})[where] = names


def is_session(function: Callable[..., Any]) -> bool:
    """Whether a function is a generation session, to be held against a law, and not an answer to vectors."""
    return isinstance(function, type) and issubclass(function, Session)


def built(function: Any, changes: str, vocabulary: Tokenizer | None) -> Any:
    """An implementation in the form that `wrong` takes: a tokenizer is built over a vocabulary."""
    if changes == TOKENIZER:
        return function.over(vocabulary)
    return function() if changes == SAMPLER else function


def broken_laws(session: Any) -> list[str]:
    """The laws of generation that a session breaks, on a small model."""
    model = Model(SMALL, synthetic_checkpoint(SMALL, seed=1).parameters)
    return [] if unchanged_by_router_logits(session, model, PROMPT, NEW_TOKENS) else [UNCHANGED]


def read_vocabulary(content: Mapping[str, Any], path: Path) -> Tokenizer:
    """The vocabulary of a file of vectors, which mistral-common ships.   path: of that file, for messages"""
    package = find_spec("mistral_common")
    if package is None or package.origin is None:
        raise InputError(
            "judging tokenizers needs the vocabularies in the package 'mistral-common', which is not installed: "
            "pip install 'refmoe[test]'"
        )
    about = content["tokenizer"]
    file = Path(package.origin).parent / "data" / about["file"]
    found = hashlib.sha256(read_bytes(file, "a file of vectors")).hexdigest() if file.exists() else "missing"
    if found != about["sha256"]:
        raise InputError(f"{file}: is {found}, but {about['sha256']} was expected, the vocabulary that {path} is over")
    return Tokenizer.load(file)
