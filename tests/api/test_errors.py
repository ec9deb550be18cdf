# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments are refused where they are passed, with one sentence of `InputError`; junk never gets through."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refmoe
from refmoe import InputError
from refmoe.api.report import Report
from tests.command_line import Refmoe

MODEL = refmoe.load("walking-skeleton")
TOKENS = [1, 31]
VALUES = {"logits": MODEL.run(TOKENS, taps="logits")["prefill", "logits"].astype(np.float32)}
TRACE = MODEL.run(TOKENS, dtype="float32")


def message(call: Any) -> str:
    with pytest.raises(InputError) as error:
        call()
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


# ---- the sentences of the command line


@pytest.mark.parametrize("token", [97, 200, -1, -97])
def test_a_token_outside_the_vocabulary(refmoe: Refmoe, tmp_path: Path, token: int) -> None:
    MODEL.save(tmp_path / "m")
    status, _, err = refmoe(
        "emit", "--checkpoint", tmp_path / "m", f"--tokens=1,{token}", "--out", tmp_path / "t.safetensors"
    )
    assert status == 2
    found = {
        message(lambda: MODEL.run([1, token])), message(lambda: MODEL.run([1], decode=[token])),
        message(lambda: MODEL.run([1], chunks=[[token]])), message(lambda: MODEL.run(np.array([[1, token]]))),
    }  # fmt: skip
    assert len(found) == 1
    assert found.pop() in err


def test_an_unknown_policy(refmoe: Refmoe) -> None:
    _, _, err = refmoe("policies", "bfloat17")
    assert message(lambda: MODEL.run([1], policy="bfloat17")) in err


# ---- arguments of wrong types and values


@pytest.mark.parametrize(
    "call",
    [
        lambda: refmoe.load(3), lambda: refmoe.load(None), lambda: refmoe.load(""), lambda: refmoe.load(b"walking"),
        lambda: refmoe.load("nul\0"), lambda: refmoe.load("a" * 9999), lambda: refmoe.load("walking-skeletn"),
        lambda: refmoe.load("mixtral-8x7b"), lambda: refmoe.load("mixtral-8x7b", seed=-1),
        lambda: refmoe.load("mixtral-8x7b", seed=1.0), lambda: refmoe.load("mixtral-8x7b", seed=True),
        lambda: refmoe.load("walking-skeleton", seed=1), lambda: refmoe.load(__file__),
        lambda: refmoe.load("walking-skeleton", layout="gguf"), lambda: refmoe.load(Path(__file__).parent),
        lambda: refmoe.case("nope"),
        lambda: refmoe.case(None),
        lambda: refmoe.case([]),
        lambda: refmoe.case("../golden"),
        lambda: refmoe.policy("nope"), lambda: refmoe.policy(3), lambda: refmoe.policy("float32", nope="float16"),
        lambda: refmoe.policy("float32", cache="nope"), lambda: refmoe.policy("float32", cache=3),
        lambda: refmoe.policy("float32", cache="float16+storage=bfloat16"), lambda: refmoe.policy("nul\0.toml"),
        lambda: refmoe.policy("float32+nope"), lambda: refmoe.policy("nothing.toml"),
        lambda: MODEL.run("abc"), lambda: MODEL.run(b"abc"), lambda: MODEL.run(3), lambda: MODEL.run({}),
        lambda: MODEL.run([]), lambda: MODEL.run([[]]), lambda: MODEL.run([1.0]), lambda: MODEL.run([True]),
        lambda: MODEL.run(["1"]), lambda: MODEL.run([None]), lambda: MODEL.run([[1], 2]), lambda: MODEL.run([[[1]]]),
        lambda: MODEL.run([10**30]), lambda: MODEL.run(np.ones(2)), lambda: MODEL.run([1], decode=3),
        lambda: MODEL.run([1], decode=[[3]]), lambda: MODEL.run([[1], [2]], decode=[3, 4]),
        lambda: MODEL.run([[1], [2]], decode=[[3]]),
        lambda: MODEL.run([1], chunks=[3]),
        lambda: MODEL.run([1], chunks=[[]]),
        lambda: MODEL.run([1], chunks=None), lambda: MODEL.run([[1], [2]], chunks=[[3]]), lambda: MODEL.run(decode=[1]),
        lambda: MODEL.run(chunks=[[1]]),
        lambda: MODEL.run([1], dtype="float16"),
        lambda: MODEL.run([1], dtype=np.float32),
        lambda: MODEL.run([1], dtype=None), lambda: MODEL.run([1], policy=3),
        lambda: MODEL.run([1], policy="float32", dtype="float32"), lambda: MODEL.run([1], taps=3),
        lambda: MODEL.run([1], taps="nope"), lambda: MODEL.save(3), lambda: MODEL.save(__file__),
        lambda: MODEL.save("x", dtype="int8"), lambda: MODEL.save("x", layout="x"),
        lambda: refmoe.Model(3, "x"), lambda: refmoe.Report(3),
        lambda: refmoe.verify({}, MODEL, TOKENS), lambda: refmoe.verify(3, MODEL, TOKENS),
        lambda: refmoe.verify(None, MODEL, TOKENS), lambda: refmoe.verify(VALUES["logits"], MODEL, TOKENS),
        lambda: refmoe.verify(VALUES, None, TOKENS), lambda: refmoe.verify(VALUES, MODEL, None, decode=[1]),
        lambda: refmoe.verify(VALUES, MODEL, [1]), lambda: refmoe.verify(VALUES, MODEL, TOKENS, policy="nope"),
        lambda: refmoe.verify(VALUES, MODEL, TOKENS, policy=3),
        lambda: refmoe.verify(VALUES, MODEL, TOKENS, diagnose="no"),
        lambda: refmoe.verify(VALUES, MODEL, TOKENS, significance=0),
        lambda: refmoe.verify(VALUES, MODEL, TOKENS, significance=1),
        lambda: refmoe.verify(VALUES, MODEL, TOKENS, significance=float("nan")),
        lambda: refmoe.verify(VALUES, MODEL, TOKENS, significance="1e-6"),
        lambda: refmoe.verify({"logit": VALUES["logits"]}, MODEL, TOKENS),
        lambda: refmoe.verify({"layers.2.residual": np.ones((2, 48))}, MODEL, TOKENS, policy="float32"),
        lambda: refmoe.verify({"decode1/logits": VALUES["logits"]}, MODEL, TOKENS),
        lambda: refmoe.verify({3: VALUES["logits"]}, MODEL, TOKENS),
        lambda: refmoe.verify({(): VALUES["logits"]}, MODEL, TOKENS),
        lambda: refmoe.verify({("prefill", 3): VALUES["logits"]}, MODEL, TOKENS),
        lambda: refmoe.verify({"prefill": {3: VALUES["logits"]}}, MODEL, TOKENS),
        lambda: refmoe.verify({"logits[7]": VALUES["logits"]}, MODEL, TOKENS),
        lambda: refmoe.verify({"logits[1:1]": VALUES["logits"]}, MODEL, TOKENS),
        lambda: refmoe.verify({"logits[::2]": VALUES["logits"]}, MODEL, TOKENS),
        lambda: refmoe.verify({"logits[x]": VALUES["logits"]}, MODEL, TOKENS),
        lambda: refmoe.verify({"logits": VALUES["logits"].T}, MODEL, TOKENS),
        lambda: refmoe.verify({"logits": 1.0}, MODEL, TOKENS), lambda: refmoe.verify({"logits": "text"}, MODEL, TOKENS),
        lambda: refmoe.verify("nothing.safetensors", MODEL), lambda: refmoe.verify(__file__, MODEL),
    ],
)  # fmt: skip
def test_wrong_arguments(call: Any) -> None:
    message(call)


def test_messages_name_the_argument_and_what_it_is() -> None:
    assert re.search(r"logits.*\[97, 2\].*\[2, 97\]", message(lambda: refmoe.verify(
        {"logits": VALUES["logits"].T}, MODEL, TOKENS)))  # fmt: skip
    assert "walking-skeleton" in message(lambda: refmoe.load("walking-skeletn"))
    assert "walking-skeleton" in message(lambda: refmoe.case("walking-skeletn"))


# ---- junk

NUMBERS = st.one_of(st.integers(-3, 100), st.integers(), st.floats(), st.booleans(), st.complex_numbers())
WORDS = st.sampled_from([
    "", "logits", "logits[-1]", "logits[", "prefill/logits", "layers.0.residual[0:1]", "prefill", "walking-skeleton",
    "top-1", "float32", "bfloat16", "float32+cache=float16", "mixtral-8x7b", "hf", ".", "/", "~",
    "a\nb", "\0", "é", "\ud800",
    "x.npz", "x.pt", "x.toml", "exact",
])  # fmt: skip
ARRAYS = st.sampled_from([
    VALUES["logits"], VALUES["logits"][0], VALUES["logits"] * np.nan, np.array(TOKENS), np.array([TOKENS]),
    np.zeros((0, 3)), np.array(1), np.array("x"), np.array([None]), np.ones((2, 97), np.float16), np.float32(1),
    np.ones((2, 97), np.int8), np.int64(3), np.zeros((2, 48), np.float32),
])  # fmt: skip
LEAVES = st.one_of(st.none(), NUMBERS, WORDS, st.text(max_size=5), st.binary(max_size=3), ARRAYS, st.builds(object))
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(WORDS, inner, max_size=2),
        st.dictionaries(st.tuples(WORDS, WORDS), inner, max_size=1), st.frozensets(st.integers(0, 9), max_size=2),
    ),
    max_leaves=5,
)  # fmt: skip
OR_GOOD = {
    "tokens": st.one_of(JUNK, st.just(TOKENS), st.just([TOKENS, [3, 4]])),
    "decode": st.one_of(JUNK, st.none(), st.just([5])),
    "chunks": st.one_of(JUNK, st.just(()), st.just([[5]])),
    "policy": st.one_of(JUNK, st.none(), st.just("float32")),
}
QUICK = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Junk that is a path names nothing of this repository."""
    monkeypatch.chdir(tmp_path)


def result_or_refusal(call: Any, kind: Any) -> None:
    try:
        found = call()
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert isinstance(found, kind)


@QUICK
@given(
    values=st.one_of(JUNK, st.just(VALUES), st.just(TRACE)),
    model=st.one_of(st.just(MODEL), LEAVES),
    significance=st.one_of(JUNK, st.just(1e-6)),
    **OR_GOOD,
)
def test_junk_for_verify(
    values: Any, model: Any, tokens: Any, decode: Any, chunks: Any, policy: Any, significance: Any
) -> None:
    options = {"decode": decode, "chunks": chunks, "policy": policy, "significance": significance}
    result_or_refusal(lambda: refmoe.verify(values, model, tokens, diagnose=False, **options), Report)


@pytest.mark.parametrize("values", [VALUES, TRACE], ids=["arrays", "trace"])
@pytest.mark.parametrize("name", ["model", "tokens", "decode", "chunks", "policy", "diagnose", "significance"])
@QUICK
@given(junk=JUNK)
def test_junk_for_one_argument_of_verify(values: Any, name: str, junk: Any) -> None:
    """The others are right, so that it is read."""
    arguments = {"model": MODEL, "tokens": TOKENS, "diagnose": False, name: junk}
    result_or_refusal(lambda: refmoe.verify(values, **arguments), Report)


@QUICK
@given(values=st.dictionaries(st.one_of(WORDS, st.text(max_size=4)), st.one_of(ARRAYS, JUNK), max_size=2))
def test_junk_in_values(values: Any) -> None:
    result_or_refusal(lambda: refmoe.verify(values, MODEL, TOKENS, diagnose=False), Report)


@QUICK
@given(dtype=st.one_of(JUNK, st.just("float32")), taps=st.one_of(JUNK, st.just("logits")), **OR_GOOD)
def test_junk_for_run(tokens: Any, decode: Any, chunks: Any, policy: Any, dtype: Any, taps: Any) -> None:
    options = {"decode": decode, "chunks": chunks, "policy": policy, "dtype": dtype, "taps": taps}
    result_or_refusal(lambda: MODEL.run(tokens, **options), refmoe.Trace)


@QUICK
@given(path=JUNK, seed=st.one_of(JUNK, st.none()), layout=st.one_of(JUNK, st.none()))
def test_junk_for_load(path: Any, seed: Any, layout: Any) -> None:
    result_or_refusal(lambda: refmoe.load(path, seed=seed, layout=layout), refmoe.Model)
    result_or_refusal(lambda: refmoe.case(path), object)


@QUICK
@given(
    name=st.one_of(JUNK, st.just("float32")),
    changes=st.dictionaries(
        st.sampled_from(["cache", "storage", "truncates", "ties", "attention__probs", "nope"]), JUNK, max_size=2
    ),
)
def test_junk_for_policy(name: Any, changes: Any) -> None:
    result_or_refusal(lambda: refmoe.policy(name, **changes), object)


@QUICK
@given(folder=JUNK, dtype=JUNK, layout=JUNK, kind=st.sampled_from(["html", "junit"]))
def test_junk_for_files(folder: Any, dtype: Any, layout: Any, kind: str) -> None:
    result_or_refusal(lambda: MODEL.save(folder, dtype=dtype, layout=layout), type(None))
    if not isinstance(folder, str | os.PathLike):
        report = refmoe.verify(VALUES, MODEL, TOKENS, diagnose=False)
        result_or_refusal(lambda: getattr(report, kind)(folder), type(None))


@pytest.mark.engines
@QUICK
@given(module=JUNK, names=st.one_of(JUNK, st.none()), taps=JUNK)
def test_junk_for_capture(module: Any, names: Any, taps: Any) -> None:
    torch = pytest.importorskip("torch")
    for given_module in (module, torch.nn.Embedding(3, 2)):
        result_or_refusal(lambda given_module=given_module: refmoe.capture(given_module, names, taps=taps), object)
