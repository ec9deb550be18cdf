# SPDX-License-Identifier: Apache-2.0
"""Hostile traces: each ends in one clear sentence or in the right verdict, soon, and harms no terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from refmoe.checkpoints.write import write_checkpoint
from refmoe.errors import InputError
from refmoe.profiles.load import policy
from refmoe.suite import read_case
from refmoe.traces.trace import read_trace
from refmoe.verifier.intake import take_in
from refmoe.verifier.verify import verify
from tests.command_line import Refmoe
from tests.verifier.hostile import CASE, CONFORMANT, GOLDEN, REFUSED, TRACES, WRONG, draft

SECONDS = 60.0
"""Seconds: far more than any of these traces needs."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the case."""
    folder = tmp_path_factory.mktemp("checkpoint")
    case = read_case(GOLDEN / CASE)
    write_checkpoint(folder, case.config, case.checkpoint().parameters)
    return folder


def harmless(text: str) -> bool:
    """Whether a terminal prints the character without acting on it."""
    return all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("name", TRACES)
def test_a_hostile_trace_gets_what_it_deserves(refmoe: Refmoe, checkpoint: Path, tmp_path: Path, name: str) -> None:
    """The status, the words, one line if it is a sentence, and no control character in either stream."""
    trace = TRACES[name]
    path = tmp_path / "stranger.safetensors"
    trace.write(path)
    against = trace.against.replace("{checkpoint}", str(checkpoint)).split()
    started = time.monotonic()
    status, out, err = refmoe("verify", path, *against, "--golden", GOLDEN, "--no-diagnose")
    assert time.monotonic() - started < SECONDS
    said = err if trace.status == REFUSED else out
    assert status == trace.status, said
    for words in trace.words:
        assert words in said
    assert harmless(out)
    assert harmless(err)
    assert len(out) < 30_000
    if trace.status == REFUSED:
        assert out == ""
        assert err.startswith("refmoe: ")
        assert err.count("\n") == 1
        assert len(err) < 2000
        assert str(path) in err or name == "unknown_case"
    else:
        assert err == ""
        assert out.startswith("CONFORMANT" if status == CONFORMANT else "NOT CONFORMANT\n")


def test_the_catalogue_is_as_large_as_promised() -> None:
    assert len(TRACES) >= 40
    assert {trace.status for trace in TRACES.values()} == {CONFORMANT, WRONG, REFUSED}


@pytest.mark.parametrize("name", ["escape_sequences_in_a_tap", "tap_name_of_a_megabyte", "one_nan", "all_infinite"])
def test_hostile_names_and_values_harm_no_report(refmoe: Refmoe, tmp_path: Path, name: str) -> None:
    """JSON parses, XML is XML, the page holds no control character."""
    path, html, junit = (tmp_path / part for part in ("stranger.safetensors", "page.html", "junit.xml"))
    TRACES[name].write(path)
    _, out, _ = refmoe("verify", path, "--golden", GOLDEN, "--no-diagnose", "--json", "--html", html, "--junit", junit)
    json.loads(out)
    ElementTree.parse(junit)
    assert harmless(out)
    for report in (html, junit):
        text = report.read_text(encoding="utf-8")
        assert all(c.isprintable() or c in "\n\t" for c in text)
        assert len(text) < 3_000_000


def test_a_trace_that_shrinks_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    """Sizes are checked again whenever a tap is mapped. If the file shrinks between this and the last read of a block,
    the kernel ends the process (SIGBUS). No Python code can turn that into a sentence."""
    case, path = read_case(GOLDEN / CASE), tmp_path / "shrinking.safetensors"
    path.write_bytes(draft(path, "exact").whole())
    trace = read_trace(path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"shrinking.safetensors: tensor '.*' can no longer be read"):
        verify(trace, CASE, case.config, case.checkpoint().parameters, case.runs(), policy("float64"))
    path.unlink()
    with pytest.raises(InputError, match=r"shrinking.safetensors: tensor '.*' can no longer be read"):
        verify(trace, CASE, case.config, case.checkpoint().parameters, case.runs(), policy("float64"))


def test_no_flipped_bit_in_the_header_is_a_traceback(tmp_path: Path) -> None:
    """Bits of header and metadata, one at a time: refused in a sentence, or read as a trace."""
    path, case = tmp_path / "flipped.safetensors", read_case(GOLDEN / CASE)
    parts = draft(path, "exact")
    parts.keep("decode2/logits")
    whole = bytearray(parts.whole())
    sentences = []
    for bit in np.random.default_rng(1).permutation(8 * (8 + len(parts.text())))[:600]:
        whole[bit >> 3] ^= 1 << (bit & 7)
        path.write_bytes(whole)
        whole[bit >> 3] ^= 1 << (bit & 7)
        try:
            take_in(read_trace(path), case.config, case.runs())
        except InputError as error:
            sentences.append(str(error))
    assert len(sentences) > 400
    assert all(str(path) in sentence and harmless(sentence) for sentence in sentences)


@pytest.mark.parametrize("name", ["expert_that_does_not_exist", "negative_expert"])
def test_experts_that_do_not_exist_are_no_index_for_a_diagnosis(name: str, refmoe: Refmoe, tmp_path: Path) -> None:
    TRACES[name].write(tmp_path / "trace.safetensors")
    status, out, err = refmoe("verify", tmp_path / "trace.safetensors", "--golden", GOLDEN)
    assert (status, err) == (1, "")
    assert "explain" in out
