# SPDX-License-Identifier: Apache-2.0
"""``refmoe conform --server``: its options, its exit status, the files that it writes and the server that it starts."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from refmoe.engines.server.served import served_case
from tests.command_line import Refmoe
from tests.engines.server.fake import honest_llama, honest_openai, serving

SCRIPT = """
import sys
from tests.engines.server.fake import Handler, honest_openai
from http.server import ThreadingHTTPServer
from pathlib import Path
assert (Path(sys.argv[2]) / "config.json").exists(), sys.argv
server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
server.answer, server.spoil = honest_openai(), lambda *_: False
print("x" * 200000, flush=True)  # more than a pipe holds
server.serve_forever()
"""


def judged(refmoe: Refmoe, url: str, *words: str) -> tuple[int, Any]:
    """The exit status and the facts of a server."""
    status, output, _ = refmoe("conform", "--server", url, "--json", "--no-diagnose", *words)
    return status, json.loads(output)


def free_port() -> int:
    with serving(lambda *_: {}) as url:
        return int(url.rpartition(":")[2])


def test_a_healthy_server(refmoe: Refmoe) -> None:
    with serving(honest_llama()) as url:
        status, facts = judged(refmoe, url, "--dtype", "float32")
    assert (status, facts["verdict"], facts["kind"]) == (0, "conformant", "llama.cpp")
    assert facts["policy"] == "llama.cpp-float32"
    assert all(way["right"] for way in facts["ways"].values())
    assert facts["power"]["known"] > facts["power"]["seen"] > 0


@pytest.mark.slow
def test_a_wrong_server_and_what_a_person_reads(refmoe: Refmoe) -> None:
    with serving(honest_openai("rope-theta-default")) as url:
        status, output, _ = refmoe("conform", "--server", url, "--policy", "float32")
    assert status == 1
    assert "rope-theta-default" in output


WRONG = {
    "no dtype": ["--server", "http://127.0.0.1:1"],
    "no server": ["--server", "http://127.0.0.1:1", "--dtype", "float32"],
    "no URL": ["--server", "nowhere", "--dtype", "float32"],
    "float64": ["--server", "http://127.0.0.1:1", "--dtype", "float64"],
    "two dtypes": ["--server", "http://127.0.0.1:1", "--dtype", "float32", "--policy", "bfloat16"],
    "an adapter": ["--server", "http://127.0.0.1:1", "--dtype", "float32", "--adapter", "vllm"],
    "no case": ["--server", "http://127.0.0.1:1", "--dtype", "float32", "--case", "nonesuch"],
    "a kind alone": ["--server-kind", "openai"],
    "no file in the command": ["--server", "http://127.0.0.1:1", "--dtype", "float32", "--", "vllm", "serve", "x"],
    "a command alone": ["--server-files", "here", "--", "vllm", "serve", "{checkpoint}"],
    "no program": ["--server", "http://127.0.0.1:1", "--dtype", "float32", "--", "/nowhere/vllm", "{checkpoint}"],
    "a program that ends": ["--server", "http://127.0.0.1:1", "--dtype", "float32", "--", "/bin/false", "{checkpoint}"],
}


@pytest.mark.parametrize("name", WRONG)
def test_an_option_that_cannot_be_used(
    name: str, refmoe: Refmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, said = refmoe("conform", *WRONG[name])
    assert status == 2
    assert "Traceback" not in said
    assert not any(tmp_path.iterdir())


def test_a_server_that_refmoe_starts(refmoe: Refmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended afterwards, and prints more than a pipe holds."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    script, port = tmp_path / "server.py", free_port()
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(port), "{checkpoint}"]
    status, facts = judged(refmoe, f"http://127.0.0.1:{port}", "--dtype", "float32", "--", *command)
    assert (status, facts["verdict"]) == (0, "conformant")
    status, _, _ = refmoe("conform", "--server", f"http://127.0.0.1:{port}", "--dtype", "float32")
    assert status == 2


DIES = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")
    def do_POST(self):
        os._exit(7)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_that_dies_tells_how(refmoe: Refmoe, tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "server.py").write_text(DIES)
    command = [sys.executable, str(tmp_path / "server.py"), str(port), "{checkpoint}"]
    status, facts = judged(refmoe, f"http://127.0.0.1:{port}", "--dtype", "float32", "--", *command)
    assert (status, facts["verdict"]) == (1, "crashed")
    assert any("status 7" in each for each in facts["notes"])


@pytest.mark.skipif(find_spec("gguf") is None, reason="gguf not installed: pip install -e '.[llama-cpp]'")
def test_the_files_for_servers(refmoe: Refmoe, tmp_path: Path) -> None:
    import gguf

    folder = tmp_path / "model"
    for _ in range(2):  # a second time it replaces its own
        status, output, _ = refmoe("conform", "--server-files", str(folder), "--dtype", "bfloat16", "--json")
        assert status == 0
    assert all(str(folder) in each["command"] for each in json.loads(output)["commands"].values())
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    assert config["eos_token_id"] is None
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == [f"<{token}>" for token in range(served_case().config.vocab)]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == len(tokens) - 1


@pytest.mark.skipif(find_spec("tokenizers") is None, reason="tokenizers not installed: pip install -e '.[text]'")
def test_the_tokenizer_passes_ids_through(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from refmoe.engines.server.replies import read_text, spelled
    from refmoe.engines.server.serving import write_files

    case = served_case()
    write_files(tmp_path / "model", case.config, case.checkpoint().parameters, "float32", gguf=False)
    found = Tokenizer.from_file(str(tmp_path / "model" / "checkpoint" / "tokenizer.json"))
    ids = [77, 3, 3, 100, 0, 42]
    assert found.encode(spelled(ids)).ids == ids
    assert read_text(found.decode(ids), case.config.vocab) == tuple(ids)
