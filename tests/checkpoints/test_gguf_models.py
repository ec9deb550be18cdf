# SPDX-License-Identifier: Apache-2.0
"""Models in GGUF files: every weight is the number that the package gguf makes of it, however the file is laid out."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import refmoe as api
from refmoe.api.facts import model_facts
from refmoe.checkpoints.ggml_blocks import FORMATS
from refmoe.checkpoints.ggml_quantise import KINDS, format_of
from refmoe.checkpoints.gguf_file import write_gguf
from refmoe.checkpoints.load import checkpoint_digest, load_checkpoint
from refmoe.checkpoints.names import named_weights, parameter_shapes
from refmoe.checkpoints.rows import QuantisedCheckpoint, RowWeight
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.engines.adapters import llama_cpp
from refmoe.spec.config import Config
from refmoe.traces.script import Call, plan
from tests.checkpoints.gguf_names import canonical
from tests.command_line import Refmoe

pytestmark = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf not installed: pip install -e '.[test]'")
needs_engine = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="xllamacpp not installed: pip install -e '.[llama-cpp]'"
)
UNEVEN = Config(
    dim=256, layers=2, heads=6, kv_heads=3, head_dim=128, hidden_dim=512, vocab=301, experts=3, experts_per_token=2,
    norm_eps=2.0**-17, rope_theta=3e4,
)  # fmt: skip
"""Rows of one, two and three blocks of 256. All dimensions differ."""
MODEL = synthetic_checkpoint(UNEVEN, 5).parameters
OWN = [kind for kind in KINDS if not kind.startswith(("Q4_K", "Q5_K", "Q6_K"))]
"""The kinds that the package gguf quantises by itself."""
kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in OWN else needs_engine) for kind in KINDS]
)


def gguf() -> Any:
    return import_module("gguf")


def written(folder: Path, kind: str) -> Path:
    write_gguf(folder / "model.gguf", UNEVEN, MODEL, kind)
    return folder / "model.gguf"


def values_by_gguf(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every tensor, dequantised by the package."""
    reader = gguf().GGUFReader(path)
    return {each.name: gguf().quants.dequantize(each.data, each.tensor_type) for each in reader.tensors}


def expected(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every parameter by its canonical name, from the package's values."""
    return canonical(values_by_gguf(path), UNEVEN)


def assert_bits(found: NDArray[Any], wanted: NDArray[Any], name: str) -> None:
    assert found.dtype == wanted.dtype == np.float32, name
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32), err_msg=name)


@kinds
def test_every_weight_has_the_bits_that_gguf_gives(kind: str, tmp_path: Path) -> None:
    """Whole, some rows in any order, and a block of rows."""
    path = written(tmp_path, kind)
    loaded, wanted = load_checkpoint(path), expected(path)
    assert loaded.config == UNEVEN
    weights = named_weights(loaded.parameters)
    assert weights.keys() == wanted.keys()
    ids = [2, 1, 1, 0]
    for name, weight in weights.items():
        assert_bits(weight.read(), wanted[name], name)
        if len(weight.shape) == 2:
            assert_bits(weight.rows(ids), wanted[name][ids], name)
            assert_bits(weight.rows(np.array([[2], [0]])), wanted[name][[[2], [0]]], name)
            assert_bits(weight.rows(slice(1, 4)), wanted[name][1:4], name)
            assert_bits(weight.block(1, 4), wanted[name][1:4], name)
            assert weight.block(1, 4, np.float64).dtype == np.float64
    assert loaded.parameters.output is not loaded.parameters.embedding


def test_independent_readers_gave_the_same_weights() -> None:
    """In the results of `python -m bench.gguf_readers`; a zero may have the other sign."""
    rows = json.loads((Path(__file__).parents[2] / "bench" / "results" / "gguf_readers.json").read_text("utf-8"))
    assert {row["reader"].split()[0] for row in rows} == {"tinygrad", "candle-nn"}
    assert {row["format"] for row in rows if row["values"]} >= {*KINDS, "float32", "float16", "bfloat16"}
    assert [row for row in rows if row["equal"] + row["zeros"] != row["values"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q5_0", "Q4_1", "MXFP4"])
def test_tinygrad_reads_the_same_weights(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tinygrad.llm.gguf", reason="tinygrad not installed: pip install tinygrad==0.14.0")
    from bench.gguf_readers import by_tinygrad

    weights = named_weights(load_checkpoint(path := written(tmp_path, kind)).parameters)
    for name, wanted in canonical(by_tinygrad(path), UNEVEN).items():
        np.testing.assert_array_equal(weights[name].read(), wanted, err_msg=name)


@kinds
def test_a_file_tells_its_formats(kind: str, tmp_path: Path) -> None:
    """Of each weight, and of all of them together: the bits are those of the file's own data."""
    path = written(tmp_path, kind)
    loaded, facts = load_checkpoint(path), model_facts(str(path))
    assert isinstance(loaded, QuantisedCheckpoint)
    for name, shape in parameter_shapes(UNEVEN).items():
        weight = named_weights(loaded.parameters)[name]
        plain = len(shape) == 1 or name.endswith("gate")
        wanted = "F32" if plain else format_of(kind, UNEVEN, name, shape[1])
        assert (weight.format if isinstance(weight, RowWeight) else "F32") == wanted, name
    reader = gguf().GGUFReader(path)
    weights = sum(int(np.prod(each.shape)) for each in reader.tensors)
    assert facts["bits_per_weight"] == 8 * sum(int(each.n_bytes) for each in reader.tensors) / weights
    assert sum(each["weights"] for each in facts["formats"].values()) == weights == facts["total_parameters"]
    for name, each in facts["formats"].items():
        assert each["bits_per_weight"] == (FORMATS[name].bits if name in FORMATS else 32)
    assert facts["stored"] == sorted({each.tensor_type.name for each in reader.tensors})


def test_what_llama_cpp_mixes() -> None:
    """The formats of a Mixtral 8x7B in Q4_K_M, as `llama-quantize` prints them."""
    config = replace(UNEVEN, layers=32)
    found = {name: format_of("Q4_K_M", config, name, 4096) for name in parameter_shapes(config) if "norm" not in name}
    assert {name: found[name] for name in ("embedding", "output")} == {"embedding": "Q4_K", "output": "Q6_K"}
    layer = {name: found[f"layers.9.attention.{name}"] for name in ("wq", "wk", "wv", "wo")}
    assert layer == {"wq": "Q4_K", "wk": "Q8_0", "wv": "Q8_0", "wo": "Q5_K"}
    more = [i for i in range(32) if found[f"layers.{i}.experts.0.w2"] == "Q6_K"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert {found[f"layers.{i}.experts.0.{w}"] for i in range(32) for w in ("w1", "w3")} == {"Q4_K"}


def rewritten(source: Path, target: Path, change: Callable[[Any, Any], None]) -> Path:
    """The file once more.   change: adds the tensors of a reader to a writer"""
    reader, writer = gguf().GGUFReader(source), gguf().GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    change(reader, writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def add(writer: Any, name: str, tensor: Any, data: NDArray[Any]) -> None:
    writer.add_tensor(name, np.array(data), raw_dtype=tensor.tensor_type)


def one_tensor_an_expert(reader: Any, writer: Any) -> None:
    """As converters wrote a Mixtral until April 2024."""
    for tensor in reader.tensors:
        if "_exps" in tensor.name:
            for e, data in enumerate(tensor.data):
                add(writer, tensor.name.replace("_exps", f".{e}"), tensor, data)
        else:
            add(writer, tensor.name, tensor, tensor.data)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "float32"])
def test_an_old_file_with_one_tensor_an_expert(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, kind)
    old = load_checkpoint(rewritten(path, tmp_path / "old.gguf", one_tensor_an_expert))
    for name, wanted in expected(path).items():
        assert_bits(named_weights(old.parameters)[name].read(), wanted, name)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    """Split as `llama-gguf-split` does. The digest covers all parts."""
    path, names = written(tmp_path, "Q5_1"), [f"m-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]

    def part(number: int) -> Callable[[Any, Any], None]:
        def some(reader: Any, writer: Any) -> None:
            for key, value in {"split.no": number, "split.count": 3}.items():
                writer.add_uint16(key, value)
            for i, tensor in enumerate(reader.tensors):
                if i % 3 == number:
                    add(writer, tensor.name, tensor, tensor.data)

        return some

    for number, name in enumerate(names):
        rewritten(path, tmp_path / name, part(number))
    loaded = load_checkpoint(tmp_path / names[0])
    for name, wanted in expected(path).items():
        assert_bits(named_weights(loaded.parameters)[name].read(), wanted, name)
    every = hashlib.sha256(b"".join((tmp_path / name).read_bytes() for name in names)).hexdigest()
    assert checkpoint_digest(loaded) == f"sha256:{every}"
    assert model_facts(str(tmp_path / names[0]))["bits_per_weight"] == model_facts(str(path))["bits_per_weight"]
    with pytest.raises(api.InputError, match="first"):
        load_checkpoint(tmp_path / names[1])
    (tmp_path / names[2]).unlink()
    with pytest.raises(api.InputError, match=names[2]):
        load_checkpoint(tmp_path / names[0])


def test_a_tied_file_has_one_matrix(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", UNEVEN, replace(MODEL, output=MODEL.embedding), "Q8_0")
    loaded = load_checkpoint(tmp_path / "m.gguf")
    assert loaded.tied
    assert isinstance(loaded.parameters.output, RowWeight)


def test_some_rows_take_the_memory_of_some_rows(tmp_path: Path) -> None:
    """Not that of the matrix, nor that of all experts of the layer."""
    matrix = named_weights(load_checkpoint(written(tmp_path, "Q5_0")).parameters)["layers.0.experts.1.w1"]
    small, whole = 8 * UNEVEN.dim * 4, UNEVEN.experts * UNEVEN.hidden_dim * UNEVEN.dim * 4
    for read in (lambda: matrix.block(8, 16), lambda: matrix.rows([3, 9, 1, 0])):
        read()
        tracemalloc.start()
        read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12 * small < whole / 15


# ---- all doors


@pytest.mark.parametrize("kind", ["Q8_0", pytest.param("Q4_K_M", marks=needs_engine)])
def test_every_door_takes_the_file(kind: str, tmp_path: Path, refmoe: Refmoe) -> None:
    """A trace of the exact model is the exact model of the dequantised numbers, written as a float32 checkpoint."""
    path, trace = written(tmp_path, kind), tmp_path / "t.safetensors"
    tokens = [1, 31, 141]
    model = api.load(path)
    model.save(tmp_path / "dense", dtype="float32")
    dense = api.load(tmp_path / "dense").run(tokens, decode=[9])
    found = model.run(tokens, decode=[9])
    for run in ("prefill", "decode1"):
        np.testing.assert_array_equal(found[run, "logits"], dense[run, "logits"])
    assert api.verify(found, model, policy="float64").verdict == "conformant"
    said = refmoe("emit", "--checkpoint", path, "--tokens", "1,31,141", "--decode", "9", "--out", trace)
    assert said[0] == 0, said
    said = refmoe("verify", trace, "--checkpoint", path, "--policy", "float32")
    assert said[0] == 0, said
    assert refmoe("info", path)[0] == 0
    status, out, _ = refmoe("generate", "--checkpoint", path, "--tokens", "1,2", "--max-new-tokens", "2")
    assert (status, len(out.split())) == (0, 2)
    status, _, err = refmoe("generate", "--checkpoint", path, "--prompt", "x")
    assert (status, "vocabulary" in err) == (2, True)


@kinds
def test_materialise_writes_the_file(kind: str, tmp_path: Path, refmoe: Refmoe) -> None:
    """Twice over the same, and never over a stranger's."""
    for _ in range(2):
        said = refmoe("materialise", "production-underflow", tmp_path / "m", "--format", f"gguf:{kind}")
        assert said[0] == 0, said
    found = {each.tensor_type.name for each in gguf().GGUFReader(tmp_path / "m" / "model.gguf").tensors}
    assert found >= {"F32", format_of(kind, UNEVEN, "layers.0.attention.wq", 256)}
    rewritten(tmp_path / "m" / "model.gguf", tmp_path / "model.gguf", one_tensor_an_expert)
    before = (tmp_path / "model.gguf").read_bytes()
    assert refmoe("materialise", "production-underflow", tmp_path, "--format", f"gguf:{kind}")[0] == 2
    assert (tmp_path / "model.gguf").read_bytes() == before


def test_what_does_not_go_with_a_format(tmp_path: Path, refmoe: Refmoe) -> None:
    """Another dtype; rows that hold no whole block."""
    for options in (["--dtype", "bfloat16"], ["--layout", "hf"]):
        assert refmoe("materialise", "one-pair", tmp_path / "m", "--format", "gguf:Q8_0", *options)[0] == 2
    status, _, err = refmoe("materialise", "walking-skeleton", tmp_path / "m", "--format", "gguf:Q8_0")
    assert (status, "32" in err) == (2, True)
    assert not (tmp_path / "m").exists()


# ---- llama.cpp


@needs_engine
@pytest.mark.parametrize("kind", [*KINDS, "float16", "bfloat16"])
def test_llama_cpp_computes_the_model_of_the_file(kind: str, tmp_path: Path) -> None:
    """Its rows of the embedding have the same bits, and its logits are near. It quantises activations to 8 bits.

    Every expert is chosen, as one choice that flips changes all logits. To quantise the weights to 4 or 5 bits moves
    the logits further than to quantise the activations.
    """
    config, tokens = replace(UNEVEN, layers=2, experts=2), [1, 31, 141, 7, 250, 8]
    parameters = synthetic_checkpoint(config, 5).parameters
    for name in ("float32", kind):
        write_gguf(tmp_path / f"{name}.gguf", config, parameters, name)
    adapter = llama_cpp.Adapter()
    adapter.config, defaults = config, adapter.library.llama_model_default_params()
    adapter.model = adapter.library.llama_model_load_from_file(bytes(tmp_path / f"{kind}.gguf"), defaults)
    assert adapter.model
    found = adapter.run(plan([Call("prefill", 0, tokens)], config.vocab), {"embedding", "logits"})
    adapter.library.llama_model_free(adapter.model)
    of_file, before = (api.load(tmp_path / f"{name}.gguf").run(tokens, dtype="float64") for name in (kind, "float32"))
    np.testing.assert_array_equal(found["prefill/embedding"], of_file["prefill", "embedding"])
    near, far = (
        np.linalg.norm(found["prefill/logits"] - run["prefill", "logits"]) / np.linalg.norm(run["prefill", "logits"])
        for run in (of_file, before)
    )
    assert near < 0.05
    assert near < far / 2 or kind in ("Q8_0", "Q6_K", "float16", "bfloat16")
