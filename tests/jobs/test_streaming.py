# SPDX-License-Identifier: Apache-2.0
"""Weights in blocks: the same product, each block read once and ahead; a fault is one sentence."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from refmoe.arithmetic import streaming
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.formats import OF_DTYPE
from refmoe.arithmetic.native.lanes import Lanes
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.checkpoints.layout import whole
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.synthetic import SyntheticWeight
from refmoe.checkpoints.weight import Weight
from refmoe.checkpoints.weight_edits import Edit
from refmoe.checkpoints.write import write_checkpoint
from refmoe.errors import InputError
from refmoe.files.safetensors_file import open_safetensors, write_tensors
from refmoe.profiles.load import policy
from refmoe.steps.enclosure_ops import EnclosureOps
from tests.checkpoints.models import UNEVEN
from tests.models import random_parameters


def rows_of(values: Any) -> Any:
    return Weight(name="w", shape=values.shape, dtype=values.dtype, source=lambda: values, origin="test")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 64)
    monkeypatch.setattr(streaming, "COMPUTED_BLOCK", 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("height", [1, 3, 4, 5, 63, 64])
def test_a_streamed_product_is_the_product(height: int) -> None:
    rng = np.random.default_rng(height)
    w, x = rng.standard_normal((height, 16)), rng.standard_normal((7, 16))
    expected = ExactOps().linear(x, rows_of(w))
    assert ExactOps(prepared_bytes=0).linear(x, rows_of(w)).tobytes() == expected.tobytes()
    np.testing.assert_allclose(NativeOps(upcast_bytes=0).linear(x, rows_of(w)), x @ w.T, rtol=1e-14, atol=1e-14)


EDITS = (Edit(action="value", given=1.5, row=2), Edit(action="copy", given=2, row=5))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("edits", [(), EDITS])
@pytest.mark.parametrize("shape", [(1, 16), (40, 24), (7, 300)])
def test_a_computed_weight_is_multiplied_block_by_block_in_lanes(
    shape: tuple[int, int], edits: tuple[Edit, ...], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = edits if shape[0] > 5 else ()
    weight = SyntheticWeight(3, "layers.0.attention.wq", shape, -5, edits)
    made = Lanes()
    made.count = threads
    monkeypatch.setattr(streaming, "lanes", lambda: made)
    x = np.random.default_rng(1).standard_normal((2, 3, shape[1]))
    x[1, 1, 0], x[0, 2, 0] = np.inf, 2.0**-500
    expected = ExactOps().linear(x, rows_of(weight.read()))
    assert ExactOps(prepared_bytes=0).linear(x, weight).tobytes() == expected.tobytes()
    finite = x[:1]
    for dtype in (np.float32, np.float64):
        found = NativeOps(dtype, upcast_bytes=0).linear(finite.astype(dtype), weight)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, finite @ weight.read().T, rtol=1e-4, atol=1e-2)


@pytest.mark.usefixtures("small_blocks")
def test_each_block_is_read_once_in_order_and_the_next_before_one_is_used() -> None:
    w, seen, read_when_used = np.zeros((20, 16)), [], []
    weight = Weight(
        name="w",
        shape=w.shape,
        dtype=w.dtype,
        source=lambda: w,
        origin="test",
        read_block=lambda a, b: (seen.append((a, b)), w[a:b])[1],
    )
    for start, stop, block in streaming.blocks(weight, lambda stored: stored + 1):
        assert block.shape == (stop - start, 16)
        assert (block == 1).all()
        read_when_used.append(start)
    assert seen == [(i, i + 4) for i in range(0, 20, 4)]
    assert read_when_used == [0, 4, 8, 12, 16]


@pytest.fixture(params=[1, 2, 5])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Lanes of this number, whatever the machine has."""
    made = Lanes()
    made.count = request.param
    monkeypatch.setattr(streaming, "lanes", lambda: made)
    return made.count


@pytest.mark.usefixtures("small_blocks")
def test_blocks_side_by_side_are_used_once_and_come_in_order(lanes: int) -> None:
    w, seen, held, most = np.arange(320.0).reshape(20, 16), [], [0], [0]
    lock = threading.Lock()

    def read(rows: Any) -> Any:
        with lock:
            held[0] += 1
            most[0] = max(most[0], held[0])
        return rows

    def use(rows: Any) -> Any:
        with lock:
            seen.append(rows[0, 0])
            held[0] -= 1
        return rows + 1

    found = streaming.side_by_side(rows_of(w), read, use)
    np.testing.assert_array_equal(np.concatenate(found), w + 1)
    assert sorted(seen) == w[::4, 0].tolist()
    assert most[0] <= 1 + streaming.AHEAD


def test_rows_of_a_file_are_read_once_each_a_few_at_a_time(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SMALL_BLOCK", 64)
    w, read, used = np.arange(336.0).reshape(21, 16), [], []

    def rows(start: int, stop: int) -> Any:
        read.append((start, stop))
        return w[start:stop]

    streaming.UnreadRows(w.shape, w.dtype, rows).each(lambda first, each: used.append((first, each)))
    assert sorted(read) == [(i, min(i + 4, 21)) for i in range(0, 21, 4)]
    for first, each in used:
        np.testing.assert_array_equal(each, w[first : first + 4])
    assert sorted(first for first, _ in used) == [*range(0, 21, 4)]
    assert lanes > 1 or [first for first, _ in used] == [*range(0, 21, 4)]


def test_after_a_fault_no_other_rows_are_read(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SMALL_BLOCK", 16)
    read = []

    def rows(start: int, stop: int) -> Any:
        read.append(start)
        if start == lanes:
            raise InputError("a fault")
        time.sleep(0.002)

    with pytest.raises(InputError, match="a fault"):
        streaming.UnreadRows((200, 16), np.float32, rows).each(lambda first, each: None)
    assert len(read) < 100


def in_file(folder: Path, values: Any) -> Weight:
    """A matrix of no step in a file."""
    path = folder / "w.safetensors"
    write_tensors(path, {"w": lambda: values}, {})
    (tensor,) = open_safetensors(path)[0].values()
    return Weight("w", values.shape, values.dtype, tensor.map, "w of a file", read_block=tensor.rows_of(whole))


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The matrices of which whole blocks are read."""
    seen: list[Any] = []
    original = EnclosureOps._streamed

    def recorded(self: Any, x: Any, weight: Any, *others: Any) -> Any:
        seen.append(weight)
        return original(self, x, weight, *others)

    monkeypatch.setattr(EnclosureOps, "_streamed", recorded)
    monkeypatch.setattr(streaming, "SMALL_BLOCK", 1 << 16)
    monkeypatch.setattr(streaming, "BLOCK", 1 << 16)
    return seen


@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "hf-bfloat16", "float64"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("special", [0.0, 2.0**-24, 2.0**-133, 2.0**15])
@pytest.mark.parametrize("known", [True, False])
def test_an_enclosure_from_a_file_is_that_of_values_in_memory(
    special: float, dtype: Any, name: str, known: bool, tmp_path: Path, streamed: list[Any]
) -> None:
    """Subnormal numbers, which some engines take for zero, and sums that may be truncated or overflow among them."""
    rng, used = np.random.default_rng(2), policy(name)
    w = (rng.standard_normal((530, 512)) / 16).astype(dtype)
    w[::50, 3] = special
    values = rng.standard_normal((3, 512)).astype(np.float32).astype(used.storage.dtype).astype(np.float64)
    x = Enclosure(values) if known else Enclosure(values, np.abs(values) / 512, values**2 / 2**20)
    x.accumulation = used.accumulation
    found, expected = EnclosureOps(used, matrix_bytes=0), EnclosureOps(used)
    streams, whole_matrix = found.linear(x, in_file(tmp_path, w)), expected.linear(x, rows_of(w))
    assert bool(streamed) == (name == "float64" or not used.at("weights").holds(OF_DTYPE[w.dtype]))
    for part in ("mid", "r", "v", "bias"):
        if getattr(whole_matrix, part) is not None:
            np.testing.assert_allclose(getattr(streams, part), getattr(whole_matrix, part), rtol=2e-3, atol=1e-12)
    assert found.events == expected.events


@pytest.mark.parametrize("value", [2.0**40, 2.0**-40])
def test_an_enclosure_from_a_file_of_immoderate_numbers_is_that_of_its_blocks(
    value: float, tmp_path: Path, streamed: list[Any]
) -> None:
    x, w = Enclosure(np.ones((2, 512))), np.full((520, 512), value, np.float32)
    made = EnclosureOps(policy("float32"), matrix_bytes=0).linear(x, in_file(tmp_path, w))
    np.testing.assert_array_equal(made.mid, np.full((2, 520), 512 * value))
    assert len(streamed) == 1


@pytest.mark.usefixtures("lanes", "streamed")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_of_a_file_that_is_none_is_told(bad: float, tmp_path: Path) -> None:
    w = np.ones((520, 512), np.float32)
    w[411, 7] = bad
    with pytest.raises(InputError, match="w of a file holds 1 value that is not finite"):
        EnclosureOps(policy("float32"), matrix_bytes=0).linear(Enclosure(np.ones((2, 512))), in_file(tmp_path, w))


@pytest.mark.usefixtures("small_blocks", "lanes")
def test_a_streamed_enclosure_is_the_enclosure() -> None:
    rng = np.random.default_rng(2)
    w, x = rng.standard_normal((21, 16)), Enclosure(rng.standard_normal((3, 16)))
    for name in ("float32", "float64", "bfloat16+truncates=true"):
        whole, streamed = (EnclosureOps(policy(name), matrix_bytes=n).linear(x, rows_of(w)) for n in (1 << 20, 0))
        for part in ("mid", "r", "v", "bias"):
            if getattr(whole, part) is not None:
                np.testing.assert_allclose(getattr(streamed, part), getattr(whole, part), rtol=1e-6)


@pytest.mark.usefixtures("small_blocks", "lanes")
def test_a_fault_in_one_of_several_lanes_is_raised_here() -> None:
    w = np.ones((20, 16))
    w[9, 3] = np.nan
    with pytest.raises(InputError, match="test holds 1 value that is not finite"):
        EnclosureOps(policy("float32"), matrix_bytes=0).linear(Enclosure(np.ones((2, 16))), rows_of(w))


@pytest.mark.usefixtures("small_blocks")
def test_what_a_reader_raises_is_raised_and_no_thread_is_left() -> None:
    w = np.ones((20, 16))
    w[9, 3] = np.nan
    with pytest.raises(InputError, match="test holds 1 value that is not finite"):
        ExactOps(prepared_bytes=0).linear(np.ones((2, 16)), rows_of(w))
    assert not [each for each in threading.enumerate() if each.name.startswith("read-ahead")]


def test_rows_of_the_formula_are_those_of_the_whole() -> None:
    weight = SyntheticWeight(3, "layers.0.attention.wq", (40, 24), -5)
    for start, stop in ((0, 40), (0, 1), (7, 19), (39, 40), (5, 5)):
        assert weight.block(start, stop).tobytes() == weight.read()[start:stop].tobytes()
        wide = weight.block(start, stop, np.float64)
        assert wide.tobytes() == weight.read()[start:stop].astype(np.float64).tobytes()


@pytest.mark.parametrize("layout", [{}, {"fused": True}, {"layout": "mistral"}, {"shards": True}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_blocks_of_a_file_are_rows_of_the_parameter(tmp_path: Path, layout: dict[str, Any], dtype: str) -> None:
    """Also for a parameter that is a part of a fused tensor, or is reordered when it is read."""
    write_checkpoint(tmp_path, UNEVEN, rounded(dtype), dtype, **layout)
    layer = load_checkpoint(tmp_path).parameters.layers[1]
    for weight in (layer.wq, layer.wk, layer.wo, *(getattr(layer.experts[3], w) for w in ("w1", "w2", "w3"))):
        height = weight.shape[0]
        for start, stop in ((0, height), (0, 1), (3, height - 1), (height - 1, height)):
            block = weight.block(start, stop)
            assert block.tobytes() == np.ascontiguousarray(weight.read()[start:stop]).tobytes()
            assert block.dtype == weight.dtype


def rounded(dtype: str) -> Any:
    """Random parameters that are exact in the dtype."""
    import ml_dtypes

    from refmoe.checkpoints.names import build_parameters, named_weights

    given, kind = named_weights(random_parameters(UNEVEN, 5)), np.dtype(getattr(ml_dtypes, dtype, dtype))

    def weight(name: str) -> Weight:
        values = given[name].read().astype(kind).astype(np.float32)
        return Weight(name=name, shape=values.shape, dtype=np.float32, source=lambda: values, origin=name)

    return build_parameters(UNEVEN, weight)


def test_a_file_that_is_cut_or_vanishes_while_it_is_read_is_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, UNEVEN, rounded("float32"), "float32")
    weight = load_checkpoint(tmp_path).parameters.layers[1].experts[4].w3
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:9000])
    with pytest.raises(InputError, match=r"model\.safetensors: tensor '.*' can no longer be read: .*"):
        weight.block(0, 10)
    path.unlink()
    with pytest.raises(InputError, match=r"can no longer be read: .*No such file"):
        weight.block(0, 10)


@pytest.mark.parametrize(
    "view", [whole, lambda t: t[:, 2:5], lambda t: t.T, lambda t: t[::-1], lambda t: t[3:9], lambda t: t[::2] + 0]
)
def test_rows_of_any_view_are_those_of_the_values(view: Any, tmp_path: Path) -> None:
    """Also beyond the last row, as slices are."""
    path, values = tmp_path / "a.safetensors", np.arange(120, dtype=np.float32).reshape(12, 10)
    save_file({"a": values, "b": -values}, path)
    rows, expected = open_safetensors(path)[0]["a"].rows_of(view), view(values)
    for start, stop in ((0, 12), (0, 1), (2, 5), (4, 100), (50, 60), (3, 3)):
        np.testing.assert_array_equal(rows(start, stop), expected[start:stop])
        assert rows(start, stop).flags.writeable


def test_a_file_cut_between_map_and_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are read, not mapped: a missing page of a mapping would kill the process."""
    path = tmp_path / "a.safetensors"
    save_file({"a": np.arange(1 << 16, dtype=np.float32).reshape(256, 256)}, path)
    from refmoe.files import safetensors_file

    tensor = open_safetensors(path)[0]["a"]
    mapped = tensor.map()
    monkeypatch.setattr(safetensors_file.StoredTensor, "map", lambda self: mapped)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(InputError, match="the file has become too short"):
        tensor.rows_of(lambda stored: stored)(10, 256)
