# SPDX-License-Identifier: Apache-2.0
"""llama.cpp: the GGUF file that refmoe writes for it, and its taps, judged by its own profile."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from refmoe.checkpoints import gguf_file
from refmoe.checkpoints.mistral import half_split
from refmoe.checkpoints.names import named_weights
from refmoe.checkpoints.weight import Weight
from refmoe.checkpoints.write import write_checkpoint
from refmoe.engines.adapter import Arrays, Skipped
from refmoe.engines.adapters import llama_cpp, llama_cpp_library
from refmoe.engines.options import made
from refmoe.errors import InputError
from refmoe.profiles.cut_points import PROJECTIONS
from refmoe.profiles.load import policy
from refmoe.suite import Case, read_case
from refmoe.suite.manifest import trace_path
from refmoe.traces.trace import Header, read_trace, write_trace
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT, Report
from refmoe.verifier.verify import verify

GOLDEN = Path(__file__).parents[2] / "golden"
INSTALL = "not installed: pip install -e '.[llama-cpp]'"
needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason=f"gguf {INSTALL}")
needs_engine = pytest.mark.skipif(
    find_spec("xllamacpp") is None or find_spec("gguf") is None, reason=f"xllamacpp or gguf {INSTALL}"
)

CASES = (
    "walking-skeleton", "batch-ragged", "shared-prefix", "packed", "one-shot-chunked-stepwise", "positions-32768",
    "head-dim-free", "square", "top-1", "top-all", "experts-12", "tie-second-third", "attention-underflow", "zero-row",
)  # fmt: skip
"""Cases in which an adapter can go wrong: sequences, cuts of the cache, shapes of every kind, slots."""


def loaded(case: Case, folder: Path, **options: str) -> llama_cpp.Adapter:
    """An adapter with the case's model."""
    write_checkpoint(folder / "model", case.config, case.checkpoint().parameters, dtype="bfloat16")
    adapter = llama_cpp.Adapter(**options)
    adapter.load(folder / "model", "float32")
    return adapter


def judged(case: Case, arrays: Arrays, name: str, folder: Path) -> Report:
    """The report on arrays under a policy."""
    path = folder / "trace.safetensors"
    write_trace(path, Header(case.runs(), case.name, policy=name), arrays)
    return verify(read_trace(path), case.name, case.config, case.checkpoint().parameters, case.runs(), policy(name))


@needs_gguf
def test_a_gguf_file_holds_the_checkpoint(tmp_path: Path) -> None:
    """Every parameter is there once with its values; queries and keys come back by turning their rows back."""
    import gguf  # type: ignore[import-not-found, unused-ignore]

    case = read_case(GOLDEN / "dims-distinct")
    config, parameters = case.config, case.checkpoint().parameters
    gguf_file.write_gguf(tmp_path / "model.gguf", config, parameters)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")

    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    expected = {
        "block_count": 1, "embedding_length": 72, "attention.head_count": 12, "attention.head_count_kv": 3,
        "attention.key_length": 6, "attention.value_length": 6, "rope.dimension_count": 6, "feed_forward_length": 40,
        "expert_count": 5, "expert_used_count": 2, "vocab_size": 97, "rope.freq_base": 30000.0,
        "attention.layer_norm_rms_epsilon": float(np.float32(1e-5)), "context_length": config.context,
    }  # fmt: skip
    assert {name: fields[f"llama.{name}"] for name in expected} == expected

    tensors = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}
    weights = {name: np.asarray(weight.read()).astype(np.float32) for name, weight in named_weights(parameters).items()}
    found = {name: tensors.pop(f"{theirs}.weight") for name, theirs in gguf_file.MODEL_TENSORS.items()}
    for name, theirs in gguf_file.LAYER_TENSORS.items():
        array = tensors.pop(f"blk.0.{theirs}.weight")
        turned = name in ("attention.wq", "attention.wk")
        if turned:
            assert not np.array_equal(array, weights[f"layers.0.{name}"])
        found[f"layers.0.{name}"] = half_split(array, config.head_dim) if turned else array
    for name, theirs in gguf_file.EXPERT_TENSORS.items():
        for e, array in enumerate(tensors.pop(f"blk.0.{theirs}.weight")):
            found[f"layers.0.experts.{e}.{name}"] = array
    assert not tensors
    assert found.keys() == weights.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)


@needs_engine
@pytest.mark.parametrize("cache", ["float32", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_conforms_to_its_profile(name: str, cache: str, tmp_path: Path) -> None:
    case = read_case(GOLDEN / name)
    adapter = loaded(case, tmp_path, cache=cache)
    report = judged(case, adapter.run(case.runs(), adapter.taps), adapter.policies["float32"], tmp_path)
    assert report.verdict == CONFORMANT, report.headline
    assert report.missing == ("attention.scores",)
    assert report.unknown == ()


@needs_engine
def test_where_every_sum_is_exact_llama_cpp_has_the_golden_bits(tmp_path: Path) -> None:
    case = read_case(GOLDEN / "dyadic")
    adapter = loaded(case, tmp_path)
    found = adapter.run(case.runs(), adapter.taps)
    golden = read_trace(trace_path(GOLDEN / "dyadic"))
    for key, array in found.items():
        run, _, tap = key.partition("/")
        np.testing.assert_array_equal(array, golden.get(run, tap), err_msg=key)


@needs_engine
def test_only_the_taps_asked_for(tmp_path: Path) -> None:
    case = read_case(GOLDEN / "walking-skeleton")
    adapter = loaded(case, tmp_path)
    every = adapter.run(case.runs(), adapter.taps)
    some = adapter.run(case.runs(), {"logits", "moe.output"})
    assert some.keys() == {key for key in every if key.endswith(("/logits", ".moe.output"))}
    for key, array in some.items():
        np.testing.assert_array_equal(array, every[key])


@needs_engine
def test_a_float16_cache_is_not_float32(tmp_path: Path) -> None:
    case = read_case(GOLDEN / "walking-skeleton")
    adapter = loaded(case, tmp_path, cache="float16")
    report = judged(case, adapter.run(case.runs(), adapter.taps), "llama.cpp-float32", tmp_path)
    assert report.verdict == NOT_CONFORMANT
    assert report.first_wrong == ("prefill", "layers.0.attention.probs")


@needs_engine
def test_flash_attention_sums_values_in_float16(tmp_path: Path) -> None:
    """llama.cpp's default. Only its own profile allows that sum, and nothing else differs from the others."""
    case = read_case(GOLDEN / "walking-skeleton")
    adapter = loaded(case, tmp_path, cache="float16", flash="on")
    assert "attention.probs" not in adapter.taps
    arrays = adapter.run(case.runs(), adapter.taps)
    assert judged(case, arrays, adapter.policies["float32"], tmp_path).verdict == CONFORMANT
    report = judged(case, arrays, "llama.cpp-float32-cache-float16", tmp_path)
    assert report.verdict == NOT_CONFORMANT
    assert {check.step for check in report.checks if check.verdict == "fail"} == {"attention.context"}


@needs_engine
@pytest.mark.parametrize("flash", ["on", "off"])
@pytest.mark.parametrize("file", ["float16", "bfloat16"])
def test_files_of_16_bits_round_the_inputs_of_products_and_nothing_else(file: str, flash: str, tmp_path: Path) -> None:
    """Gains and the router's matrix are float32 in such a file. Without the policy's inputs no product would pass."""
    case = read_case(GOLDEN / "walking-skeleton")
    adapter = loaded(case, tmp_path, cache="float16", flash=flash, file=file)
    arrays = adapter.run(case.runs(), adapter.taps)
    report = judged(case, arrays, adapter.policies["float32"], tmp_path)
    assert report.verdict == CONFORMANT, report.headline
    other = judged(case, arrays, llama_cpp.policy_of("float32", "float16", flash), tmp_path)
    wrong = {check.step for check in other.checks if check.verdict == "fail"}
    assert wrong == {*PROJECTIONS} - {"router.logits"}


@needs_engine
def test_a_file_that_cannot_hold_the_weights_is_skipped(tmp_path: Path) -> None:
    case = read_case(GOLDEN / "walking-skeleton")
    parameters = replace(case.checkpoint().parameters, output=halved(case.checkpoint().parameters.output))
    write_checkpoint(tmp_path / "model", case.config, parameters, dtype="float32")
    with pytest.raises(Skipped, match="cannot hold"):
        llama_cpp.Adapter(file="float16").load(tmp_path / "model", "float32")


def halved(weight: Any) -> Weight:
    """The weight times 2^-40, which is below what float16 holds."""
    return Weight(
        name=weight.name,
        shape=weight.shape,
        dtype=np.dtype(np.float32),
        source=lambda: weight.read().astype(np.float32) * np.float32(2.0**-40),
        origin=weight.origin,
    )


def test_a_row_of_nan_is_no_leak_and_a_probability_of_an_empty_cell_is() -> None:
    case = read_case(GOLDEN / "walking-skeleton")
    run = case.runs()[0]
    array = np.zeros((1, case.config.heads, len(run.tokens), llama_cpp.PAD), np.float32)
    array[0, 0, 0] = np.nan
    found = llama_cpp.shaped("layers.0.attention.probs", array, case.config, run)
    assert np.isnan(found[0, 0]).all()
    array[0, 1, 0, -1] = 0.5
    with pytest.raises(RuntimeError, match="no token of this sequence"):
        llama_cpp.shaped("layers.0.attention.probs", array, case.config, run)


@needs_engine
def test_a_window_is_skipped_where_it_hides_something(tmp_path: Path) -> None:
    case = read_case(GOLDEN / "window-decode")
    adapter = loaded(case, tmp_path)
    with pytest.raises(Skipped, match=r"no window; this model's is 4") as caught:
        adapter.run(case.runs(), adapter.taps)
    assert caught.value.issue is not None
    first = case.runs()[0]
    within = replace(first, tokens=first.tokens[:4], positions=first.positions[:4])
    assert adapter.run([within], {"logits"}).keys() == {f"{first.run}/logits"}


@needs_engine
def test_options_and_builds_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ({"cache": "q5_0"}, {"flash": "auto"}, {"threads": "two"}, {"file": "q4_0"}, {"turn": "half"})
    impossible = ({"flash": "off", "cache": "q8_0"}, {"turn": "off", "cache": "float16"})
    for options in (*wrong, *impossible):
        with pytest.raises(InputError, match=f"option {next(iter(options))} is"):
            made("llama_cpp", llama_cpp.Adapter, options)
    monkeypatch.setitem(llama_cpp_library.DEFAULTS, "n_ubatch", 511)
    with pytest.raises(RuntimeError, match="n_ubatch = 512 by default, but 511 was expected"):
        llama_cpp.Adapter()


@needs_engine
def test_it_answers_behind_the_protocol(tmp_path: Path) -> None:
    """The output of the library does not come between the answers."""
    case = read_case(GOLDEN / "walking-skeleton")
    write_checkpoint(tmp_path / "model", case.config, case.checkpoint().parameters, dtype="bfloat16")
    runs = [{**vars(run), "tokens": list(run.tokens), "positions": list(run.positions)} for run in case.runs()]
    requests = [
        {"command": "start", "protocol": "1"},
        {"command": "load", "checkpoint": str(tmp_path / "model"), "dtype": "float32"},
        {"command": "run", "runs": runs, "taps": ["logits"], "out": str(tmp_path / "out.safetensors")},
        {"command": "stop"},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "refmoe.engines.serve", "llama_cpp", "cache=float16"], check=True, capture_output=True,
        input="".join(json.dumps(request) + "\n" for request in requests), text=True, cwd=GOLDEN.parent, timeout=60,
    )  # fmt: skip
    start, *others = map(json.loads, done.stdout.splitlines())
    assert start["policies"] == {"float32": "llama.cpp-float32-cache-float16"}
    assert others == [{"ok": True}] * 3
    logits = load_file(tmp_path / "out.safetensors")
    assert logits.keys() == {f"{run.run}/logits" for run in case.runs()}
