# SPDX-License-Identifier: Apache-2.0
"""The contract can fail: every mutant is killed, every law has a mutant of its own, and correct routers pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refmoe.arithmetic.ball import BallOps
from refmoe.contracts.drawing import BLOCK_COUNTS, examples_of
from refmoe.contracts.formats import FORMATS, neighbour
from refmoe.contracts.frameworks import to_framework, to_numpy
from refmoe.contracts.report import explain
from refmoe.errors import InputError
from refmoe.routers.contract import LAWS, Declaration, Subject, judge, judge_all
from refmoe.routers.contract.bounds import keys, weight_enclosure
from refmoe.routers.contract.subject import Routing
from tests.routers.router_mutants import (
    BASE,
    EXAMPLES,
    HONEST,
    MUTANTS,
    honest,
    honest_other,
    row,
    softmax,
    table,
    tie_high,
)

ROUTER_BUGS = {
    "router-no-renorm", "router-raw-logit-weights", "router-double-softmax", "router-renorm-wrong-axis",
    "router-softmax-over-tokens", "router-lowprec-logits", "router-tie-break-high-index", "router-bias-in-weights",
    "router-wrong-k", "router-jitter-at-eval", "router-jitter-leaks-to-experts", "router-weights-order-mismatch",
    "router-index-off-by-one", "router-input-unnormalised",
}  # fmt: skip
"""All known bugs of the class `router`."""


# --- mutants


@pytest.mark.parametrize("count", [80, pytest.param(EXAMPLES, marks=pytest.mark.slow)])
def test_every_mutant_is_killed_and_every_law_has_one_of_its_own(count: int) -> None:
    """Each mutant dies within 80 examples, or 30 if many laws kill it; the slow test uses 200. -s prints the table."""
    rows = [row(mutant, count if mutant.only or count == EXAMPLES else 30) for mutant in MUTANTS]
    print("\n" + table(rows))
    assert [each.mutant.name for each in rows if not each.kills] == []
    assert {each.mutant.name: list(each.kills) for each in rows if each.mutant.only and len(each.kills) > 1} == {}
    alone = {next(iter(each.kills)) for each in rows if each.mutant.only and list(each.kills) == [each.mutant.only]}
    assert set(LAWS) - alone == set()


def test_the_mutants_cover_the_bugs_of_the_field() -> None:
    assert len(MUTANTS) >= 25
    assert ROUTER_BUGS - {mutant.source for mutant in MUTANTS} == set()


@pytest.mark.parametrize("name", HONEST)
def test_without_the_mistake_every_law_passes(name: str) -> None:
    broken = [v for v in judge_all(HONEST[name], 50) if v.outcome not in ("pass", "not applicable")]
    assert "\n\n".join(map(explain, broken)) == ""


def test_a_bfloat16_router_that_declares_float32_is_found_out() -> None:
    """The router passes under its true declaration."""

    def router(x: Any) -> Any:
        ids, weights = honest(x.astype(ml_dtypes.bfloat16).astype(np.float32))
        return ids, weights.astype(ml_dtypes.bfloat16)

    assert judge(LAWS["weight-values"], Subject(router, replace(BASE, selection="scores"))).outcome == "fail"
    true = replace(BASE, selection="scores", arithmetic="bfloat16")
    for name in ("weight-values", "near-ties", "weights-are-shares", "falling-order"):
        assert judge(LAWS[name], Subject(router, true)).outcome == "pass", name


# --- verdicts in words


def test_a_failure_prints_the_law_and_the_smallest_example() -> None:
    text = explain(judge(LAWS["tie-rule"], Subject(tie_high, BASE)))
    assert text == (
        "FAIL  tie-rule   token 0 of 1\n"
        "      law     Of equal logits the declared id, lower or higher, is chosen, and comes first if the ids are in "
        "order.\n"
        "      source  ROUTE-3\n"
        "      found   found ids [7, 6], expected [0, 1] by the declared rule 'lower'; ties declared 'lower': of equal "
        "logits\n"
        "              it seems to choose the higher id\n"
        "      logits = [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]"
    )


@pytest.mark.parametrize(("router", "rule"), [(honest, "the lower id"), (tie_high, "the higher id")])
def test_an_undeclared_tie_rule_is_told(router: Any, rule: str) -> None:
    verdict = judge(LAWS["tie-rule"], Subject(router, replace(BASE, ties="unspecified")))
    assert verdict.outcome == "pass"
    assert verdict.words == f"ties declared 'unspecified': of equal logits it seems to choose {rule}"


def test_other_laws_do_not_mind_a_broken_tie_rule() -> None:
    failed = [v.law.name for v in judge_all(Subject(tie_high, BASE), 50) if v.outcome not in ("pass", "not applicable")]
    assert failed == ["tie-rule"]


def test_where_there_are_no_ids_the_other_laws_are_not_judged() -> None:
    verdicts = judge_all(Subject(lambda x: (honest(x)[0].astype(float), honest(x)[1]), BASE), 5)
    outcomes = {verdict.law.name: verdict.outcome for verdict in verdicts}
    assert outcomes.pop("distinct-ids") == "fail"
    assert outcomes.pop("input-untouched") == "pass"
    assert set(outcomes.values()) == {"not judged", "not applicable"}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "found NoneType, a pair (ids, weights) was expected"),
        (lambda x: (honest(x)[0][:, :1], honest(x)[1]), "found ids of shape [1, 1], [1, 2] was expected"),
        (lambda x: (honest(x)[0] + 8, honest(x)[1]), "ids in 0 .. 7 were expected"),
        (lambda x: (honest(x)[0] * 0, honest(x)[1]), "found ids [0, 0], distinct ids were expected"),
        (lambda x: (["a"], ["b"]), "the result is no pair of arrays"),
        (lambda x: 1 / 0, "the router raised ZeroDivisionError on 1 tokens: division by zero"),
    ],
)
def test_what_is_no_routing(answer: Any, words: str) -> None:
    router = answer if callable(answer) else lambda x: answer
    verdict = judge(LAWS["distinct-ids"], Subject(router, BASE), 5)
    assert verdict.outcome == "fail"
    assert words in verdict.words


@pytest.mark.parametrize("field", ["nan", "infinity", "all_masked"])
def test_a_router_that_raises(field: str) -> None:
    """Raising is right if it is declared. Otherwise a law fails and names the exception."""

    def careful(x: Any) -> Any:
        if not np.isfinite(x).all():
            raise ValueError("not finite")
        return honest(x)

    law = LAWS[field.replace("_", "-")]
    raises: Any = {field: "raise"}
    assert judge(law, Subject(careful, replace(BASE, **raises)), 20).outcome == "pass"
    verdict = judge(law, Subject(careful, BASE), 20)
    assert (verdict.outcome, "ValueError" in verdict.words) == ("fail", True)
    assert judge(law, Subject(honest, replace(BASE, **raises)), 20).outcome == "fail"
    unspecified: Any = {field: "unspecified"}
    assert judge(law, Subject(honest, replace(BASE, **unspecified)), 20).outcome == "not applicable"


def test_a_router_that_is_not_deterministic_is_shrunk_all_the_same() -> None:
    rng = np.random.default_rng(0)

    def router(x: Any) -> Any:
        ids, weights = honest(x)
        return ids, weights * np.float32(rng.choice([1.0, 1.5]))

    verdict = judge(LAWS["weight-values"], Subject(router, BASE), 20)
    assert (verdict.outcome, verdict.example is not None) == ("fail", True)


# --- examples and arithmetic


def test_examples_are_numbers_of_the_format_and_of_every_kind() -> None:
    for name, form in FORMATS.items():
        declared = Declaration(experts=8, top_k=2, dtype=name)  # type: ignore[arg-type]
        drawn = [example["logits"] for example in examples_of(LAWS["weight-values"], declared, 200)]
        values = np.concatenate([logits.reshape(-1) for logits in drawn])
        assert (values.astype(form.dtype).astype(np.float64) == values).all()
        assert values.max() == form.largest
        assert np.abs(values[values != 0]).min() == form.smallest_subnormal
        rows = np.sort(np.concatenate(drawn), axis=1)
        assert (rows[:, 1:] == rows[:, :-1]).any()  # ties
        assert ((rows[:, 1:] > rows[:, :-1]) & (neighbour(rows[:, :-1], 1, form) == rows[:, 1:])).any()
    counts = {example["tokens"] for example in examples_of(LAWS["batch-size"], BASE, 200)}
    assert counts == set(BLOCK_COUNTS)


def test_skewed_loads_empty_and_full_experts() -> None:
    """The loads for dispatch include all tokens on one set of experts, and nearly even loads."""
    loads = [
        np.bincount(e["order"][:, :2].reshape(-1), minlength=8)
        for e in examples_of(LAWS["dispatch-combine"], BASE, 200)
    ]
    large = [load for load in loads if load.sum() > 60]
    assert any((load > 0).sum() == 2 for load in large)
    assert any((load > 0).all() for load in large)
    assert any(load.max() == load.sum() / 2 and (load > 0).sum() > 2 for load in large)


@pytest.mark.parametrize("name", FORMATS)
def test_neighbours(name: str) -> None:
    form = FORMATS[name]
    top, least = form.largest, form.smallest_subnormal
    assert neighbour([0.0, least, -least, top], [1, -1, 1, 1], form).tolist() == [least, 0.0, 0.0, top]
    assert neighbour([1.0, 1.0], [1, -1], form).tolist() == [1 + 2 * form.unit, 1 - form.unit]
    assert neighbour([0.0], [-2], form).tolist() == [-2 * least]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalised", [True, False])
def test_enclosures_hold_the_real_numbers_and_little_else(scoring: Any, normalised: bool) -> None:
    """BOUND-1 to BOUND-5 against Arb. A value 64 units away is outside, at float64 and at bfloat16."""
    balls = BallOps()
    rng = np.random.default_rng(5)
    logits = np.round(rng.uniform(-4, 4, (20, 6)) * 64) / 64
    ids = np.argsort(-logits, axis=1)[:, :3]
    exact = balls.array(logits)
    parts = balls.exp(exact) if scoring == "softmax" else balls.sigmoid(exact)
    chosen = balls.gather(parts, ids)
    if normalised:
        chosen = chosen / balls.sum(chosen, axis=-1)[:, None]
    elif scoring == "softmax":
        chosen = chosen / balls.sum(parts, axis=-1)[:, None]
    real = np.vectorize(float)(np.vectorize(lambda ball: ball.mid())(chosen))
    for dtype in ("float64", "float32"):
        declared = Declaration(experts=6, top_k=3, scoring=scoring, normalised=normalised, dtype=dtype)  # type: ignore[arg-type]
        found = weight_enclosure(declared, Routing(logits, logits * 0, ids, real))
        assert found is not None
        assert ((found.low < real) & (real < found.high)).all()
        assert (found.width < 200 * FORMATS[dtype].unit * real).all()
        for side in (found.low, found.high):
            assert (np.abs(side - real) > 10 * FORMATS[dtype].unit * real).all()


def test_float32_routers_fill_a_tenth_of_the_enclosure_or_more() -> None:
    """The bound is tight: NumPy's float32 softmax uses a few per cent to a half of it."""
    rng = np.random.default_rng(6)
    logits = rng.uniform(-8, 8, (4000, 8)).astype(np.float32)
    ids, weights = honest(logits)
    wide = logits.astype(np.float64)
    found = weight_enclosure(BASE, Routing(wide, wide * 0, ids, weights.astype(np.float64)))
    assert found is not None
    used = np.abs(weights - found.middle) / (found.width / 2)
    assert 0.02 < used.max() < 0.5


def test_decisions_that_scores_cannot_tell() -> None:
    """Neighbours in float32 differ as logits, but not as scores in float32 or bfloat16."""
    logits = np.array([[1.0, 1.0 + 2.0**-23, 0.0]])
    for selection, arithmetic, apart in (("logits", None, True), ("scores", None, False), ("scores", "float64", True)):
        declared = Declaration(experts=3, top_k=1, selection=selection, arithmetic=arithmetic)  # type: ignore[arg-type]
        compared = keys(declared, logits, logits * 0)
        assert bool(compared.low[0, 1] > compared.high[0, 0]) is apart


def test_numpy_there_and_back() -> None:
    values = np.array([[1.5, -0.25]])
    for form in FORMATS.values():
        array = to_framework(values, form, "numpy")
        assert array.dtype == form.dtype
        assert to_numpy(array).tolist() == values.tolist()
    assert to_numpy(np.array([3], np.uint8)).dtype == np.int64


@pytest.mark.engines
def test_torch_there_and_back() -> None:
    import torch

    values = np.array([[1.5, -0.25]])
    for form in FORMATS.values():
        array = to_framework(values, form, "torch")
        assert array.dtype == getattr(torch, form.name)
        assert to_numpy(array.requires_grad_()).tolist() == values.tolist()
    assert to_numpy(torch.tensor([3], dtype=torch.int32)).tolist() == [3]


# --- declarations


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"top_k": 9}, "top_k = 9 of experts = 8, 1 <= top_k <= experts was expected"),
        ({"ties": "upper"}, "ties is 'upper', one of lower, higher, unspecified was expected"),
        ({"arithmetic": "float8"}, "arithmetic is 'float8', one of float64, float32, float16, bfloat16 was expected"),
        ({"capacity": 0}, "capacity is 0, at least 1 was expected"),
        ({"gate": np.eye(3)}, r"the gate has shape \[3, 3\], \[8, hidden\] was expected"),
        ({"bias": (1.0,)}, "a bias wants one number per expert"),
    ],
)
def test_declarations_that_make_no_sense(claims: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Declaration(**{"experts": 8, "top_k": 2, **claims})


def test_a_capacity_may_depend_on_the_batch() -> None:
    from tests.routers.router_mutants import CAP, with_capacity

    router = lambda x: with_capacity(x, 1 + len(x) // 4)  # noqa: E731
    declared = replace(CAP, capacity=lambda tokens: 1 + tokens // 4)
    for name in ("capacity-limit", "capacity-prefix"):
        assert judge(LAWS[name], Subject(router, declared)).outcome == "pass"
        assert judge(LAWS[name], Subject(router, CAP)).outcome == "fail"


def test_priority_by_weight() -> None:
    """Larger weights come first. Priority by token, which most routers have, is another rule."""
    from tests.routers.router_mutants import CAP, E, normalised, top, with_capacity

    def surest_first(x: Any) -> Any:
        ids = top(x)
        weights = normalised(np.take_along_axis(softmax(x), ids, 1))
        for expert in range(E):
            wanted = [(-weights[t, s], t, s) for t, s in np.argwhere(ids == expert)]
            for _, token, slot in sorted(wanted)[2:]:
                weights[token, slot] = 0
        return ids, weights

    declared = replace(CAP, priority="weight")
    assert judge(LAWS["capacity-prefix"], Subject(surest_first, declared)).outcome == "pass"
    assert judge(LAWS["capacity-prefix"], Subject(surest_first, CAP)).outcome == "fail"
    assert judge(LAWS["capacity-prefix"], Subject(lambda x: with_capacity(x, 2), declared)).outcome == "fail"


# --- the command


def refmoe(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "refmoe", "router", "check", *arguments, "--experts", "8"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def make(experts, top_k):\n"
        "    def route(x):\n"
        "        ids = np.argsort(-x, axis=1, kind='stable')[:, :top_k]\n"
        "        e = np.exp(np.take_along_axis(x, ids, 1) - x.max(axis=1, keepdims=True))\n"
        "        return ids, e / e.sum(axis=1, keepdims=True)\n"
        "    return route\n"
        "route = make(8, 2)\n"
        "def wrong(x):\n"
        "    ids, weights = route(x)\n"
        "    return ids[:, ::-1], weights\n"
    )
    good = refmoe("mine:make", "--factory", "--top-k", "2", "--ties", "lower", "--examples", "20", folder=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    assert "dense-at-k-equals-E  pass" in good.stdout
    assert "28 laws: 19 pass, 0 fail, 9 not applicable or not judged" in good.stdout

    bad = refmoe("mine.py:wrong", "--top-k", "2", "--json", "--law", "falling-order", folder=tmp_path)
    assert bad.returncode == 1
    (verdict,) = json.loads(bad.stdout)["laws"]
    assert (verdict["law"], verdict["outcome"], verdict["token"]) == ("falling-order", "fail", 0)
    assert np.shape(verdict["example"]["logits"]) == (1, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mine", "--top-k", "2"), "'mine' is not MODULE:FUNCTION, such as my_package.moe:route"),
        (("absent:route", "--top-k", "2"), "absent cannot be imported: ModuleNotFoundError: No module named 'absent'"),
        (("absent.py:route", "--top-k", "2"), "absent.py: no such file, but a Python file with a router was expected"),
        (("json:route", "--top-k", "2"), "json has no function 'route'"),
        (("json:dumps", "--top-k", "9"), "declaration: top_k = 9 of experts = 8, 1 <= top_k <= experts was expected"),
    ],
)
def test_bad_input_is_one_sentence(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = refmoe(*arguments, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"refmoe: {words}\n")


def test_unused_names_of_the_mutants_are_honest() -> None:
    """The pieces that mutants are made of pass every law."""
    x = np.array([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
    assert softmax(x).sum() == pytest.approx(1)
    assert honest(x)[0].tolist() == honest_other(x)[0].tolist() == [[7, 6]]
