# SPDX-License-Identifier: Apache-2.0
"""Turns by a Hadamard matrix: its definition, and what llama.cpp makes of queries, keys, values and contexts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.arithmetic.turning import factor, matrix, turn
from refmoe.checkpoints.gguf_file import write_gguf
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.engines.adapters import llama_cpp_library as native
from refmoe.profiles.load import policy
from refmoe.spec.config import Config
from refmoe.traces.script import plan

engine = pytest.mark.skipif(
    find_spec("xllamacpp") is None or find_spec("gguf") is None,
    reason="xllamacpp or gguf not installed: pip install -e '.[llama-cpp]'",
)


@pytest.mark.parametrize("n", [1, 2, 64, 128])
def test_an_entry_has_the_sign_of_the_bits_that_row_and_column_share(n: int) -> None:
    signs = [[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    np.testing.assert_array_equal(matrix(n), np.array(signs) * factor(n))
    assert factor(n) == np.float32(n**-0.5)


@pytest.mark.parametrize("n", [4, 64, 128])
def test_stages_give_the_product_with_the_matrix(n: int) -> None:
    x = np.random.default_rng(n).standard_normal((3, 2 * n))
    expected = (x.reshape(-1, n) @ matrix(n)).reshape(x.shape)
    np.testing.assert_allclose(turn(x, n, np.float64), expected, rtol=0, atol=1e-14 * n)
    twice = turn(turn(x, n, np.float64), n, np.float64)
    np.testing.assert_allclose(twice, x, rtol=2.0**-22, atol=2.0**-22)


WHOLE = "llama.cpp-cache-q8_0"


@pytest.mark.parametrize(
    ("name", "cut", "width", "block"),
    [
        (WHOLE, "cache.k", 64, 64), (WHOLE, "cache.k", 192, 64), (WHOLE, "cache.k", 256, 256),
        (WHOLE, "cache.v", 256, 64), (WHOLE, "cache.k", 96, 0), (WHOLE, "cache.v", 32, 0),
        (f"{WHOLE}+turn=none", "cache.k", 64, 0), (f"{WHOLE}+cache.k=float16", "cache.k", 64, 0),
        (f"{WHOLE}+cache.k=float16", "cache.v", 64, 64),
    ],
)  # fmt: skip
def test_what_is_turned_depends_on_the_head_and_on_its_cache(name: str, cut: str, width: int, block: int) -> None:
    assert policy(name).turned(cut, width) == block


Turns = dict[str, list[tuple[Any, Any]]]


def turns_of_llama_cpp(head_dim: int, folder: Path) -> Turns:
    """Per matrix of llama.cpp, the input and the result of each product with it."""
    config = Config(
        dim=64, layers=1, heads=2, kv_heads=1, head_dim=head_dim, hidden_dim=64, vocab=64, experts=2,
        experts_per_token=1, norm_eps=1e-5, rope_theta=1e4,
    )  # fmt: skip
    write_gguf(folder / "model.gguf", config, synthetic_checkpoint(config, 3).parameters, "float32")
    library = native.load_library(lambda _: None)
    model = library.llama_model_load_from_file(
        bytes(folder / "model.gguf"), library.llama_model_default_params()
    )  # fmt: skip
    found: Turns = {}

    def watch(tensor: Any, ask: bool, _: Any) -> bool:
        if not ask and library.ggml_op_desc(tensor) == b"MUL_MAT":
            name = native.source(tensor[0], 0).name.decode()
            if name.endswith("_rot"):
                read = native.to_numpy(native.source(tensor[0], 1))
                found.setdefault(name, []).append((read, native.to_numpy(tensor[0])))
        return True

    callback = native.EvalCallback(watch)
    native.set_turn("on")
    options = {"n_ctx": 256, "flash_attn_type": 1, "type_k": 8, "type_v": 8, "n_outputs_max_per_seq": 256}
    context = native.new_context(library, model, callback, options)
    native.decode(library, context, plan([("prefill", 0, [3, 14, 15, 9, 26])], config.vocab)[0], 0)
    library.llama_free(context)
    library.llama_model_free(model)
    return found


@engine
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_llama_cpp_turns_in_these_stages(head_dim: int, tmp_path: Path) -> None:
    """All bits. Queries and keys have one matrix, values and contexts the other one."""
    found, rules = turns_of_llama_cpp(head_dim, tmp_path), policy(WHOLE)
    for name, cut in (("attn_inp_k_rot", "cache.k"), ("attn_inp_v_rot", "cache.v")):
        block = rules.turned(cut, head_dim)
        assert len(found[name]) == 2
        for x, y in found[name]:
            assert x.shape[-1] == block
            np.testing.assert_array_equal(turn(x, block, np.float32), y)
