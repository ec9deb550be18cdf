# SPDX-License-Identifier: Apache-2.0
"""`refmoe emit --checkpoint`: cut by layers, resumed, estimated; a mistake is one sentence."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from refmoe.checkpoints.write import write_checkpoint
from refmoe.jobs import job as scale
from refmoe.jobs.estimate import estimate
from refmoe.jobs.parts import Parts
from refmoe.jobs.source import Formula
from refmoe.spec.config import PRESETS, Config
from refmoe.traces.trace import Header, Recorder, read_trace
from tests.command_line import Refmoe
from tests.models import SMALL

CONFIG = Config(
    dim=64, layers=3, heads=4, kv_heads=2, head_dim=16, hidden_dim=96, vocab=50, experts=4, experts_per_token=2
)
TOKENS = ("--tokens", "1,2,3,4", "--decode", "5,6")


@pytest.fixture
def small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "mixtral-8x7b", CONFIG)


def bytes_of(path: Path) -> dict[str, bytes]:
    trace = read_trace(path)
    return {key: tensor.map().tobytes() for key, tensor in trace.tensors.items()}


@pytest.mark.usefixtures("small_size")
def test_layers_cut_and_continued_are_those_of_the_whole(refmoe: Refmoe, tmp_path: Path) -> None:
    given = ("emit", "--checkpoint", "mixtral-8x7b", "--seed", 7, *TOKENS)
    whole, first, rest = (tmp_path / f"{name}.safetensors" for name in ("whole", "first", "rest"))
    assert refmoe(*given, "--out", whole)[0] == 0
    assert refmoe(*given, "--out", first, "--layers", "0:1")[0] == 0
    assert refmoe(*given, "--out", rest, "--layers", "1:", "--states", first)[0] == 0
    assert bytes_of(first) | bytes_of(rest) == bytes_of(whole)
    assert {key.split("/")[1].split(".")[0] for key in bytes_of(first)} == {"embedding", "layers"}
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.usefixtures("small_size")
@pytest.mark.parametrize("arithmetic", [["--dtype", "float32"], ["--dtype", "exact"], ["--policy", "hf-bfloat16"]])
def test_a_checkpoint_and_its_formula_give_the_same(refmoe: Refmoe, tmp_path: Path, arithmetic: list[str]) -> None:
    write_checkpoint(tmp_path / "ck", CONFIG, Formula(CONFIG, 7).load().parameters, shards=True)
    out, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert refmoe("emit", "--checkpoint", tmp_path / "ck", *TOKENS, *arithmetic, "--out", out)[0] == 0
    assert refmoe("emit", "--checkpoint", "mixtral-8x7b", "--seed", 7, *TOKENS, *arithmetic, "--out", other)[0] == 0
    assert bytes_of(out) == bytes_of(other)
    assert read_trace(out).header.policy == arithmetic[1]
    assert str(read_trace(out).header.checkpoint).startswith("sha256:")
    assert refmoe("emit", "--checkpoint", tmp_path / "ck", *TOKENS, "--no-digest", "--out", out)[0] == 0
    assert read_trace(out).header.checkpoint is None


@pytest.mark.usefixtures("small_size")
def test_what_does_not_go_together_is_one_sentence(refmoe: Refmoe, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "t.safetensors", *TOKENS)
    size = ("emit", "--checkpoint", "mixtral-8x7b", *out)
    write_checkpoint(tmp_path / "ck", CONFIG, Formula(CONFIG, 7).load().parameters)
    for command, expected in (
        (size, "is a size and no folder, so --seed SEED was expected"),
        (("emit", "--checkpoint", "mixtral-9x9b", "--seed", 1, *out), "goes with --checkpoint mixtral-8x7b or"),
        (("emit", "--checkpoint", tmp_path / "ck", "--seed", 1, *out), "--seed 1 goes with --check"),
        ((*size, "--seed", 1, "--layers", "2:9"), "--layers is '2:9', but A:B with 0 <= A < B <= 3 was expected"),
        ((*size, "--seed", 1, "--layers", "x"), "--layers is 'x'"),
        ((*size, "--seed", 1, "--layers", "1:2"), "a trace with the output of layer 0 was expected as --states"),
        ((*size, "--seed", 1, "--states", "x"), "layer 0 begins with the embedding"),
        ((*size, "--seed", 1, "--executor", "threads"), "processes:N with N up to 1024, or dask:ADDRESS was expected"),
        ((*size, "--seed", 1, "--executor", "processes:0"), "processes:N with N up to 1024"),
        ((*size, "--seed", 1, "--layers", "0:1", "--taps", "logits"), "matches no tap of layers 0 to 0"),
        ((*size, "--seed", 1, "--executor", "processes:1", "--policy", "bfloat16"), "computed in one process"),
    ):  # fmt: skip
        status, printed, said = refmoe(*command)
        assert (status, printed) == (2, ""), command
        assert expected in said
        assert said.startswith("refmoe: ")
        assert said.count("\n") == 1
        assert not (tmp_path / "t.safetensors").exists()


def job(tokens: tuple[int, ...] = (1, 2, 3)) -> scale.Job:
    from refmoe.traces.script import plan

    return scale.Job(Formula(CONFIG, 7), Header(plan([("prefill", 0, tokens)], CONFIG.vocab)), "exact", range(3))


class Stop(Exception):
    pass


def stop_after(layers: int) -> Recorder:
    left = iter(range(layers))

    def count() -> None:
        if next(left, None) is None:
            raise Stop

    return Recorder(progress=count)


def test_what_is_finished_is_not_computed_again(tmp_path: Path) -> None:
    expected = scale.compute(job(), tmp_path / "whole", Recorder()).tensors()
    with pytest.raises(Stop):
        scale.compute(job(), tmp_path / "parts", stop_after(2))
    assert Parts(tmp_path / "parts", job().identity(), job().part_names()).finished == 3
    seen: list[str] = []

    class Watched(Recorder):
        def __call__(self, name: str, x: Any) -> None:
            seen.append(name)
            super().__call__(name, x)

    steps: list[None] = []
    found = scale.compute(job(), tmp_path / "parts", Watched(progress=lambda: steps.append(None))).tensors()
    assert {name.split(".")[1] for name in seen if name.startswith("layers.")} == {"2"}
    assert "embedding" not in seen
    assert len(steps) == 3
    assert found.keys() == expected.keys()
    assert all(found[key].map().tobytes() == expected[key].map().tobytes() for key in expected)


def test_parts_of_another_run_are_refused(tmp_path: Path) -> None:
    scale.compute(job(), tmp_path / "parts", Recorder())
    with pytest.raises(Exception, match="holds the finished layers of another run, whose header differs; delete it"):
        scale.compute(job((1, 2, 4)), tmp_path / "parts", Recorder())
    (tmp_path / "parts" / "job.json").write_text("{")
    with pytest.raises(Exception, match=r"job\.json: cannot be read: .* delete .*parts to begin anew"):
        scale.compute(job(), tmp_path / "parts", Recorder())


COMMAND = "import sys; from refmoe.cli import main; sys.argv = ['refmoe', *sys.argv[1:]]; main()"


def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_killed_and_started_again_it_goes_on(tmp_path: Path) -> None:
    """The process is killed in the middle of a layer. The final trace equals one from a run without a stop."""
    config = Config(
        dim=256, layers=6, heads=4, kv_heads=2, head_dim=64, hidden_dim=2048, vocab=64, experts=8, experts_per_token=2
    )
    write_checkpoint(tmp_path / "ck", config, Formula(config, 3).load().parameters, "float32")
    out, whole = tmp_path / "t.safetensors", tmp_path / "whole.safetensors"
    command = ("emit", "--checkpoint", tmp_path / "ck", "--tokens", "1,2,3,4,5,6,7,8", "--out")
    process = start(*command, out)
    second = out.with_name("t.safetensors.parts") / "layers.1.safetensors"
    while not second.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    written = second.stat().st_mtime_ns
    kept = {path: path.stat().st_mtime_ns for path in second.parent.glob("layers.*")}
    assert len(kept) < 6
    process = start(*command, out)
    watched = 0
    while process.poll() is None:
        with suppress(FileNotFoundError):  # when all is written, the parts are removed
            watched = max(watched, second.stat().st_mtime_ns)
    assert process.returncode == 0
    assert watched in (0, written), "a finished layer was computed again"
    assert start(*command, whole).wait() == 0
    assert out.read_bytes() == whole.read_bytes()


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of files acts as a full disk. The layers that fit are kept; a second run goes on."""
    config = Config(
        dim=64, layers=3, heads=4, kv_heads=2, head_dim=16, hidden_dim=96, vocab=4000, experts=8, experts_per_token=2
    )
    write_checkpoint(tmp_path / "ck", config, Formula(config, 3).load().parameters, "float32")
    out = tmp_path / "t.safetensors"
    command = ("emit", "--checkpoint", tmp_path / "ck", "--tokens", "1,2,3,4,5,6,7,8", "--out", out)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    process = start(*command, preexec_fn=limited)
    printed, said = process.communicate()
    assert (process.returncode, printed) == (2, ""), said
    assert said.startswith("refmoe: ")
    assert "head.safetensors: cannot be written" in said
    assert said.count("\n") == 1
    assert not out.exists()
    assert len(list((tmp_path / "t.safetensors.parts").glob("layers.*"))) == 3
    assert start(*command).wait() == 0
    assert len(read_trace(out).tensors) == 3 * 21 + 3


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "exact"])
def test_memory_stays_under_what_is_stated_beforehand(tmp_path: Path, dtype: str) -> None:
    """The stated memory is well below the size of the weights: 360 MB in bfloat16, 720 MB and 1.4 GB converted."""
    config = Config(
        dim=1024,
        layers=1,
        heads=8,
        kv_heads=2,
        head_dim=128,
        hidden_dim=7168,
        vocab=256,
        experts=8,
        experts_per_token=2,
    )
    write_checkpoint(tmp_path / "ck", config, Formula(config, 3).load().parameters)
    command = ("emit", "--checkpoint", tmp_path / "ck", "--tokens", ",".join(map(str, range(64))), "--dtype", dtype)
    process = start(*command, "--out", tmp_path / "t.safetensors", "--estimate", "--json")
    stated = json.loads(process.communicate()[0])["memory_bytes"]
    words = [
        sys.executable,
        "-c",
        COMMAND.replace("main()", MEASURED),
        *map(str, command),
        "--out",
        str(tmp_path / "u"),
    ]
    used = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert used < stated
    assert stated < 3 * used


MEASURED = """
try:
    main()
except SystemExit:
    print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0] + '000')
"""


def test_what_it_takes_is_said_without_computing(refmoe: Refmoe, tmp_path: Path) -> None:
    given = ("emit", "--checkpoint", "mixtral-8x7b", "--seed", 1, "--tokens", "1,2", "--out", tmp_path / "t")
    status, printed, _ = refmoe(*given, "--estimate", "--json")
    facts = json.loads(printed)
    assert status == 0
    assert facts["memory_bytes"] < 6 << 30
    # two tokens choose at most four experts of each layer
    experts, attention = 4 * 3 * 4096 * 14336, (2 * 4096 + 2 * 1024) * 4096
    assert 0 <= facts["weight_bytes"] / 4 - 32 * (experts + attention) - 32000 * 4096 <= 32 * 10 * 4096 + 3 * 4096
    assert refmoe(*given, "--estimate")[1].startswith("up to ")
    assert not list(tmp_path.iterdir())


def test_the_estimated_size_of_a_trace_is_its_size() -> None:
    from refmoe.traces.script import plan

    runs = plan([("prefill", 0, [1, 2, 3]), ("decode", 0, [4])], CONFIG.vocab)
    recorder = Recorder("layers.1.*,logits,embedding")
    from refmoe.arithmetic.exact.ops import ExactOps
    from refmoe.spec.model import Model
    from refmoe.traces.script import execute

    execute(ExactOps(recorder), Model(CONFIG, Formula(CONFIG, 1).load().parameters), runs, recorder)
    found = estimate(CONFIG, runs, range(3), "exact", "layers.1.*,logits,embedding")
    assert found.trace == sum(array.nbytes for array in recorder.arrays.values())


def test_too_little_memory_is_told_beforehand(refmoe: Refmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refmoe.jobs.emission.available_memory", lambda: 10_000_000)
    write_checkpoint(tmp_path / "ck", SMALL, Formula(SMALL, 1).load().parameters)
    given = ("emit", "--checkpoint", tmp_path / "ck", "--tokens", "1", "--out", tmp_path / "t.safetensors")
    status, _, said = refmoe(*given)
    assert status == 2
    assert "out of memory: up to " in said
    assert "but 10.0 MB are available" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck"]


def test_memory_that_runs_out_is_one_sentence(refmoe: Refmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: Any) -> Any:
        raise MemoryError("Unable to allocate 3.2 GiB")

    monkeypatch.setattr("refmoe.jobs.layerwise.Script.layer", no_more)
    write_checkpoint(tmp_path / "ck", SMALL, Formula(SMALL, 1).load().parameters)
    status, _, said = refmoe("emit", "--checkpoint", tmp_path / "ck", "--tokens", "1", "--out", tmp_path / "t")
    assert (status, said) == (2, "refmoe: out of memory: Unable to allocate 3.2 GiB\n")


def test_states_in_another_dtype_are_refused(refmoe: Refmoe, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ck", SMALL, Formula(SMALL, 1).load().parameters)
    given = ("emit", "--checkpoint", tmp_path / "ck", "--tokens", "1,2", "--out")
    assert refmoe(*given, tmp_path / "a", "--layers", "0:1", "--dtype", "float32")[0] == 0
    status, _, said = refmoe(*given, tmp_path / "b", "--layers", "1:2", "--states", tmp_path / "a")
    assert status == 2
    assert "'prefill/layers.0.residual' is float32, but float64 was expected" in said
