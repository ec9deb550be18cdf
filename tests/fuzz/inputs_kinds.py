# SPDX-License-Identifier: Apache-2.0
"""Every kind of file that refmoe reads, with the commands that read it and the mutations that fit it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.cli import main
from refmoe.suite.digests import digests_text, listed_files
from tests.fuzz.inputs import Kind, Run, room
from tests.fuzz.inputs_mutations import (
    Mutation,
    any_bytes,
    json_edits,
    manifest_edits,
    npy_edits,
    safetensors_edits,
    signed,
    splice,
    toml_edits,
    trace_edits,
    values_edited,
    zip_edits,
)

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "golden"
ENCODINGS = ("utf-8", "utf-8", "utf-8", "ascii", "latin-1", "cp1252", "iso-8859-9")
KEY = """\
-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIJug8EsRyDM6XOq7FAOYuTBFUu8icP3YSljuIlZwkfAO
-----END PRIVATE KEY-----
"""
PUBLIC = """\
-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAccLDND2gpNFJ1BDN4SV67ext/7ORNg1LM9pEj4NNFT8=
-----END PUBLIC KEY-----
"""
"""A key that signs nothing but packages of these tests."""
CASE = """\
format_version = "1"
why = "A small case."
clauses = ["ROUTE-2"]
bugs = ["router-softmax-over-tokens"]
conditions = ["T>1"]
start = 0

[config]
dim = 8
layers = 2
heads = 2
kv_heads = 1
head_dim = 4
hidden_dim = 8
vocab = 11
experts = 3
experts_per_token = 2
norm_eps = 1e-05
rope_theta = 30000.0
window = 3

[weights]
seed = 43

[weights.exponents]
gate = 2

[[weights.edits]]
parameter = "layers.*.router.gate"
row = 0
columns = [0, 2]
value = -0.5

[[script]]
op = "prefill"
sequence = 0
tokens = [7, 3, 1]

[[script]]
op = "decode"
sequence = 0
tokens = [4]
"""
POLICY = """\
[mine]
base = "bfloat16"
about = "A policy of a stranger."
source = "none"
storage = "float16"

[mine.exp]
constant = 9
slope = 2
source = "none"

[mine.inputs]
Q4_K = "q8_k"

[mine.inputs.Q8_0]
base = "q8_0"
about = "codes"
source = "here"
rounding = "half-away"
contest = 2
"""
CHAT = [
    {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi \u00e9"}, {"role": "user",
    "content": "Bye"},
]  # fmt: skip
ROUTER = """\
import numpy as np


def route(x):
    ids = np.argsort(-x, axis=1, kind="stable")[:, :2]
    e = np.exp(np.take_along_axis(x, ids, 1) - x.max(axis=1, keepdims=True))
    return ids, e / e.sum(axis=1, keepdims=True)
"""
KERNEL = """\
import numpy as np


def experts(x, w_gate, w_up, w_down, ids, weights):
    y = np.zeros_like(x)
    for t, row in enumerate(x):
        for expert, weight in zip(ids[t], weights[t]):
            gate = w_gate[expert] @ row
            y[t] += weight * (w_down[expert] @ (gate / (1 + np.exp(-gate)) * (w_up[expert] @ row)))
    return y
"""


def refmoe(words: str) -> str:
    """Run a command that must end well."""
    import sys

    before, said = sys.argv, StringIO()
    sys.argv = ["refmoe", *words.split()]
    try:
        with redirect_stdout(said):
            main()
    except SystemExit as left:
        if left.code:
            raise RuntimeError(f"refmoe {words}: status {left.code}") from None
    finally:
        sys.argv = before
    return said.getvalue()


@contextmanager
def _kept_parts() -> Any:
    """Let the finished parts of a job stay, as if the job was killed before it wrote its trace."""
    from refmoe.jobs import parts

    removed = parts.Parts.remove
    parts.Parts.remove = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        parts.Parts.remove = removed  # type: ignore[method-assign]


@cache
def base() -> Path:
    """A folder with one good input of each kind."""
    from refmoe.checkpoints.synthetic import synthetic_checkpoint
    from refmoe.checkpoints.write import write_checkpoint
    from refmoe.spec.config import Config

    place = room() / "base"
    place.mkdir()
    one = Config(
        dim=8, layers=1, heads=2, kv_heads=1, head_dim=4, hidden_dim=8, vocab=11, experts=3, experts_per_token=2,
        norm_eps=3e-5,
        rope_theta=3e4,
    )  # fmt: skip
    two, text = replace(one, layers=2), replace(one, vocab=32000)
    write_checkpoint(place / "hf", one, synthetic_checkpoint(one, 3).parameters)
    write_checkpoint(place / "mistral", one, synthetic_checkpoint(one, 3).parameters, "float32", "mistral")
    write_checkpoint(place / "sharded", two, synthetic_checkpoint(two, 3).parameters, shards=True)
    write_checkpoint(
        place / "fused", one, synthetic_checkpoint(one, 3).parameters, "float16", fused=True, rope_parameters=True
    )
    write_checkpoint(place / "text", text, synthetic_checkpoint(text, 3).parameters)
    _tokenizer(place / "text" / "tokenizer.model")
    for name, model, more in (
        ("trace", "hf", "--dtype float32"), ("exact", "hf", ""), ("states", "sharded", "--layers 0:1"),
    ):  # fmt: skip
        out = place / f"{name}.safetensors"
        refmoe(f"emit --checkpoint {place / model} --tokens 1,2,3 --decode 4 {more} --out {out}")
    # a job knows its checkpoint by the path that was given
    with _kept_parts(), chdir(place):
        refmoe("emit --checkpoint sharded --tokens 1,2,3 --out job.safetensors")
    (place / "job.safetensors").unlink()
    _goldens(place)
    _dumps(place)
    (place / "policy.toml").write_text(POLICY)
    (place / "chat.json").write_text(json.dumps(CHAT))
    (place / "router.py").write_text(ROUTER)
    (place / "kernel.py").write_text(KERNEL)
    (place / "tests").mkdir()
    (place / "tests" / "test_nothing.py").write_text('def test_nothing():\n    """ROUTE-2"""\n')
    results = GOLDEN.parent / "bench" / "results" / "conform"
    shutil.copyfile(results / "known.toml", place / "known.toml")
    found = json.loads((results / "onnx.json").read_text())
    found["outcomes"] = found["outcomes"][:6]
    (place / "results.json").write_text(json.dumps(found))
    _package(place)
    return place


def _package(place: Path) -> None:
    """The results of the one case, its kept trace, keys, and their package where its libraries are installed."""
    (place / "key.pem").write_text(KEY)
    (place / "public.pem").write_text(PUBLIC)
    refmoe(
        f"conform --golden {place / 'golden'} --case small --dtype float32 --no-diagnose --keep {place / 'kept'} "
        f"--out {place / 'few.json'} -- {sys.executable} {ROOT / 'tests' / 'engines' / 'harnesses' / 'honest.py'}"
    )
    words = f"--golden {place / 'golden'} --engine {place / 'few.json'} --traces {place / 'kept'}"
    if importlib.util.find_spec("cyclonedx") is None:
        (place / "package").mkdir()
    else:
        refmoe(f"evidence write {place / 'package'} {words} --key {place / 'key.pem'} --date 2026-11-29")


def _tokenizer(path: Path) -> None:
    """The tokenizer of Mixtral, which a package ships, or a file that is none where it is not installed."""
    try:
        import mistral_common
    except ImportError:
        path.write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02" * 40)
    else:
        shutil.copyfile(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", path)


def _goldens(place: Path) -> None:
    for name, more in (("golden", ""), ("prints", 'store = "fingerprint"\nlayers = [0, 1]\n')):
        folder = place / name / "small"
        folder.mkdir(parents=True)
        (folder / "case.toml").write_text(CASE.replace("start = 0\n", f"start = 0\n{more}"))
        refmoe(f"suite emit --golden {place / name} --executor processes:1")
    (place / "sums").write_text(digests_text(place / "golden", listed_files(place / "golden")))
    refmoe(f"emit --case small --golden {place / 'golden'} --out {place / 'ofcase.safetensors'}")
    whole = place / "whole"
    whole.mkdir()
    for each in GOLDEN.iterdir():
        (whole / each.name).symlink_to(each)
    for name in ("matrix.json", "manifest.json"):
        (whole / name).unlink()
        shutil.copyfile(GOLDEN / name, whole / name)


def _dumps(place: Path) -> None:
    """The values of a trace as arrays of other programs."""
    from safetensors.numpy import load_file, save_file

    found = load_file(place / "trace.safetensors")
    arrays = {name: np.array(array) for name, array in found.items()}
    np.savez(place / "values.npz", **arrays)
    save_file(arrays, place / "values.safetensors")
    rng = np.random.default_rng(0)
    np.save(place / "logits.npy", rng.standard_normal((6, 4)))
    try:
        import torch
    except ImportError:
        return
    torch.save({name: torch.from_numpy(array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array)
                for name, array in arrays.items()}, place / "values.pt")  # fmt: skip


# ---- mutated files

VALUES = "--checkpoint hf --tokens 1,2,3 --decode 4 --policy float32 --no-diagnose"
MODELS = {
    "info": "info {m}",
    "emit": "emit --checkpoint {m} --tokens 1,2,3 --out out/t.safetensors",
    "emit float32": "emit --checkpoint {m} --tokens 1,2,3 --dtype float32 --out out/t.safetensors",
    "ideal": "emit --checkpoint {m} --tokens 1,2 --policy bfloat16 --out out/t.safetensors",
    "estimate": "emit --checkpoint {m} --tokens 1,2,3 --estimate --out out/t.safetensors --json",
    "generate": "generate --checkpoint {m} --tokens 1 --max-new-tokens 2",
    "sample": "generate --checkpoint {m} --tokens 1 --max-new-tokens 2 --temperature 0.7 --top-p 0.9 --top-k 3 --json",
    "verify": "verify trace.safetensors --checkpoint {m} --policy float32 --no-diagnose --json",
}


def models(*names: str) -> tuple[str, ...]:
    return tuple(words.format(m=name) for name in names for words in MODELS.values())


def fixed_golden(folder: Path) -> None:
    """Make the digests of a golden right after a file of it has changed."""
    import hashlib

    path = folder / "manifest.json"
    manifest = path.read_bytes()
    for each in folder.iterdir():
        if each != path:
            right = hashlib.sha256(each.read_bytes()).hexdigest()
            manifest = re.sub(
                rb'("%s": ")[0-9a-f]{64}' % re.escape(each.name).encode(), rb"\g<1>" + right.encode(), manifest
            )
    path.write_bytes(signed(manifest))


TRACES = (
    "verify trace.safetensors --checkpoint hf --policy float32 --no-diagnose",
    "verify trace.safetensors --checkpoint hf --policy float32 --no-diagnose --json",
    "verify trace.safetensors --checkpoint hf --no-diagnose --html out/p.html --junit out/j.xml",
    "verify trace.safetensors --checkpoint hf --policy bfloat16 --no-diagnose --json",
    "verify trace.safetensors --distances exact.safetensors",
    "verify exact.safetensors --distances trace.safetensors --json",
    "router show --logits trace.safetensors",
    "router show --logits trace.safetensors --router switch --json --out out/p.svg",
)
DIAGNOSED = ("verify trace.safetensors --checkpoint hf",
"verify trace.safetensors --checkpoint hf --policy bfloat16 --json",
             "verify trace.safetensors --checkpoint hf --policy float16 --html out/p.html")  # fmt: skip
STATES = (
    "emit --checkpoint sharded --layers 1:2 --states states.safetensors --tokens 1,2,3 --decode 4 "
    "--out out/t.safetensors",
    "emit --checkpoint sharded --layers 1:2 --states states.safetensors --tokens 1,2,3 --decode 4 --dtype float32 "
    "--out out/t.safetensors",
)
CASES = (
    "cases --golden golden", "cases small --golden golden --json", "suite check --golden golden",
    "suite check small --golden golden --json",
    "materialise small out/m --golden golden --json", "emit --case small --golden golden --out out/t.safetensors",
    "verify ofcase.safetensors --case small --golden golden --no-diagnose",
    "verify ofcase.safetensors --distances small --golden golden",
    "materialise small out/m --golden golden --dtype float16 --layout mistral",
)  # fmt: skip
CHECKS = ("suite check --golden {g} --json", "suite check --golden {g}", "suite check small --golden {g}",
          "verify ofcase.safetensors --distances small --golden {g}")  # fmt: skip
TEXT = (
    "generate --checkpoint text --chat chat.json --max-new-tokens 1",
    "generate --checkpoint text --chat chat.json --max-new-tokens 1 --json",
    "emit --checkpoint text --chat chat.json --taps logits --estimate --out out/t.safetensors",
)  # fmt: skip
TOKENIZERS = (
    "generate --checkpoint text --prompt Hello --max-new-tokens 1",
    "generate --checkpoint text --chat chat.json --max-new-tokens 1 --json", "info text",
)  # fmt: skip
KNOWN = ("conform --known known.toml --golden golden --case small --dtype float32 --no-diagnose -- /bin/false",)
POLICIES = (
    "policies policy.toml", "policies policy.toml --json", "policies policy.toml bfloat16",
    "policies policy.toml+accumulation=float32",
    "verify trace.safetensors --checkpoint hf --policy policy.toml --no-diagnose",
    "emit --checkpoint hf --tokens 1,2 --policy policy.toml --out out/t.safetensors",
)  # fmt: skip
RESULTS = ("scoreboard results.json", "scoreboard results.json --json", "scoreboard results.json --html out/p.html")
JOB = ("emit --checkpoint sharded --tokens 1,2,3 --out job.safetensors",)


def mutated(
    files: Sequence[str], commands: Sequence[str], mutation: Mutation, after: Callable[[Path], None] | None = None
) -> Any:
    """A function that prepares a trial: one of these files is mutated, and one of these commands reads it."""

    def prepare(_number: int, dice: Random, folder: Path) -> Run:
        words = dice.choice(commands).split()
        file = dice.choice(
            [each for each in files if any(word.split("/")[0] == each.split("/")[0] for word in words)] or [*files]
        )
        copy_needed([*words, file], folder)
        path = next(iter(sorted(folder.glob(file))))
        data = path.read_bytes()
        if dice.random() < 0.03 and mutation is not splice:
            changed = dice.choice((data, base() / "policy.toml", base() / "results.json", base() / "trace.safetensors"))
            changed = changed.read_bytes() if isinstance(changed, Path) else changed
        else:
            changed = mutation(data, dice)
        path.write_bytes(changed)
        if after is not None and dice.random() < 0.9:
            after(path.parent)
        # a job that ends well removes its finished parts
        return Run(words, dice.choice(ENCODINGS), writes=tuple(word for word in words if word == "job.safetensors"))

    return prepare


def copy_needed(words: Sequence[str], folder: Path) -> None:
    """Copy into a folder what words name of the base."""
    source = base()
    for each in source.iterdir():
        if (
            any(re.search(rf"(?<![\w-]){re.escape(each.name)}(?![\w-])", word) for word in words)
            and not (folder / each.name).exists()
        ):
            if each.is_dir():
                shutil.copytree(each, folder / each.name, symlinks=True)
            else:
                shutil.copyfile(each, folder / each.name)
    if "job.safetensors" in words:
        shutil.copytree(source / "job.safetensors.parts", folder / "job.safetensors.parts", dirs_exist_ok=True)
        job = folder / "job.safetensors.parts" / "job.json"  # it names the folder of the checkpoint
        job.write_text(job.read_text().replace(str(source.resolve()), str(folder.resolve())))


WEIGHTS = ("hf/model.safetensors", "mistral/*.safetensors", "sharded/*1-of*.safetensors", "fused/model.safetensors")
LAYOUTS = ("hf", "mistral", "sharded", "fused")
KINDS: dict[str, Kind] = {
    "config.json": Kind(mutated(["hf/config.json", "sharded/config.json", "fused/config.json"], models("hf", "sharded",
    "fused"), json_edits), 14),
    "params.json": Kind(mutated(["mistral/params.json"], models("mistral"), json_edits), 7),
    "index.json": Kind(mutated(["sharded/model.safetensors.index.json"], models("sharded"), json_edits), 7),
    "weights": Kind(mutated(WEIGHTS, models(*LAYOUTS), safetensors_edits), 10),
    "weights, values": Kind(mutated(WEIGHTS, models(*LAYOUTS), values_edited), 5),
    "trace": Kind(mutated(["trace.safetensors"], TRACES, trace_edits), 8),
    "trace, diagnosed": Kind(mutated(["trace.safetensors"], DIAGNOSED, trace_edits), 1),
    "trace of a case": Kind(mutated(["ofcase.safetensors"], CASES[6:8], trace_edits), 5),
    "states": Kind(mutated(["states.safetensors"], STATES, trace_edits), 4),
    "case.toml": Kind(mutated(["golden/small/case.toml"], CASES, toml_edits), 14),
    "case.toml, digests right": Kind(mutated(["golden/small/case.toml"], CASES, toml_edits, fixed_golden), 4),
    "manifest.json": Kind(mutated(["golden/small/manifest.json", "golden/manifest.json"],
    [each.format(g="golden") for each in CHECKS], manifest_edits), 10),
    "golden trace": Kind(mutated(["golden/small/trace-*.safetensors"], [each.format(g="golden") for each in CHECKS],
    trace_edits, fixed_golden), 4),
    "list of digests": Kind(mutated(["sums"], ["suite rebuild out/r small --golden golden --digests sums",
    "suite rebuild out/r small --golden golden --digests sums --json"], any_bytes), 3),
    "fingerprints": Kind(mutated(["prints/small/fingerprint-*.json"], [each.format(g="prints") for each in CHECKS],
    json_edits, fixed_golden), 7),
    "policy.toml": Kind(mutated(["policy.toml"], POLICIES, toml_edits), 10),
    "known.toml": Kind(mutated(["known.toml"], KNOWN, toml_edits), 5),
    "results.json": Kind(mutated(["results.json"], RESULTS, json_edits), 10),
    "matrix.json": Kind(mutated(["whole/matrix.json"], ["mutants results --golden whole",
    "mutants results --golden whole --json"], json_edits), 1),
    "chat.json": Kind(mutated(["chat.json"], TEXT, json_edits), 6),
    "tokenizer.model": Kind(mutated(["text/tokenizer.model"], TOKENIZERS, any_bytes), 3),
    ".npy": Kind(mutated(["logits.npy"], ["router show --logits logits.npy",
    "router show --logits logits.npy --json --router switch",
                                           "router show --logits logits.npy --out out/p.svg"], npy_edits), 12),
    ".npz": Kind(mutated(["values.npz"], [f"verify values.npz {VALUES}"], zip_edits), 6),
    ".pt": Kind(mutated(["values.pt"], [f"verify values.pt {VALUES}"], zip_edits), 6),
    "values.safetensors": Kind(mutated(["values.safetensors"], [f"verify values.safetensors {VALUES}"], trace_edits),
    4),
    "job.json": Kind(mutated(["job.safetensors.parts/job.json"], JOB, json_edits), 3),
    "parts": Kind(mutated(["job.safetensors.parts/*.safetensors"], JOB, trace_edits), 3),
}  # fmt: skip
