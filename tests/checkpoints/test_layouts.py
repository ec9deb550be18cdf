# SPDX-License-Identifier: Apache-2.0
"""Every layout on disk gives an equal model, and no weight is read before it is used."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from refmoe.checkpoints.layout import Checkpoint
from refmoe.checkpoints.load import checkpoint_digest, has_weights, load_checkpoint
from refmoe.checkpoints.mistral import half_split, interleaved
from refmoe.checkpoints.names import named_weights
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.weight import Weight
from refmoe.checkpoints.write import write_checkpoint
from refmoe.errors import InputError
from refmoe.spec.config import Config
from tests.checkpoints.models import DTYPES, UNEVEN, assert_same_values, put_together, rename, take_apart

SOURCE = synthetic_checkpoint(UNEVEN, seed=7)
Floats = np.ndarray[Any, Any]


def check(loaded: Checkpoint, layout: str, dtype: str, files: int) -> None:
    assert loaded.config == UNEVEN
    assert loaded.layout == layout
    assert loaded.dtypes == (DTYPES[dtype],)
    assert len(loaded.files) == files
    assert_same_values(loaded.parameters, SOURCE.parameters)
    for name, weight in named_weights(loaded.parameters).items():
        assert weight.name == name
        assert weight.shape == weight.read().shape
        assert weight.dtype == weight.read().dtype == np.dtype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
@pytest.mark.parametrize("rope_parameters", [False, True], ids=["rope_theta", "rope_parameters"])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("block", ["block_sparse_moe", "mlp"])
def test_hugging_face_layouts_hold_the_same_model(
    tmp_path: Path, block: str, fused: bool, rope_parameters: bool, shards: bool, dtype: str
) -> None:
    write_checkpoint(
        tmp_path, UNEVEN, SOURCE.parameters, dtype, fused=fused, rope_parameters=rope_parameters, shards=shards
    )
    if block != "block_sparse_moe":
        for path in tmp_path.glob("model*"):
            rename(path, ".block_sparse_moe.", f".{block}.")
    check(load_checkpoint(tmp_path), "hf", dtype, UNEVEN.layers + 1 if shards else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("files", ["one-file", "shards", "shards-without-index"])
def test_mistral_layouts_hold_the_same_model(tmp_path: Path, files: str, dtype: str) -> None:
    shards = files != "one-file"
    write_checkpoint(tmp_path, UNEVEN, SOURCE.parameters, dtype, "mistral", shards=shards)
    if files == "shards-without-index":
        (tmp_path / "consolidated.safetensors.index.json").unlink()
    check(load_checkpoint(tmp_path), "mistral", dtype, UNEVEN.layers + 1 if shards else 1)


def test_a_folder_with_both_layouts_gives_either(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, UNEVEN, SOURCE.parameters)
    write_checkpoint(tmp_path, UNEVEN, SOURCE.parameters, layout="mistral")
    check(load_checkpoint(tmp_path), "hf", "bfloat16", 1)
    check(load_checkpoint(tmp_path, "hf"), "hf", "bfloat16", 1)
    check(load_checkpoint(tmp_path, "mistral"), "mistral", "bfloat16", 1)
    (tmp_path / "model.safetensors").unlink()  # both configurations, but weights of one layout only
    check(load_checkpoint(tmp_path), "mistral", "bfloat16", 1)


def test_weights_may_begin_at_any_byte(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, UNEVEN, SOURCE.parameters, "float32")
    path = tmp_path / "model.safetensors"
    for shift in range(8):
        put_together(path, *take_apart(path), shift=shift)
        check(load_checkpoint(tmp_path), "hf", "float32", 1)


def test_a_square_model_derives_its_head_dim(tmp_path: Path) -> None:
    square = replace(UNEVEN, dim=48, head_dim=8)
    model = synthetic_checkpoint(square, seed=1)
    write_checkpoint(tmp_path, square, model.parameters)
    text = (tmp_path / "config.json").read_text()
    assert '"head_dim": 8' in text
    (tmp_path / "config.json").write_text(text.replace('"head_dim": 8', '"head_dim": null'))
    assert load_checkpoint(tmp_path).config == square


def test_the_digest_covers_every_shard_in_name_order(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, UNEVEN, SOURCE.parameters, shards=True)
    loaded = load_checkpoint(tmp_path)
    digest = checkpoint_digest(loaded)
    assert digest == checkpoint_digest(replace(loaded, files=loaded.files[::-1]))
    path = loaded.files[1]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert checkpoint_digest(loaded) != digest


@pytest.mark.parametrize(("layout", "name"), [("hf", "config.json"), ("mistral", "params.json")])
def test_the_digest_is_that_of_the_configuration_and_the_weights(tmp_path: Path, layout: str, name: str) -> None:
    """With the same weights, another norm_eps gives other taps; anybody can compute the digest with sha256sum."""
    write_checkpoint(tmp_path, UNEVEN, SOURCE.parameters, layout=layout, shards=True)
    loaded = load_checkpoint(tmp_path)
    bytes_ = (tmp_path / name).read_bytes() + b"".join(path.read_bytes() for path in sorted(loaded.files))
    assert checkpoint_digest(SOURCE) is None
    assert checkpoint_digest(loaded) == f"sha256:{hashlib.sha256(bytes_).hexdigest()}"
    (tmp_path / name).write_text((tmp_path / name).read_text().replace(str(UNEVEN.norm_eps), "0.001"))
    changed = load_checkpoint(tmp_path)
    assert changed.config == replace(UNEVEN, norm_eps=0.001)
    assert checkpoint_digest(changed) != f"sha256:{hashlib.sha256(bytes_).hexdigest()}"


# Tied embeddings


TIED = replace(SOURCE.parameters, output=SOURCE.parameters.embedding)
"""The parameters of `SOURCE` with the embedding for an output matrix."""


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_a_tied_checkpoint_stores_the_embedding_once(tmp_path: Path, layout: str, shards: bool) -> None:
    write_checkpoint(tmp_path, UNEVEN, TIED, layout=layout, shards=shards)
    names = {name for path in tmp_path.glob("*.safetensors") for name in take_apart(path)[0]}
    assert not names & {"lm_head.weight", "output.weight"}
    loaded = load_checkpoint(tmp_path)
    assert loaded.tied
    assert not SOURCE.tied
    assert_same_values(loaded.parameters, TIED)


def test_an_equal_output_matrix_beside_a_tied_embedding_is_the_embedding(tmp_path: Path) -> None:
    assert isinstance(TIED.embedding, Weight)
    twice = replace(TIED, output=replaced_name(TIED.embedding, "output"))
    write_checkpoint(tmp_path, UNEVEN, twice)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert "lm_head.weight" in take_apart(tmp_path / "model.safetensors")[0]
    loaded = load_checkpoint(tmp_path)
    assert loaded.tied
    assert_same_values(loaded.parameters, TIED)


def replaced_name(weight: Weight, name: str) -> Weight:
    """Another parameter with the values of this one."""
    return Weight(name=name, shape=weight.shape, dtype=weight.dtype, source=weight.read, origin=name)


# Which files


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_may_not_be_listed_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        os.seteuid(65534)
        try:
            with pytest.raises(InputError, match="cannot be read: permission denied"):
                has_weights(Path(folder))
        finally:
            os.seteuid(0)


def test_an_index_may_name_the_one_file_beside_it(tmp_path: Path) -> None:
    """Tools that merge shards leave an index of one file."""
    write_checkpoint(tmp_path, UNEVEN, SOURCE.parameters)
    names = take_apart(tmp_path / "model.safetensors")[0].keys() - {"__metadata__"}
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_values(load_checkpoint(tmp_path).parameters, SOURCE.parameters)


# Writing


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for _ in range(2):
        write_checkpoint(tmp_path, UNEVEN, SOURCE.parameters, shards=True)
        digest = checkpoint_digest(load_checkpoint(tmp_path))
    write_checkpoint(tmp_path / "again", UNEVEN, SOURCE.parameters, shards=True)
    assert digest == checkpoint_digest(load_checkpoint(tmp_path / "again"))


PUBLISHED = """
    architectures attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range intermediate_size
    max_position_embeddings model_type num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads
    num_local_experts output_router_logits rms_norm_eps rope_theta router_aux_loss_coef sliding_window
    tie_word_embeddings torch_dtype transformers_version use_cache vocab_size
"""
"""The fields of config.json in mistralai/Mixtral-8x7B-v0.1."""


def test_every_published_field_is_written(tmp_path: Path) -> None:
    """Engines read fields of the published file without asking: keras-hub output_router_logits, for one."""
    write_checkpoint(tmp_path, UNEVEN, SOURCE.parameters)
    assert set(PUBLISHED.split()) <= json.loads((tmp_path / "config.json").read_text()).keys()


def test_weights_of_another_checkpoint_are_not_left_beside_new_ones(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, UNEVEN, SOURCE.parameters, shards=True)
    with pytest.raises(InputError, match=r"of another checkpoint"):
        write_checkpoint(tmp_path, UNEVEN, SOURCE.parameters)
    assert load_checkpoint(tmp_path).config == UNEVEN


def test_a_value_that_a_dtype_cannot_hold_is_not_written(tmp_path: Path) -> None:
    for exponents in ({"w2": 60}, {"w2": -60}):
        large = synthetic_checkpoint(UNEVEN, 7, exponents)
        write_checkpoint(tmp_path, UNEVEN, large.parameters, "bfloat16")
        with pytest.raises(InputError, match=r"'layers.0.experts.0.w2' has values that float16 cannot hold"):
            write_checkpoint(tmp_path / "half", UNEVEN, large.parameters, "float16")
        assert not (tmp_path / "half" / "config.json").exists()


# Rotary rows


@given(heads=st.integers(1, 7), pairs=st.integers(1, 9), dim=st.integers(1, 5))
def test_half_split_and_interleaved_are_inverse(heads: int, pairs: int, dim: int) -> None:
    """ROPE-3, with the new place of each row."""
    head_dim = 2 * pairs
    rows = np.arange(heads * head_dim * dim).reshape(heads * head_dim, dim)
    split = half_split(rows, head_dim)
    assert np.array_equal(interleaved(split, head_dim), rows)
    assert np.array_equal(half_split(interleaved(rows, head_dim), head_dim), rows)
    for head in range(heads):
        first = head * head_dim
        for i in range(pairs):
            assert np.array_equal(split[first + i], rows[first + 2 * i])
            assert np.array_equal(split[first + pairs + i], rows[first + 2 * i + 1])


def turned_as_complex(x: Floats, angles: Floats) -> Floats:
    """Mistral's own rotation: elements 2i and 2i + 1 are one complex number. x: [T, heads, d]   angles: [T, d/2]"""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def turned_in_halves(x: Floats, angles: Floats) -> Floats:
    """The spec's rotation: element i with i + d/2."""
    turn = np.exp(1j * angles)[:, None]
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * turn.real - b * turn.imag, b * turn.real + a * turn.imag], axis=-1)


def test_scores_are_those_of_mistrals_complex_rotation(tmp_path: Path) -> None:
    """ROPE-3: Mistral's rotation of the rows in the file gives the scores of the spec's rotation of the loaded rows."""
    write_checkpoint(tmp_path, UNEVEN, SOURCE.parameters, "float32", "mistral")
    weights = named_weights(load_checkpoint(tmp_path).parameters)
    with safe_open(tmp_path / "consolidated.safetensors", framework="np") as file:
        stored = [file.get_tensor(f"layers.1.attention.{w}.weight").astype(np.float64) for w in ("wq", "wk")]
    loaded = [weights[f"layers.1.attention.{w}"].read().astype(np.float64) for w in ("wq", "wk")]

    tokens, dim, head_dim = 9, UNEVEN.dim, UNEVEN.head_dim
    x = np.random.default_rng(5).standard_normal((tokens, dim))
    positions = np.array([0, 1, 2, 3, 57, 58, 1000, 32767, 100000])
    angles = positions[:, None] * UNEVEN.rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)

    def scores(turn: Any, matrices: list[Floats]) -> Floats:
        q, k = (turn((x @ w.T).reshape(tokens, -1, head_dim), angles) for w in matrices)
        products: Floats = np.einsum("thd,shd->hts", q, np.repeat(k, UNEVEN.heads // UNEVEN.kv_heads, axis=1))
        return products

    found, expected = scores(turned_in_halves, loaded), scores(turned_as_complex, stored)
    # Each score is a sum of products; a term passes through at most this many roundings on its way: one dot product
    # of length D, two products and a sum of the rotation, for query and key, and the dot product of length d.
    roundings = 2 * (dim + 3) + head_dim
    unit = 2.0**-53
    # the sum of the terms' sizes: no larger than with every factor replaced by its size, cos and sin by one
    sizes = [(abs(x) @ abs(w).T).reshape(tokens, -1, head_dim) for w in loaded]
    turned = [np.tile(a + b, 2) for a, b in (np.split(size, 2, axis=-1) for size in sizes)]
    total = np.einsum("thd,shd->hts", turned[0], np.repeat(turned[1], UNEVEN.heads // UNEVEN.kv_heads, axis=1))
    bound = 2 * total * roundings * unit / (1 - roundings * unit)  # each of the two is this far from the real number
    assert (abs(found - expected) <= bound).all()

    unmapped = scores(turned_in_halves, stored)
    assert (abs(unmapped - expected) > bound).mean() > 0.8, "the comparison must see rows that were not mapped"


# Memory

LARGE = Config(
    dim=256, layers=1, heads=4, kv_heads=2, head_dim=32, hidden_dim=1024, vocab=512, experts=8, experts_per_token=2
)


def owner(array: Any) -> Any:
    """The object that owns the memory of an array."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


@pytest.mark.parametrize("variant", ["apart", "fused", "mistral"])
def test_weights_are_mapped_and_read_one_at_a_time(tmp_path: Path, variant: str) -> None:
    model = synthetic_checkpoint(LARGE, seed=3)
    layout = "mistral" if variant == "mistral" else "hf"
    write_checkpoint(tmp_path, LARGE, model.parameters, layout=layout, fused=variant == "fused")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size > 12_000_000
    tracemalloc.start()
    try:
        loaded = load_checkpoint(tmp_path)
        _, after_load = tracemalloc.get_traced_memory()
        for weight in named_weights(loaded.parameters).values():
            weight.read()
        _, after_reads = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after_load < 500_000
    largest = max(math.prod(weight.shape) for weight in named_weights(loaded.parameters).values())
    assert after_reads < 4 * largest + 500_000  # the check for NaN and Inf takes three bytes an element, for a moment
    for name, weight in named_weights(loaded.parameters).items():
        copied = variant == "mistral" and name.endswith((".wq", ".wk"))
        stored = weight.read()
        assert isinstance(owner(stored), mmap.mmap) != copied, name
        assert type(stored) is np.ndarray
        if not copied:
            assert not stored.flags.writeable, name
            with pytest.raises(ValueError, match="read-only"):
                stored.flat[0] = 0


def test_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, UNEVEN, SOURCE.parameters)
    embedding = named_weights(load_checkpoint(tmp_path).parameters)["embedding"]
    ids = np.array([3, 0, 36, 3])
    assert np.array_equal(embedding.rows(ids), embedding.read()[ids])
