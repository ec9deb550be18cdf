# SPDX-License-Identifier: Apache-2.0
"""`refmoe policies` and `refmoe emit --policy` as their users meet them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.write import write_checkpoint
from refmoe.profiles.cut_points import CUT_POINTS
from refmoe.profiles.load import GROUPS, policies, policy
from refmoe.profiles.policy import FIELDS
from refmoe.spec.model import Model
from refmoe.steps.policy_ops import PolicyOps
from refmoe.steps.rounding import CUT_STEPS
from refmoe.suite import read_case, trace_path
from refmoe.traces.script import execute
from refmoe.traces.trace import Recorder, read_trace
from tests.command_line import Refmoe
from tests.golden_cases import write_case
from tests.models import SMALL

GOLDEN = Path(__file__).parent.parent.parent / "golden"


def test_policies_are_listed(refmoe: Refmoe) -> None:
    status, out, _ = refmoe("policies")
    assert status == 0
    lines = out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [each.name for each in policies()]
    assert all(each.about in line for each, line in zip(policies(), lines, strict=True))
    listed = json.loads(refmoe("policies", "--json")[1])["policies"]
    assert listed[0] == {"name": policies()[0].name, "about": policies()[0].about}


def test_one_policy_is_printed_whole(refmoe: Refmoe) -> None:
    status, out, _ = refmoe("policies", "hf-bfloat16")
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["storage", "bfloat16"] in [row[:2] for row in rows]
    assert ["norm.input", "float32", "attention_norm,", "moe_norm,", "final_norm"] in [row[:5] for row in rows]
    assert "modeling_mixtral" not in out  # of the base
    assert "transformers 5.23" in out
    shown = json.loads(refmoe("policies", "hf-bfloat16", "--json")[1])
    assert (shown["fields"]["rope.table"], shown["fields"]["exp"]) == ("bfloat16", "8 + 2 |x|")
    assert set(shown["sources"]) == {"exp", "angles", "circle"}
    assert shown["shown_by"]["cache.k"] == ["attention.scores"]
    assert shown["fields"].keys() == shown["meanings"].keys()


def test_every_field_group_and_cut_point_is_explained(refmoe: Refmoe) -> None:
    """What a change may name is what is explained, and each has words of its own."""
    status, out, _ = refmoe("policies", "--cut-points")
    assert status == 0
    explained = {line.split()[0] for line in out.splitlines()[1:]}
    assert explained == {*FIELDS, *GROUPS, *CUT_POINTS}
    rows = json.loads(refmoe("policies", "--cut-points", "--json")[1])["cut_points"]
    assert {row["name"] for row in rows} == explained
    assert len({row["about"] for row in rows}) == len(rows)
    by_name = {row["name"]: row for row in rows}
    assert by_name["router.logits.input"]["default"] == "moe_norm"
    assert by_name["cache.v"]["shown_by"] == "attention.context"
    status, _, error = refmoe("policies", "--cut-points", "float32")
    assert (status, "float32" in error) == (2, True)


def test_several_policies_are_printed_where_they_differ(refmoe: Refmoe) -> None:
    names = ("hf-float32", "hf-float32+cache=float16", "hf-float32+ties=lower")
    status, out, _ = refmoe("policies", *names)
    assert status == 0
    heading, *rows = [line.split() for line in out.splitlines()]
    assert heading == [*names]
    assert rows == [["ties", "any", "any", "lower"]] + [[cut, "float32", "float16", "float32"] for cut in
                                                        ("cache.k", "cache.v")]  # fmt: skip
    found = json.loads(refmoe("policies", *names, "--json")[1])
    assert found["policies"] == [*names]
    assert found["differences"]["cache.k"] == dict(zip(names, ("float32", "float16", "float32"), strict=True))
    assert refmoe("policies", "exact", "float64")[1] == "no difference\n"


def test_emit_writes_the_ideal_run_of_a_checkpoint(refmoe: Refmoe, tmp_path: Path) -> None:
    """bfloat16 arrays and the policy's name in the trace; float64 is the exact run."""
    write_checkpoint(tmp_path / "model", SMALL, synthetic_checkpoint(SMALL, 3).parameters)
    what = ("emit", "--checkpoint", tmp_path / "model", "--tokens", "1,2,3", "--decode", "4", "--out", tmp_path / "t")
    name = "hf-bfloat16+cache=float16"
    assert refmoe(*what, "--policy", name, "--taps", "logits,*.router.*")[0] == 0
    ideal = read_trace(tmp_path / "t")
    assert ideal.header.policy == name
    assert ideal.get("prefill", "logits").dtype == ml_dtypes.bfloat16
    assert ideal.get("prefill", "layers.0.router.weights").dtype == np.float32
    loaded, expected = load_checkpoint(tmp_path / "model"), Recorder("logits")
    model = Model(loaded.config, loaded.parameters, CUT_STEPS)
    execute(PolicyOps(policy(name), expected), model, ideal.header.runs, expected)
    for key, array in expected.arrays.items():
        assert ideal.tensors[key].map().tobytes() == array.tobytes(), key
    traces = []
    for choice in (("--policy", "float64"), ("--dtype", "exact")):
        assert refmoe(*what, *choice)[0] == 0
        traces.append(read_trace(tmp_path / "t"))
        traces[-1] = {key: tensor.map().tobytes() for key, tensor in traces[-1].tensors.items()}
    assert traces[0] == traces[1]


def test_emit_writes_the_ideal_run_of_a_case(refmoe: Refmoe, tmp_path: Path) -> None:
    """To a trace of its own: the golden folder stays as it is, and need not have been written."""
    before = {path: path.read_bytes() for path in (GOLDEN / "walking-skeleton").iterdir()}
    what = ("emit", "--case", "walking-skeleton", "--golden", GOLDEN, "--out", tmp_path / "t")
    status, text, _ = refmoe(*what, "--policy", "hf-float16", "--json")
    assert status == 0
    case, found = read_case(GOLDEN / "walking-skeleton"), read_trace(tmp_path / "t")
    assert json.loads(text)["runs"] == len(case.runs())
    assert (found.header.case, found.header.policy, found.header.runs) == (
        "walking-skeleton",
        "hf-float16",
        case.runs(),
    )
    exact = read_trace(trace_path(case.folder))
    assert found.tensors.keys() == exact.tensors.keys()
    for key, tensor in exact.tensors.items():
        value = found.tensors[key].map()
        assert value.dtype == (np.int64 if key.endswith("experts") else np.float32 if key.endswith("router.weights")
                               else np.float16)  # fmt: skip
        assert np.sqrt(np.mean((value - tensor.map()) ** 2)) <= 2**-6 * np.sqrt(np.mean(tensor.map() ** 2))
    assert {path: path.read_bytes() for path in (GOLDEN / "walking-skeleton").iterdir()} == before
    write_case(tmp_path / "new")
    assert refmoe("emit", "--case", "new", "--golden", tmp_path, "--out", tmp_path / "u", "--policy", "exact")[0] == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"case.toml"}


MISTAKES = {
    "no such policy": (
        "policies hf-bfloat",
        "policy 'hf-bfloat' is unknown, expected a .toml file or one of hf-bfloat16",
    ),
    "no such file": ("policies float32 mine.toml", "mine.toml: no such file"),
    "emit by no policy": ("emit --case x --out t --policy float8", "policy 'float8' is unknown"),
    "policy and dtype": ("emit --case x --out t --policy float32 --dtype float32", "but --dtype float32 was given"),
    "policy of two": ("emit --case x --checkpoint y --out t --policy float32", "exactly one of --checkpoint DIR"),
    "nowhere to write": ("emit --case x --policy float32", "--out"),
    "no such case": ("emit --case x --out t --policy float32", "case 'x' is unknown"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(
    refmoe: Refmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    arguments, words = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    status, out, err = refmoe(*arguments.split())
    assert (status, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
