# SPDX-License-Identifier: Apache-2.0
"""Cheats against the checks that kernels usually get, and against the contract.

    python -m bench.kernel_cheats            # writes bench/results/kernel_cheats.json

Each usual check is that of a public project: its inputs as far as they are not quantised, one call, and its comparison
of tensors. The contract has its default number of examples. The right kernel runs beside the cheats.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from refmoe.bugs.kernels.catalogue import KERNEL_BUGS
from refmoe.bugs.kernels.cheats import CHEATS, KNOWN_SEED, Cheat
from refmoe.bugs.kernels.honest import mixture, wide
from refmoe.contracts.checking import first_broken
from refmoe.kernels.contracts import LAWS
from refmoe.routers.contract import LAWS as ROUTER_LAWS
from refmoe.routers.contract import Declaration as RouterDeclaration
from refmoe.routers.contract import Subject as RouterSubject
from refmoe.testing.contracts import subject

RESULTS = Path(__file__).parent / "results" / "kernel_cheats.json"
EXPERTS, TOP_K = 8, 2
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


@dataclass(frozen=True)
class Usual:
    """The check of a public project."""

    name: str
    source: str
    words: str
    tokens: int
    hidden: int
    inner: int
    scale: tuple[float, float]
    """The standard deviations of x and of the matrices."""
    close: Callable[[torch.Tensor, torch.Tensor], None]
    """Raises AssertionError."""
    trials: int = 1
    """The number of seeds."""


def assert_close(**tolerance: float) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def close(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, **tolerance)

    return close


def by_dtype(single: dict[str, float], half: dict[str, float]) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def close(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, **(single if found.dtype == torch.float32 else half))

    return close


def most_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """FlashInfer's check_accuracy: finite, and 92.5 % of all elements close."""
    assert torch.isfinite(expected).all()
    assert torch.isfinite(found).all()
    close = torch.isclose(expected.float(), found.float(), atol=0.1, rtol=0.85)
    assert close.float().mean() >= 0.925


GITHUB = "https://github.com"
USUAL = (
    Usual(
        name="vLLM", source=f"{GITHUB}/vllm-project/vllm/blob/main/tests/kernels/moe/test_moe.py",
        words="assert_close(atol=2e-2, rtol=0); x, w ~ N(0, 1) / 10", tokens=33, hidden=128, inner=1024,
        scale=(0.1, 0.1), close=assert_close(atol=2e-2, rtol=0),
    ),
    Usual(
        name="SGLang", source=f"{GITHUB}/sgl-project/sglang/blob/main/test/registered/moe/test_fused_moe.py",
        words="assert_close(rtol=1e-1, atol=1e-2), float32 (1e-3, 1e-5); x, w ~ N(0, 0.01)", tokens=33, hidden=128,
        inner=1024, scale=(0.01, 0.01), close=by_dtype({"rtol": 1e-3, "atol": 1e-5}, {"rtol": 1e-1, "atol": 1e-2}),
    ),
    Usual(
        name="FlashInfer",
        source=f"{GITHUB}/flashinfer-ai/flashinfer/blob/main/tests/moe/trtllm_gen_fused_moe_utils.py",
        words="finite, isclose(atol=0.1, rtol=0.85) for 92.5 %; x ~ N(0, 1), w ~ N(0, 1) / sqrt(n)", tokens=33,
        hidden=128, inner=1024, scale=(1.0, 0.0), close=most_close,
    ),
    Usual(
        name="KernelBench", source=f"{GITHUB}/ScalingIntelligence/KernelBench/blob/main/src/kernelbench/eval.py",
        words="allclose(atol=rtol=1e-2), float32 1e-4; five seeds; x ~ N(0, 1), w ~ N(0, 1) / sqrt(n)", tokens=33,
        hidden=128, inner=1024, scale=(1.0, 0.0),
        close=by_dtype({"rtol": 1e-4, "atol": 1e-4}, {"rtol": 1e-2, "atol": 1e-2}), trials=5,
    ),
)  # fmt: skip


@lru_cache(maxsize=32)
def prepared(name: str, dtype: str, seed: int) -> tuple[tuple[Any, ...], Any]:
    """The arguments of a usual test, and the expected result. It is computed first, as in all four projects."""
    arguments = inputs(next(each for each in USUAL if each.name == name), DTYPES[dtype], seed)
    return arguments, mixture(*arguments)


def inputs(usual: Usual, dtype: np.dtype[Any], seed: int) -> tuple[Any, ...]:
    """x, w_gate, w_up, w_down, ids, weights of a usual test."""
    rng = np.random.default_rng(seed)
    of_x, of_w = usual.scale
    x = rng.standard_normal((usual.tokens, usual.hidden)) * of_x
    gate, up, down = (
        rng.standard_normal((EXPERTS, rows, columns)) * (of_w or columns**-0.5)
        for rows, columns in ((usual.inner, usual.hidden), (usual.inner, usual.hidden), (usual.hidden, usual.inner))
    )
    logits = rng.standard_normal((usual.tokens, EXPERTS))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = np.argsort(-logits, axis=1)[:, :TOP_K]
    weights = np.take_along_axis(shares, ids, axis=1)
    return (*(each.astype(dtype) for each in (x, gate, up, down)), ids, weights.astype(dtype))


def passes(usual: Usual, cheat: Cheat) -> bool:
    """Whether a cheat passes the usual test."""
    dtype, kernel = DTYPES[cheat.claims["dtype"]], cheat.make()
    for seed in [KNOWN_SEED] if usual.trials == 1 else range(usual.trials):
        (x, *others), expected = prepared(usual.name, cheat.claims["dtype"], seed)
        arguments = (x.copy(), *others)
        if cheat.claims.get("buffer"):
            found = np.zeros_like(expected)
            kernel(*arguments, found)
        else:
            found = kernel(*arguments)
        try:
            usual.close(tensor(found, dtype), tensor(expected, dtype))
        except AssertionError:
            return False
    return True


def tensor(values: Any, dtype: np.dtype[Any]) -> torch.Tensor:
    kind = torch.float32 if dtype == np.float32 else torch.bfloat16
    return torch.from_numpy(np.ascontiguousarray(wide(values))).to(kind)


def broken(contract: str, make: Callable[[], Any], claims: dict[str, Any]) -> tuple[str, int] | None:
    """The first law that a kernel breaks, in the order of reports, with the number of the example; None where none."""
    laws = ROUTER_LAWS if contract == "router" else LAWS[contract]
    for law in laws.values():
        kernel = make()
        tested: Any = (
            RouterSubject(kernel, RouterDeclaration(**claims))
            if contract == "router"
            else subject(contract, kernel, claims)
        )
        if law.missing(tested) is None and (found := first_broken(law, tested)) is not None:
            return law.name, found[0]
    return None


def measure(names: list[str]) -> dict[str, Any]:
    """Everything that the section of the measurements needs."""
    honest = Cheat(name="the right kernel", words="", source="", make=lambda: mixture, claims={"dtype": "bfloat16"})
    cheats = []
    for each in (honest, *CHEATS.values()):
        if names and each.name not in names:
            continue
        law = broken("moe", each.make, dict(each.claims))
        cheats.append({
            "name": each.name, "words": each.words, "source": each.source, "dtype": each.claims["dtype"],
            "passes": [usual.name for usual in USUAL if passes(usual, each)],
            "law": law and law[0], "example": law and law[1],
        })  # fmt: skip
        print(cheats[-1]["name"], cheats[-1]["passes"], law, flush=True)
    bugs = []
    for bug in KERNEL_BUGS.values():
        if names and bug.name not in names:
            continue
        law = broken(bug.contract, bug.make, dict(bug.claims))
        bugs.append({
            "name": bug.name, "source": bug.source, "date": bug.date, "contract": bug.contract,
            "law": law and law[0], "example": law and law[1],
        })  # fmt: skip
        print(bug.name, law, flush=True)
    usual = [{"name": each.name, "source": each.source, "words": each.words} for each in USUAL]
    return {"usual": usual, "cheats": cheats, "bugs": bugs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these cheats and bugs; nothing is written")
    arguments = parser.parse_args()
    found = measure(arguments.names)
    if not arguments.names:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
