# SPDX-License-Identifier: Apache-2.0
"""The contracts of kernels can fail: each law finds a wrong kernel, right ones pass, bugs and cheats are caught."""

from __future__ import annotations

import json
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("hypothesis")

from refmoe.bugs.kernels.catalogue import KERNEL_BUGS
from refmoe.bugs.kernels.cheats import CHEATS
from refmoe.bugs.kernels.honest import align, attend, grouped, mixture, route
from refmoe.contracts.broken import LawBroken
from refmoe.contracts.checking import check, first_broken, judge
from refmoe.contracts.drawing import examples_of
from refmoe.contracts.report import explain
from refmoe.errors import InputError
from refmoe.kernels.attention.data import Sizes as AttentionSizes
from refmoe.kernels.attention.data import dense, even, means, picked, pointing
from refmoe.kernels.attention.declaration import Declaration as AttentionDeclaration
from refmoe.kernels.contracts import LAWS
from refmoe.kernels.moe.call import exact_result
from refmoe.kernels.moe.data import Sizes, cancelling, exact_call, single_terms
from refmoe.kernels.moe.declaration import Declaration
from refmoe.kernels.plan.declaration import Declaration as PlanDeclaration
from refmoe.routers.contract import LAWS as ROUTER_LAWS
from refmoe.routers.contract import Declaration as RouterDeclaration
from refmoe.routers.contract import Subject as RouterSubject
from refmoe.testing.contracts import subject
from tests.kernels.wrong_kernels import EVERY, RIGHT

FEW = 12
"""Examples per law for right kernels in the fast tests; the slow ones use the default number."""


def found_by(contract: str, make: Any, claims: Any) -> str | None:
    """The first law that finds a kernel within its default number of examples; None where none does."""
    for law in (ROUTER_LAWS if contract == "router" else LAWS[contract]).values():
        if contract == "router":
            tested: Any = RouterSubject(make(), RouterDeclaration(**claims))
        else:
            tested = subject(contract, make(), dict(claims))
        if law.missing(tested) is None and first_broken(law, tested) is not None:
            return law.name
    return None


# ---- laws


@pytest.mark.parametrize(("contract", "name"), [(contract, name) for contract in LAWS for name in LAWS[contract]])
def test_every_law_finds_a_wrong_kernel(contract: str, name: str) -> None:
    """Within the default number of examples."""
    _, wrong = EVERY[contract][name]
    tested: Any = subject(contract, wrong.make(), dict(wrong.claims))
    assert LAWS[contract][name].missing(tested) is None
    assert first_broken(LAWS[contract][name], tested) is not None


def right(count: int | None) -> Any:
    return [
        pytest.param(contract, place, count, id=f"{contract} {place}", marks=[] if count else pytest.mark.slow)
        for contract in LAWS
        for place in range(len(RIGHT[contract]))
    ]


@pytest.mark.parametrize(("contract", "place", "count"), [*right(FEW), *right(None)])
def test_no_law_finds_a_right_kernel(contract: str, place: int, count: int | None) -> None:
    kernel = RIGHT[contract][place]
    tested: Any = subject(contract, kernel.make(), dict(kernel.claims))
    broken = [judge(law, tested, count) for law in LAWS[contract].values()]
    assert "\n\n".join(explain(each) for each in broken if each.outcome == "fail") == ""
    assert {each.outcome for each in broken} <= {"pass", "not applicable"}


def test_a_failure_has_the_smallest_example() -> None:
    verdict = judge(LAWS["moe"]["exact-sums"], subject("moe", lambda x, *_: np.zeros_like(x), {}))
    assert verdict.outcome == "fail"
    assert verdict.example is not None
    sizes = verdict.example["sizes"]
    assert (sizes.tokens, sizes.experts, sizes.top_k) == (1, 1, 1)
    assert "'tokens': 1" in explain(verdict)


# ---- public bugs and cheats


def test_there_are_enough_bugs_and_each_is_dated_and_sourced() -> None:
    assert len(KERNEL_BUGS) >= 25
    assert len({(bug.source, bug.name) for bug in KERNEL_BUGS.values()}) == len(KERNEL_BUGS)
    for bug in KERNEL_BUGS.values():
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", bug.source), bug.name
        assert re.fullmatch(r"20\d\d-[01]\d-[0-3]\d", bug.date), bug.name


@pytest.mark.parametrize("name", KERNEL_BUGS)
def test_every_public_bug_is_caught(name: str) -> None:
    """By the default number of examples."""
    bug = KERNEL_BUGS[name]
    assert found_by(bug.contract, bug.make, bug.claims) is not None


@pytest.mark.parametrize("name", CHEATS)
def test_every_cheat_is_caught(name: str) -> None:
    """By the default number of examples."""
    assert len(CHEATS) >= 15
    assert found_by("moe", CHEATS[name].make, CHEATS[name].claims) is not None


def test_the_router_that_the_bugs_change_is_right() -> None:
    tested = RouterSubject(route, RouterDeclaration(experts=8, top_k=2, ties="lower", selection="logits"))
    assert [
        name for name, law in ROUTER_LAWS.items() if law.missing(tested) is None and first_broken(law, tested, FEW)
    ] == []


# ---- layouts and frameworks


def torch_mixture(x: Any, w_gate_up: Any, w_down: Any, ids: Any, weights: Any) -> Any:
    """A kernel as one writes it with PyTorch: [E, D, 2 F] interleaved, up first."""
    import torch

    out = torch.zeros(x.shape, dtype=torch.float32)
    for number in torch.unique(ids).tolist():
        tokens, slots = torch.nonzero(ids == number, as_tuple=True)
        both = x[tokens].float() @ w_gate_up[number].float()
        up, gate = both[:, ::2], both[:, 1::2]
        hidden = (torch.nn.functional.silu(gate) * up).to(x.dtype)
        out.index_add_(0, tokens, weights[tokens, slots, None].float() * (hidden.float() @ w_down[number].float()))
    return out.to(x.dtype)


def jax_mixture(x: Any, w_gate: Any, w_up: Any, w_down: Any, ids: Any, weights: Any) -> Any:
    """A dense kernel with JAX."""
    import jax.numpy as jnp

    wide = lambda each: each.astype(jnp.float32)  # noqa: E731
    gate, up = (jnp.einsum("td,efd->etf", wide(x), wide(each)) for each in (w_gate, w_up))
    each = jnp.einsum("etf,edf->etd", gate / (1 + jnp.exp(-gate)) * up, wide(w_down))
    total = jnp.zeros(x.shape, jnp.float32)
    for number in range(w_gate.shape[0]):
        share = jnp.where(ids == number, weights, 0).sum(axis=1, keepdims=True)
        total = total + jnp.where(share != 0, share * each[number], 0)
    return total.astype(x.dtype)


def into_a_buffer(x: Any, w_gate: Any, w_up: Any, w_down: Any, ids: Any, weights: Any, out: Any) -> None:
    out[...] = mixture(x, w_gate, w_up, w_down, ids, weights)


def transposed_halves(x: Any, w_gate_up: Any, w_down: Any, ids: Any, weights: Any) -> Any:
    half = w_gate_up.shape[2] // 2
    gate, up = (each.transpose(0, 2, 1) for each in (w_gate_up[..., :half], w_gate_up[..., half:]))
    return mixture(x, gate, up, w_down.transpose(0, 2, 1), ids, weights)


LAYOUTS = {
    "torch, interleaved, up first": (
        torch_mixture,
        {"framework": "torch", "dtype": "bfloat16", "fused": "interleaved", "gate_first": False, "transposed": True},
    ),
    "jax": (jax_mixture, {"framework": "jax", "strided": False, "nan": "unspecified", "most_experts": 8}),
    "a buffer": (into_a_buffer, {"buffer": True, "ids_dtype": "int32"}),
    "halves, transposed": (transposed_halves, {"fused": "halves", "transposed": True}),
    "offsets": (grouped, {"routing": "offsets", "dtype": "float16"}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "jax")) for name in LAYOUTS])
def test_a_right_kernel_of_any_layout_passes(name: str) -> None:
    kernel, claims = LAYOUTS[name]
    for library in ("torch", "jax"):
        if name.startswith(library):
            pytest.importorskip(library)
    tested: Any = subject("moe", kernel, dict(claims))
    count = 4 if name == "jax" else FEW
    broken = [judge(law, tested, count) for law in LAWS["moe"].values()]
    assert "\n\n".join(explain(each) for each in broken if each.outcome == "fail") == ""


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("histogram", lambda ids, experts: np.bincount(ids.reshape(-1), minlength=experts)),
        (
            "offsets",
            lambda ids, experts: np.concatenate([[0], np.cumsum(np.bincount(ids.reshape(-1), minlength=experts))]),
        ),
        (
            "permutation",
            lambda ids, experts: (
                np.argsort(ids.reshape(-1), kind="stable"),
                np.concatenate([[0], np.cumsum(np.bincount(ids.reshape(-1), minlength=experts))]),
            ),
        ),
    ],
)
def test_a_right_plan_of_any_kind_passes(kind: str, plan: Any) -> None:
    tested: Any = subject("plan", plan, {"kind": kind})
    broken = [judge(law, tested, FEW) for law in LAWS["plan"].values()]
    assert "\n\n".join(explain(each) for each in broken if each.outcome == "fail") == ""


# ---- the data


def small_sizes() -> list[Sizes]:
    return [example["sizes"] for example in examples_of(LAWS["moe"]["exact-sums"], Declaration(), 60)]


def test_exact_data_have_8_bits_in_every_partial_sum() -> None:
    """The sum of the sizes of all terms bounds every partial sum in every order."""
    for sizes in small_sizes():
        call = exact_call(sizes)
        arrays = (call.x, call.w_gate, call.w_up, call.w_down, call.weights)
        for dtype in (np.float16, ml_dtypes.bfloat16):
            assert all((each.astype(dtype).astype(np.float64) == each).all() for each in arrays)
        x = np.abs(call.x)
        assert (x @ np.abs(call.w_gate).reshape(-1, x.shape[1]).T <= 2 * 1024).all()
        assert (x @ np.abs(call.w_up).reshape(-1, x.shape[1]).T <= 2).all()
        assert (np.abs(call.w_down).sum(axis=2) * 1024 * 4 <= 8).all()  # what is between is at most 4 * 1024
        assert (call.weights.sum(axis=1) * 8 / 0.5 <= 256).all()


def test_the_results_of_exact_data_are_those_of_the_formula_in_higher_precision() -> None:
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.prec = 2000
    for sizes in small_sizes()[:6]:
        for call in (exact_call(sizes), single_terms(sizes, Declaration())):
            found = exact_result(call)
            token, column = sizes.seed % sizes.tokens, sizes.seed % sizes.hidden
            total = mpmath.mpf(0)
            for slot, number in enumerate(call.ids[token]):
                for inner in range(sizes.inner):
                    gate = mpmath.fsum(map(mpmath.mpf, call.x[token] * call.w_gate[number, inner]))
                    up = mpmath.fsum(map(mpmath.mpf, call.x[token] * call.w_up[number, inner]))
                    silu = gate / (1 + mpmath.exp(-gate))
                    total += call.weights[token, slot] * call.w_down[number, column, inner] * silu * up
            assert abs(total - found[token, column]) < mpmath.mpf(2) ** -1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_cancelling_sums_are_exact_in_the_declared_format_and_not_in_narrower_ones(dtype: Any) -> None:
    d = Declaration(dtype=dtype)
    call = cancelling(Sizes(tokens=1, experts=1, top_k=1, hidden=5, inner=5), d)
    assert (exact_result(call) == 1).all()
    largest = np.abs(call.w_up).max()
    assert largest + 1 == np.asarray(largest + 1, d.sums.dtype)
    assert largest + 1 != float(np.asarray(largest + 1, ml_dtypes.bfloat16))


def test_queries_that_point_have_the_value_of_their_key_and_others_the_mean() -> None:
    d = AttentionDeclaration(window=6)
    sizes = AttentionSizes(sequences=3, groups=2, sharing=2, width=16, page=4, longest=13, seed=5)
    for make, expected in ((pointing, picked), (even, means)):
        given = make(sizes, d)
        right = expected(given, 2) if expected is picked else expected(given, 2, d)  # type: ignore[call-arg]
        for s, head in np.ndindex(*given.targets.shape):
            seen = slice(d.first(len(given.keys[s])), None)
            scores = given.keys[s][seen, head // 2] @ given.q[s, head] * 16**-0.5
            shares = np.exp(scores - scores.max())
            value = (shares / shares.sum()) @ given.values[s][seen, head // 2]
            np.testing.assert_allclose(value, right[s, head], rtol=0, atol=1e-12)
    assert dense(sizes, d).q.shape == (3, 4, 16)


# ---- what cannot be


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Declaration(dtype="float8"), "dtype is 'float8', one of float64"),
        (lambda: Declaration(multiple=0), "multiple is 0, at least 1"),
        (lambda: Declaration(least_tokens=9, most_tokens=4), "least_tokens is 9 and most_tokens is 4"),
        (lambda: Declaration(routing="offsets", padding=True), "offsets have no expert_map and no padding"),
        (lambda: Declaration(framework="jax"), "strided is claimed, but arrays of jax"),
        (lambda: PlanDeclaration(kind="tree"), "kind is 'tree', one of blocks"),
        (lambda: AttentionDeclaration(window=0), "window is 0, at least 1"),
        (lambda: AttentionDeclaration(scale=-1.0), "scale is -1.0, a number above 0"),
        (lambda: subject("moe", mixture, {"colour": 1}), "has no claim 'colour', one of dtype"),
        (lambda: subject("moe", mixture, {"policy": "none-such"}), "none-such"),
    ],
)
def test_a_claim_that_cannot_be_gets_one_sentence(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x, *_: None, "the result is no array"),
        (lambda x, *_: x[:, :0], "found shape"),
        (lambda x, *_: x.astype(int), "floating-point numbers were expected"),
        (lambda x, *_: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_a_result_of_another_form_is_told(answer: Any, words: str) -> None:
    for contract, law in (("moe", "form"), ("attention", "form")):
        tested = subject(contract, answer, {})
        example = examples_of(LAWS[contract][law], tested.declaration, 3)[-1]
        with pytest.raises(LawBroken, match=words):
            check(LAWS[contract][law], tested, example)


def test_a_verdict_is_json() -> None:
    from refmoe.contracts.report import as_data

    verdict = judge(LAWS["attention"]["picks-a-key"], subject("attention", lambda q, *_: q, {}), 5)
    assert json.loads(json.dumps(as_data(verdict)))["example"]["sizes"]["sequences"] == 1
    assert judge(LAWS["plan"]["form"], subject("plan", align, {}), 2).outcome == "pass"
    assert judge(LAWS["attention"]["form"], subject("attention", attend, {}), 2).outcome == "pass"
