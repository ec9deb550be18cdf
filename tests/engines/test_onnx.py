# SPDX-License-Identifier: Apache-2.0
"""A Mixtral exported to ONNX and run by onnxruntime. Its sigmoid in float32 has absolute precision alone."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.checkpoints.write import write_checkpoint
from refmoe.engines.adapter import Arrays
from refmoe.engines.adapters import onnx
from refmoe.engines.options import made
from refmoe.engines.protocol import TAPS
from refmoe.errors import InputError
from refmoe.profiles.load import policy
from refmoe.spec.taps import step_of, tap_names
from refmoe.suite import Case, read_case
from refmoe.traces.trace import Header, read_trace, write_trace
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT, Report
from refmoe.verifier.verify import verify

GOLDEN = Path(__file__).parents[2] / "golden"
MISSING = [name for name in ("onnxruntime", "onnxscript", "torch", "transformers") if find_spec(name) is None]
needs_engine = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: pip install -e '.[onnx]'")


def loaded(case: Case, folder: Path, dtype: str = "float32", **options: str) -> onnx.Adapter:
    """An adapter with the case's model."""
    write_checkpoint(folder / "model", case.config, case.checkpoint().parameters, dtype="bfloat16")
    adapter = onnx.Adapter(**options)
    adapter.load(folder / "model", dtype)
    return adapter


def judged(case: Case, arrays: Arrays, dtype: str, folder: Path, name: str = "") -> Report:
    """The report on arrays under the policy of this name, or of a dtype."""
    path, name = folder / "trace.safetensors", name or onnx.Adapter.policies[dtype]
    write_trace(path, Header(case.runs(), case.name, policy=name), arrays)
    return verify(read_trace(path), case.name, case.config, case.checkpoint().parameters, case.runs(), policy(name))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises((InputError, ModuleNotFoundError), match="onnxruntime"):
        onnx.Adapter()
    for options in ({"optimise": "yes"}, {"taps": "some"}):
        with pytest.raises(InputError, match=f"option {next(iter(options))} is"):
            made("onnx", onnx.Adapter, options)


@needs_engine
@pytest.mark.parametrize("name", ["walking-skeleton", "shared-prefix"])
def test_in_float16_it_conforms(name: str, tmp_path: Path) -> None:
    """Chunks, decodes, cuts of the cache, a head_dim of its own; experts in the slots of router.experts."""
    case = read_case(GOLDEN / name)
    adapter = loaded(case, tmp_path, "float16")
    arrays = adapter.run(case.runs(), adapter.taps)
    report = judged(case, arrays, "float16", tmp_path)
    assert report.verdict == CONFORMANT, report.headline
    assert (report.missing, report.unknown) == (("attention.scores",), ())
    seen = [tap for tap in tap_names(case.config) if step_of(tap) != "attention.scores"]
    assert arrays.keys() == {f"{run.run}/{tap}" for run in case.runs() for tap in seen}


@needs_engine
def test_in_float32_a_sigmoid_has_absolute_precision_alone(tmp_path: Path) -> None:
    """onnxruntime's sigmoid errs by 3 units of 1 even where it is small: microsoft/onnxruntime#22557 and #26281.

    The case has a window, and sequences of several lengths with a cache each.
    """
    case = read_case(GOLDEN / "window-lengths")
    adapter = loaded(case, tmp_path)
    arrays = adapter.run(case.runs(), adapter.taps)
    assert judged(case, arrays, "float32", tmp_path).verdict == CONFORMANT
    report = judged(case, arrays, "float32", tmp_path, "hf-float32")
    assert report.verdict == NOT_CONFORMANT
    assert {check.step for check in report.checks if check.verdict == "fail"} == {"expert.hidden"}
    for run in case.runs():
        gate, up, hidden = (
            arrays[f"{run.run}/layers.0.expert.{name}"].astype(np.float64) for name in ("gate", "up", "hidden")
        )
        sigmoid = 1 / (1 + np.exp(-gate))
        unit = 2.0**-24
        assert (abs(hidden - gate * sigmoid * up) <= unit * abs(gate * up) * (3 + 2 * sigmoid)).all()


@needs_engine
@pytest.mark.parametrize("name", ["dims-distinct", "dyadic-top-4"])
def test_where_no_gate_is_far_below_0_the_profile_of_transformers_holds_too(name: str, tmp_path: Path) -> None:
    case = read_case(GOLDEN / name)
    adapter = loaded(case, tmp_path)
    report = judged(case, adapter.run(case.runs(), adapter.taps), "float32", tmp_path, "hf-float32")
    assert report.verdict == CONFORMANT, report.headline


@needs_engine
def test_a_graph_of_logits_alone_conforms_too(tmp_path: Path) -> None:
    """Without taps inside the graph, onnxruntime may fuse everything."""
    case = read_case(GOLDEN / "square")
    adapter = loaded(case, tmp_path, taps="logits")
    assert adapter.taps == ("logits",)
    arrays = adapter.run(case.runs(), adapter.taps)
    assert arrays.keys() == {f"{run.run}/logits" for run in case.runs()}
    assert judged(case, arrays, "float32", tmp_path).verdict == CONFORMANT


@needs_engine
def test_the_sigmoid_of_onnxruntime_has_no_relative_precision() -> None:
    import onnxruntime
    from onnx import TensorProto, helper  # type: ignore[import-not-found, unused-ignore]

    def sigmoid(x: np.ndarray[Any, Any], dtype: int) -> np.ndarray[Any, Any]:
        node = helper.make_node("Sigmoid", ["x"], ["y"])
        given, made = (helper.make_tensor_value_info(name, dtype, ["n"]) for name in "xy")
        model = helper.make_model(
            helper.make_graph([node], "sigmoid", [given], [made]), opset_imports=[helper.make_opsetid("", 18)],
            ir_version=10,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"x": x})[0]).astype(np.float64)

    x = np.linspace(-30, 30, 60_001)
    exact = 1 / (1 + np.exp(-x))
    for dtype, kind, unit in ((TensorProto.FLOAT, np.float32, 2.0**-24), (TensorProto.DOUBLE, np.float64, 2.0**-53)):
        error = abs(sigmoid(x.astype(kind), dtype) - 1 / (1 + np.exp(-x.astype(kind).astype(np.float64))))
        assert error.max() <= 3 * unit
        assert (error > 1000 * unit * exact).any()


def test_what_it_promises() -> None:
    assert set(onnx.GIVEN["all"]) == set(TAPS) - {"attention.scores"}
