# SPDX-License-Identifier: Apache-2.0
"""The diagnosis of a patched engine: the first name, and the rank of the right name."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.quantised_checkpoint import INT8, quantised
from refmoe.checkpoints.layout import Checkpoint
from refmoe.profiles.load import policy
from refmoe.suite import find_cases, read_case
from refmoe.traces.trace import Header, read_trace, write_trace
from refmoe.verifier.diagnosis import diagnose
from refmoe.verifier.findings import ARITHMETIC, FAIL, STRUCTURE
from refmoe.verifier.verify import verify
from tests.bugs import patched_attention, patched_experts, patched_positions, patched_router, patched_weights
from tests.bugs.patched import PATCHED, Patched
from tests.bugs.patched_names import NAMES, known_faults
from tests.bugs.shown_by import MET_SINCE
from tests.verifier.engines import GOLDEN, Arrays, captured, loaded, model_named

PARTS = (patched_attention, patched_experts, patched_positions, patched_router, patched_weights)
"""Imported because they register bugs."""

LEFT_OUT = {
    "prec-combine-lowprec": "transformers itself weighs and adds in the storage type: there is nothing to patch",
    **{
        bug: "tests.bugs.test_every_bug runs it on a golden case by itself"
        for bug in MET_SINCE
        if bug not in NAMES.values()
    },
}
"""Bugs of a forward pass that are not patched into transformers, each with the reason."""

HEALTHY = (
    "walking-skeleton", "dims-distinct", "mini-8x7b", "window-chunks", "batch-ragged", "shared-prefix",
    "positions-4096", "near-tie", "huge-embedding", "experts-12",
)  # fmt: skip
"""Cases on which transformers as it is must be given no name."""
ATTENTION = ("eager", "sdpa")


def everything() -> list[Patched]:
    """Every patched engine: the bugs of the catalogue, then the faults of the verifier's tests."""
    return [*PATCHED.values(), *known_faults()]


def elsewhere(bugs: Iterable[Patched]) -> list[Patched]:
    """The patched bugs on every other golden case that is aimed at them."""
    aimed = {folder.name: read_case(folder).bugs for folder in find_cases(GOLDEN)}
    return [
        replace(bug, model=name, called=(*bug.called, *alike(bug, name)))
        for bug in bugs
        if bug.elsewhere
        for name in aimed
        if name != bug.model and set(bug.called) & set(aimed[name])
    ]


SELF_INVERSE = ("load-qk-permute-missing", "load-sanitise-twice")
"""Cases with head_dim 4, where interleaving and its inverse are the same permutation."""


def alike(bug: Patched, name: str) -> tuple[str, ...]:
    """Other mutants that are the same function on this model."""
    if bug.name in SELF_INVERSE and model_named(name).config.head_dim == 4:
        return tuple(other for other in SELF_INVERSE if other != bug.name)
    return ()


def healthy(name: str) -> Patched:
    """Unpatched transformers."""
    return Patched(name="healthy", model=name, called=(), why="no bug is there", apply=lambda patch, model: None)


@dataclass(frozen=True)
class Naming:
    """The diagnosis of one patched engine."""

    bug: str
    model: str
    called: tuple[str, ...]
    """The right names; empty if the catalogue has no such bug."""
    kin: str
    visible: bool
    """Whether the verification fails, so that there is something to explain."""
    first: str
    """The best explanation that was considered; empty if there was none."""
    kind: str
    """`KNOWN_BUG`, `TWO_BUGS`, `STRUCTURE` or `ARITHMETIC`, of the first."""
    explains: bool
    """Whether it explains the trace: only then it is named."""
    rank: int | None
    """The rank of the best right name, from 1."""
    seconds: float
    considered: tuple[str, ...]
    """The first five: a star if it explains the trace, the checks still and newly failing, and the residual."""

    @property
    def named(self) -> str:
        """The first name; empty if none is given."""
        return self.first if self.explains else ""

    @property
    def right(self) -> bool:
        """Whether the right bug is named first; where there is none, whether no bug is named but perhaps its kin."""
        if self.called:
            return self.named in self.called
        return not self.explains or self.kind in (STRUCTURE, ARITHMETIC) or self.named == self.kin

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "named": self.named, "right": self.right, "seconds": round(self.seconds, 2)}


def dumped(bug: Patched, dtype: str, attention: str = "eager") -> Arrays:
    """The arrays that the engine with this bug writes."""
    with pytest.MonkeyPatch.context() as patch:
        bug.apply(patch, loaded(bug.model, dtype))
        return bug.dump(captured(bug.model, dtype, attention))


def checkpoint_of(bug: Patched) -> Checkpoint:
    """The model that its trace is held against."""
    right = model_named(bug.model).checkpoint
    return replace(right, parameters=quantised(right.parameters, INT8)) if bug.quantised else right


def name_it(bug: Patched, dtype: str = "bfloat16", attention: str = "eager") -> Naming:
    """Run, verify, diagnose with the whole catalogue."""
    model, rules, right = model_named(bug.model), f"hf-{dtype}{bug.rules}", checkpoint_of(bug)
    runs, used = model.runs if model.of_a_case else None, policy(rules)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.safetensors"
        write_trace(path, Header(model.runs, policy=rules), dumped(bug, dtype, attention))
        trace = read_trace(path)
        report = verify(trace, bug.model, right.config, right.parameters, runs, used)
        start = time.perf_counter()
        found = diagnose(trace, right.config, right.parameters, runs, used, report, MUTANTS.values())
        seconds = time.perf_counter() - start
    names = [each.name for each in found]
    best = min((names.index(name) + 1 for name in bug.called if name in names), default=None)
    first, kind, explains = (found[0].name, found[0].kind, found[0].explains) if found else ("", "", False)
    considered = tuple(
        f"{e.name}{'*' if e.explains else ''} {e.still_failing}+{e.newly_failing} {e.residual:.2g}" for e in found[:5]
    )
    visible = any(check.verdict == FAIL for check in report.checks)
    return Naming(
        bug=bug.name,
        model=bug.model,
        called=bug.called,
        kin=bug.kin,
        visible=visible,
        first=first,
        kind=kind,
        explains=explains,
        rank=best,
        seconds=seconds,
        considered=considered,
    )
