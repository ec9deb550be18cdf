# SPDX-License-Identifier: Apache-2.0
"""Which policies allow more than the generic policy of a dtype, and where the reports say so."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from refmoe.arithmetic.formats import BFLOAT16, FLOAT16, FORMATS
from refmoe.engines.adapters import llama_cpp_library
from refmoe.engines.adapters.llama_cpp import policy_of_gguf
from refmoe.engines.observations import is_wider, policies_used
from refmoe.engines.results import read_results
from refmoe.profiles.inputs import input_formats
from refmoe.profiles.load import policy
from refmoe.profiles.policy import CUT_POINTS, Policy
from tests.command_line import Refmoe
from tests.engines.running import HONEST

NARROWER = {"float64": "float32", "float32": "bfloat16", "bfloat16": "float16", "float16": "bfloat16"}
"""Per dtype one that does not have all of its values."""


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_dtype_is_as_wide_as_itself(dtype: str) -> None:
    assert not is_wider(policy(dtype), dtype)
    assert not is_wider(policy(f"{dtype}+ties=lower+compared=stored+consumers=stored"), dtype), "it forbids more"


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("cut", CUT_POINTS)
def test_one_coarser_cut_is_wider(dtype: str, cut: str) -> None:
    assert is_wider(policy(f"{dtype}+{cut}={NARROWER[dtype]}"), dtype)
    assert not is_wider(policy(f"{dtype}+{cut}=float64"), dtype)


ALLOWING = {"ranks": 8, "truncates": True, "flushes": True, "ties": "any", "compared": "unrounded",
    "consumers": "unrounded", "sigmoid": "absolute", "inputs": {"Q8_0": FORMATS["float16"]},
    "kept": {"cache.k": input_formats()["q8_0"]}}  # fmt: skip
"""Fields whose value allows more than another one, with the value that allows most."""
ANOTHER_WAY = {"name", "about", "source", "scale", "router_order", "pairs", "turn"}
"""Fields that say something else, and allow neither more nor less. A turn is one of what is kept in codes."""
MEASURES = {"storage", "accumulation", "statistics", "exp", "angles", "circle", "cuts"}
"""Dtypes and budgets, which the other tests change."""


@pytest.mark.parametrize("field", [each.name for each in fields(Policy) if each.name not in ANOTHER_WAY | MEASURES])
def test_no_field_that_allows_more_is_forgotten(field: str) -> None:
    """A new field of a policy must be among these, or be said to allow nothing."""
    strict = {"ranks": 1, "truncates": False, "flushes": False, "ties": "lower", "compared": "stored",
        "consumers": "stored", "sigmoid": "relative"}  # fmt: skip
    own = replace(policy("float32"), **strict)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refmoe.engines.observations.named_policy", lambda _: own)
        assert not is_wider(own, "float32")
        assert is_wider(replace(own, **{field: ALLOWING[field]}), "float32")


@pytest.mark.parametrize("field", ["exp", "angles", "circle"])
def test_a_larger_budget_is_wider(field: str) -> None:
    own = policy("float32")
    budget = getattr(own, field)
    assert is_wider(replace(own, **{field: replace(budget, constant=budget.constant + 1)}), "float32")


def test_a_policy_of_less_precision_is_wider_and_the_reverse_is_not() -> None:
    assert is_wider(policy("bfloat16"), "float64")
    assert is_wider(policy("float32"), "float64")
    assert not is_wider(policy("float64"), "bfloat16")
    assert is_wider(policy("float32+truncates=true"), "float32") is not policy("float32").truncates


def declaring(tmp_path: Path, policies: dict[str, str]) -> list[str]:
    """An honest harness that declares policies."""
    script = tmp_path / "declares.py"
    script.write_text(
        f"import sys; sys.path.insert(0, '.')\nfrom tests.engines.harnesses import honest\n"
        f"honest.DESCRIPTION['policies'] = {policies!r}\nhonest.converse(honest.answer)\n"
    )
    return [HONEST[0], str(script)]


def test_every_report_names_the_policy_and_marks_a_wider_one(refmoe: Refmoe, tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "page.html"
    command = ("conform", "--case", "window-1", "--out", out)
    engine = declaring(tmp_path, {"float32": "bfloat16"})
    said = refmoe(*command, "--", *engine)[1]
    line = next(line for line in said.splitlines() if line.startswith("policies:"))
    assert "float32 by bfloat16" in line
    assert line.count("wider") == 1
    said = refmoe(*command, "--json", "--", *engine)[1]
    assert json.loads(said)["policies"] == {
        "float32": {"policy": "bfloat16", "wider": True}, "bfloat16": {"policy": "bfloat16", "wider": False}
    }  # fmt: skip
    assert read_results(out).wider == ("float32",)
    board = json.loads(refmoe("scoreboard", out, "--json", "--html", page)[1])["engines"][0]
    assert board["policies"]["float32"] == {"policy": "bfloat16", "wider": True}
    assert refmoe("scoreboard", out)[1].count("wider") == 1
    assert page.read_text().count("wider than") == 1


def test_a_policy_of_ones_own_is_compared_when_the_engine_is_judged(refmoe: Refmoe, tmp_path: Path) -> None:
    """Later, its file may be gone."""
    mine, out = tmp_path / "mine.toml", tmp_path / "out.json"
    mine.write_text('[mine]\nbase = "float32"\nabout = "a"\nsource = "s"\n[mine.cuts]\nlogits = "bfloat16"\n')
    arguments = ("conform", "--case", "window-1", "--dtype", "float32", "--policy", mine, "--out", out, "--", *HONEST)
    assert "wider" in refmoe(*arguments)[1]
    mine.unlink()
    assert policies_used(read_results(out))["float32"].wider is True
    mine.write_text('[mine]\nbase = "float32"\nabout = "a"\nsource = "s"\n')
    refmoe(*arguments)
    assert policies_used(read_results(out))["float32"].wider is None


def test_results_without_wider_policies_have_no_new_field(refmoe: Refmoe, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    refmoe("conform", "--case", "window-1", "--out", out, "--", *HONEST)
    assert {*json.loads(out.read_text())} == {
        "format_version", "engine", "platform", "refmoe", "significance", "cases", "smoke", "notes", "outcomes"
    }  # fmt: skip


@pytest.mark.parametrize("cache", llama_cpp_library.TYPES)
@pytest.mark.parametrize("flash", llama_cpp_library.FLASH)
def test_what_llama_cpp_makes_of_inputs_does_not_depend_on_its_cache(cache: str, flash: str) -> None:
    """ggml chooses the type of an input by that of the matrix."""
    found = policy(policy_of_gguf(cache, flash))
    assert found.inputs == policy("llama.cpp-quantised").inputs
    assert [found.inputs[name] for name in ("F16", "BF16")] == [FLOAT16, BFLOAT16]
