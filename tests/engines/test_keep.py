# SPDX-License-Identifier: Apache-2.0
"""``refmoe conform --keep``: the arrays of an engine are kept as traces that the other commands read."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from refmoe.traces.trace import read_trace
from tests.command_line import Refmoe
from tests.engines.running import HONEST, hostile

CASES = ("conform", "--case", "top-1", "--case", "window-1", "--no-diagnose")


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_is_a_trace_that_can_be_verified(refmoe: Refmoe, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    assert refmoe(*CASES, "--keep", kept, "--", *HONEST)[0] == 0
    assert names(kept) == [
        f"{case}-{dtype}.safetensors" for case in ("top-1", "window-1") for dtype in ("bfloat16", "float32")
    ]
    trace = read_trace(kept / "top-1-bfloat16.safetensors")
    assert (trace.header.case, trace.header.policy) == ("top-1", "bfloat16")
    assert trace.header.producer == {"name": "honest", "version": "1.0"}
    assert trace.tensors["prefill/logits"].dtype == "BF16", "not widened"
    status, out, err = refmoe("verify", kept / "top-1-bfloat16.safetensors")
    assert status == 0, err
    assert out.startswith("CONFORMANT")


@pytest.mark.parametrize(("wrong", "kept"), [("forgets_the_logits", True), ("exits", False), ("skips", False)])
def test_what_is_no_trace_is_kept_as_it_came(wrong: str, kept: bool, refmoe: Refmoe, tmp_path: Path) -> None:
    """Without an answer, the file of an earlier run is deleted; other files of the folder stay."""
    for name in ("top-1-float32.safetensors", "notes.txt"):
        (tmp_path / name).write_text("of yesterday")
    refmoe(*CASES, "--dtype", "float32", "--keep", tmp_path, "--", *hostile(wrong, "top-1"))
    expected = ["top-1-float32.safetensors"] if kept else []
    assert names(tmp_path) == ["notes.txt", *expected, "window-1-float32.safetensors"]
    if kept:
        assert "prefill/embedding" in load_file(tmp_path / "top-1-float32.safetensors")


def test_nor_does_yesterdays_stay_where_the_engine_lacks_an_ability(refmoe: Refmoe, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Adapter:\n"
        "    name, version, dtypes, taps, abilities, policies = 'mine', '1', ('float32',), ('logits',), (), {}\n"
    )
    (tmp_path / "top-1-float32.safetensors").write_text("of yesterday")
    status, out, _ = refmoe("conform", "--case", "top-1", "--keep", tmp_path, "--adapter", tmp_path / "mine.py")
    assert status == 3
    assert "needs decode" in out
    assert not (tmp_path / "top-1-float32.safetensors").exists()
