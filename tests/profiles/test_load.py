# SPDX-License-Identifier: Apache-2.0
"""Policies by name, by file, with changes; every mistake is one sentence that says where and what was expected."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from refmoe.arithmetic.codes import InputFormat
from refmoe.arithmetic.formats import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from refmoe.errors import InputError
from refmoe.profiles.cut_points import ACCUMULATION_CUTS, CUT_POINTS, INPUT_CUTS, ISLANDS, STATISTICS
from refmoe.profiles.inputs import input_formats
from refmoe.profiles.load import Difference, differences, policies, policy

FILE = """
[my-engine]
about = "Mine."
source = "Its README."
base = "hf-bfloat16"
truncates = true
[my-engine.cuts]
"rope.table" = "float32"
"""


def test_every_policy_of_refmoe_s_own_loads_and_says_whose_it_is() -> None:
    found = policies()
    assert {each.name for each in found} >= {
        "float64", "float32", "float16", "bfloat16", "hf-float64", "hf-float32", "hf-bfloat16", "hf-float16",
        "mistral-bfloat16", "gpt-fast-bfloat16", "llama.cpp-float32", "llama.cpp-float32-cache-float16",
    }  # fmt: skip
    for each in found:
        assert policy(each.name) == each
        assert each.about
        assert each.source
        assert "\n" not in each.about + each.source
        assert min(each.exp.constant, each.angles.constant, each.circle.constant) > 0
        assert all(budget.source for budget in (each.exp, each.angles, each.circle))


def test_generic_policies_round_everything_to_their_dtype_but_statistics() -> None:
    for each, format in (("float64", FLOAT64), ("float32", FLOAT32), ("bfloat16", BFLOAT16), ("float16", FLOAT16)):
        wide = FLOAT64 if each == "float64" else FLOAT32
        stored = {*CUT_POINTS} - {*STATISTICS, *ACCUMULATION_CUTS}
        assert {str(policy(each).at(cut)) for cut in stored} == {str(format)}
        assert {str(policy(each).at(cut)) for cut in ACCUMULATION_CUTS} == {str(wide)}
        assert {str(policy(each).at(cut)) for cut in STATISTICS} == {str(wide)}
        assert policy(each).accumulation == wide
        narrow = each in ("bfloat16", "float16")
        assert policy(each).truncates == policy(each).flushes == narrow
        assert policy(each).consumers == ("unrounded" if narrow else "stored")
        assert (policy(each).compared, policy(each).ties) == ("unrounded", "any")


def test_exact_is_float64() -> None:
    assert policy("exact") == policy("float64")


def test_changes() -> None:
    found = policy("hf-float32+cache=float16+scale=query+truncates=true+statistics=float64+norm.normed=bfloat16")
    plain = policy("hf-float32")
    assert found.name == "hf-float32+cache=float16+scale=query+truncates=true+statistics=float64+norm.normed=bfloat16"
    assert found.at("cache.k") == found.at("cache.v") == FLOAT16
    assert (found.scale, found.truncates, found.statistics) == ("query", True, FLOAT64)
    assert found.at("norm.normed") == BFLOAT16
    assert (plain.scale, plain.truncates, plain.statistics, dict(plain.cuts)) == ("scores", False, FLOAT32, {})
    assert policy(found.name) == found
    assert policy("hf-bfloat16+storage=float16").at("attention.q") == FLOAT16


def test_changes_of_groups_and_of_ranks() -> None:
    found = policy("float64+islands=float32+linear.input=float16+router.logits.input=float64+ranks=8")
    assert found.statistics == FLOAT32
    assert {found.at(cut) for cut in ISLANDS} == {FLOAT32}
    assert {found.at(cut) for cut in INPUT_CUTS} == {FLOAT16, FLOAT64}
    assert found.at("router.logits.input") == FLOAT64
    assert (found.ranks, policy("float64").ranks) == (8, 1)
    assert found.at("attention.q") == FLOAT64


def test_an_input_has_the_dtype_of_its_tap_unless_it_is_named() -> None:
    found = policy("bfloat16+moe_norm=float32")
    assert found.at("router.logits.input") == found.at("expert.gate.input") == FLOAT32
    assert found.at("attention.q.input") == BFLOAT16


def test_a_file_may_name_groups_of_cut_points(tmp_path: Path) -> None:
    """A single cut point wins over its group, wherever it stands."""
    path = tmp_path / "mine.toml"
    cuts = '"router.logits.input" = "float32"\n"linear.input" = "float16"\n'
    path.write_text(FILE.replace("truncates = true", "ranks = 4") + cuts)
    found = policy(str(path))
    assert (found.ranks, found.at("logits.input"), found.at("router.logits.input")) == (4, FLOAT16, FLOAT32)


def test_a_file_of_one_s_own(tmp_path: Path) -> None:
    """With a base, with changes, in a folder whose name has a plus sign."""
    (tmp_path / "a+b").mkdir()
    path = tmp_path / "a+b" / "mine.toml"
    path.write_text(FILE)
    found, base = policy(str(path)), policy("hf-bfloat16")
    assert (found.name, found.about, found.storage, found.exp) == ("my-engine", "Mine.", BFLOAT16, base.exp)
    assert (found.truncates, base.truncates) == (True, False)
    assert dict(found.cuts) == {**base.cuts, "rope.table": FLOAT32}
    changed = policy(f"{path}+cache=float16")
    assert (changed.name, changed.at("cache.v")) == ("my-engine+cache=float16", FLOAT16)


def test_differences_are_the_fields_that_differ_by_what_holds_there() -> None:
    """A cut point that is named in one policy and only implied in the other does not differ."""
    found = differences([policy("hf-float32"), policy("hf-float32+cache=float16+attention.q=float32+ties=lower")])
    assert found == (
        Difference("ties", ("any", "lower")),
        Difference("cache.k", ("float32", "float16")),
        Difference("cache.v", ("float32", "float16")),
    )
    every = {row.field for row in differences([policy("float32")])}
    assert every > {*CUT_POINTS, "storage", "exp", "flushes", "scale"}
    budgets = {row.field: row.values for row in differences([policy("hf-float32"), policy("llama.cpp-float32")])}
    assert budgets["angles"] == ("4 + 1 |x|", "4 + 16 |x|")


MISTAKES = {
    "hf-bf16": "policy 'hf-bf16' is unknown, expected a .toml file or one of hf-bfloat16, ",
    "": "policy '' is unknown",
    "hf-float32+chache=float16": "'chache' cannot be changed, expected one of cache, ",
    "hf-float32+router.experts=float16": "'router.experts' cannot be changed, expected one of router.",
    "hf-float32+cache": "'cache' was found, but a change such as cache=float16 was expected",
    "hf-float32+cache=fp16": 'cache.k is "fp16", but one of ',
    "hf-float32+ties=low": 'ties is "low", but one of lower, any was expected',
    "hf-float32+truncates=1": 'truncates is "1", but true or false was expected',
    "hf-float32+ranks=0": "ranks is 0, but an integer from 1 to ",
    "hf-float32+ranks=two": 'ranks is "two", but an integer from 1 to ',
    "hf-float32+router.logits.inputs=float16": "cannot be changed, expected one of router.logits.input, ",
    "nowhere.toml+cache=float16": "nowhere.toml: no such file",
    "float32+Q8_0.input=q9_0": 'inputs.Q8_0 is "q9_0", but one of q8_0, ',
    "float32+Q9_0.input=q8_0": "'Q9_0.input' cannot be changed, expected one of ",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_name_that_means_nothing(name: str) -> None:
    with pytest.raises(InputError) as caught:
        policy(name)
    assert MISTAKES[name] in str(caught.value)


OWN = """
[my-engine.inputs.Q8_0]
base = "q8_0"
about = "Mine."
source = "Its README."
codes = "reciprocal of the scale"
"""
BUDGET = "a table of 'constant' and 'slope', numbers from 0, and 'source', a text, was expected"
SPOILT = {
    "not TOML": (lambda text: text + "[", "not valid TOML"),
    "no table": (lambda text: "", "[] was found, but one table"),
    "two tables": (lambda text: text + "[other]\n", "one table with the name of the policy was expected"),
    "not a table": (lambda text: "storage = 'float32'", "one table"),
    "a name that is taken": (lambda text: text.replace("my-engine", "float32"), "the name 'float32' is taken"),
    "no source": (lambda text: text.replace("source", "sauce"), "[my-engine] source is missing, but a text"),
    "an unknown field": (
        lambda text: text.replace("truncates", "truncate"), "has a field 'truncate', but only one of truncates, ",
    ),
    "an unknown base": (lambda text: text.replace("hf-", "hg-"), "base is \"hg-bfloat16\", but one of hf-bfloat16, "),
    "its own base": (lambda text: text.replace("hf-bfloat16", "my-engine"), "base is \"my-engine\", but one of "),
    "no base": (lambda text: text.replace("base", "#"), "[my-engine] storage is missing, but one of float64, "),
    "a wrong dtype": (lambda text: text.replace("float32", "fp32"), "rope.table is \"fp32\", but one of "),
    "a dtype that is a list": (lambda text: text.replace('"float32"', "[]"), "rope.table is [], but one of "),
    "a wrong cut point": (
        lambda text: text.replace("rope.table", "rope.tables"), "cut point 'rope.tables', but only one of rope.table, ",
    ),
    "cuts that are none": (
        lambda text: text.partition("[my-engine.cuts]")[0] + "cuts = 3", "cuts is 3, but a table of dtypes",
    ),
    "inputs that are none": (
        lambda text: text.partition("[my-engine.cuts]")[0] + "inputs = 3", "inputs is 3, but a table of formats",
    ),
    "the input of no matrix": (
        lambda text: text + '[my-engine.inputs]\nQ7_0 = "q8_0"\n', 'inputs is "Q7_0", but the format of a matrix, one',
    ),
    "an input of no format": (
        lambda text: text + '[my-engine.inputs]\nQ8_0 = 3\n', "inputs.Q8_0 is 3, but one of q8_0, ",
    ),
    "an input with a wrong base": (lambda text: text + OWN.replace("q8_0", "q9_0"), 'Q8_0.base is "q9_0", but one of '),
    "an input without a source": (lambda text: text + OWN.replace("source", "#"), "Q8_0.source is missing, but a text"),
    "an input with an unknown field": (lambda text: text + OWN.replace("codes", "code"), "Q8_0.code is "),
    "an input with a wrong rule": (lambda text: text + OWN.replace("of the scale", "of it"), "Q8_0.codes is "),
    "an input with odd blocks": (lambda text: text + OWN + "block = 48\n", "Q8_0.block is 48, but a power of two"),
    "an input with a wrong number": (lambda text: text + OWN + "contest = -1\n", "Q8_0.contest is -1, but an integer"),
    "a wrong flag": (lambda text: text.replace("true", "1"), "truncates is 1, but true or false was expected"),
    "a wrong budget": (lambda text: text.replace("truncates = true", "exp = 3"), f"exp is 3, but {BUDGET}"),
    "a budget without a source": (
        lambda text: text.replace("truncates = true", "exp = { constant = 1, slope = 0 }"), BUDGET,
    ),
    "a negative budget": (
        lambda text: text.replace("truncates = true", "exp = { constant = -1, slope = 0, source = '' }"), BUDGET,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILT)
def test_a_file_that_cannot_be_used(tmp_path: Path, fault: str) -> None:
    spoil, words = SPOILT[fault]
    path = tmp_path / "mine.toml"
    path.write_text(spoil(FILE))
    with pytest.raises(InputError) as caught:
        policy(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


def test_the_input_of_products_belongs_to_the_format_of_a_matrix(tmp_path: Path) -> None:
    """By a name, by a dtype, or by a table of one's own; a base has its say for the other formats."""
    path = tmp_path / "mine.toml"
    path.write_text(FILE.replace("hf-bfloat16", "llama.cpp-quantised") + OWN)
    found, base = policy(str(path)), policy("llama.cpp-quantised")
    own = found.inputs["Q8_0"]
    assert isinstance(own, InputFormat)
    assert (own.about, own.codes, own.block, own.scale) == ("Mine.", "reciprocal of the scale", 32, FLOAT16)
    assert found.inputs["Q4_K"] == base.inputs["Q4_K"] == input_formats()["q8_k"]
    changed = policy("llama.cpp-quantised+Q4_K.input=q8_0+Q6_K.input=float16")
    assert (changed.inputs["Q4_K"], changed.inputs["Q6_K"]) == (input_formats()["q8_0"], FLOAT16)
    assert [row.field for row in differences([base, changed])] == ["inputs"]
    assert {each.name for each in base.codes} == {"q8_0", "q8_1", "q8_k"}


def test_a_cache_may_keep_codes(tmp_path: Path) -> None:
    """By a change of both, or of one; a dtype takes the codes away again. No other cut point has codes."""
    base, formats = policy("llama.cpp-quantised"), input_formats()
    changed = policy("llama.cpp-quantised+cache=q8_0")
    assert changed.kept == {"cache.k": formats["q8_0"], "cache.v": formats["q8_0"]}
    assert [row.field for row in differences([base, changed])] == ["cache.k", "cache.v"]
    assert [row.values[1] for row in differences([base, changed])] == ["q8_0", "q8_0"]
    again = policy("llama.cpp-quantised+cache=q8_0+cache.k=q4_0+cache.v=float16")
    assert again.kept == {"cache.k": formats["q4_0"]}
    assert (again.at("cache.v"), "cache.k" in again.cuts) == (FLOAT16, False)
    assert formats["q4_0"] in again.codes
    with pytest.raises(InputError, match=r'attention\.k is "q8_0"'):
        policy("llama.cpp-quantised+attention.k=q8_0")
    path = tmp_path / "mine.toml"
    path.write_text(
        '[mine]\nabout = "M"\nsource = "S"\nbase = "float32"\n'
        '[mine.cuts."cache.v"]\nbase = "q8_0"\nabout = "A"\nsource = "S"\nblock = 64\n'
    )
    own = policy(str(path)).kept["cache.v"]
    assert (own.block, own.kind, own.most) == (64, "int8", 127.0)


@dataclass(frozen=True)
class Stored:
    """What a policy asks of a parameter."""

    name: str
    format: str = "int8-channel"


def test_one_product_may_read_other_codes_than_the_format_says() -> None:
    found = policy("float32+int8-channel.input=int8-token+expert.gate.int8-channel.input=float32")
    gate, up = (Stored(f"layers.0.experts.1.{name}") for name in ("w1", "w3"))
    assert found.input_of(gate) == FLOAT32
    assert found.input_of(up) == input_formats()["int8-token"]
    with pytest.raises(InputError):
        policy("float32+expert.gat.int8-channel.input=float32")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("most", "130"),
        ("most", "127.25"),
        ("kind", '"int9"'),
        ("most", "8"),
        ("maximum", '"big"'),
        ("rounding", '"toward zero"'),
    ],
)
def test_a_format_of_one_s_own_that_cannot_be(tmp_path: Path, field: str, value: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[mine]\nabout = "M"\nsource = "S"\nbase = "float32"\n'
        f'[mine.cuts."cache.k"]\nbase = "q8_0"\nabout = "A"\nsource = "S"\n{field} = {value}\n'
    )
    with pytest.raises(InputError, match=f"cuts.cache.k.{'contest' if field == 'rounding' else field}"):
        policy(str(path))
