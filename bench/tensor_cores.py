# SPDX-License-Identifier: Apache-2.0
"""Products as the tensor cores of ten architectures compute them, each judged as if it were somebody's kernel.

MMA-Sim (`pip install mmasim`, Xie et al. 2025, arXiv 2511.10909) models each instruction bit for bit, on a CPU. Its
package names no licence, so refmoe neither contains it nor depends on it: this program and its recorded results do.
Each engine multiplies matrices of the sizes and kinds that the steps of Mixtral have. The result is judged in float32,
as the accumulator holds it, and in the dtype of the factors. Honest engines must pass the policy of their dtype, and
engines with narrow accumulators must not.

    python -m bench.tensor_cores                        # all engines and steps; writes bench/results/tensor_cores.json
    python -m bench.tensor_cores --resume               # only what that file lacks
    python -m bench.tensor_cores --record PATH          # bits of small products, for tests that have no MMA-Sim
"""

from __future__ import annotations

import argparse
import base64
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refmoe.arithmetic.formats import FLOAT32, nearest
from refmoe.arithmetic.tensor_core import TENSOR_CORES, TF32
from refmoe.files.atomic import replacing
from refmoe.testing.products import judge_linear
from refmoe.testing.tensor_core import judge_tensor_core_linear

FILE = Path(__file__).parent / "results" / "tensor_cores.json"
ROWS = 32
"""The fewest rows for which size and lean of the errors count are 30."""
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "tf32": np.dtype(np.float32),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
}
"""NumPy's dtype of the factors."""
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "float8_e4m3fnuz": 240.0}


@dataclass(frozen=True)
class Engine:
    """One instruction of one architecture, with which whole products are made."""

    architecture: str
    dtype: str
    """Of the factors."""
    instruction: str
    """As MMA-Sim names it, after ``mma``, ``wgmma``, ``tcgen05`` or ``mfma``."""
    policy: str
    """The policy that must pass it, or the tensor core that must."""
    promoted: int | None = None
    """The products after which the sum is added to one in float32."""
    flushes: bool = False
    """Whether the policy is that of factors of which the subnormal ones are zero."""
    faulty: bool = False
    """Whether the accumulator is narrower than the policy allows, so that it must fail."""

    @property
    def name(self) -> str:
        promoted = f", promoted every {self.promoted}" if self.promoted else ""
        return f"{self.architecture} {self.dtype}, {self.instruction}{promoted}"


ANY_CUT = "float32+truncates=true"
"""The policy of any float32 sums that are cut off, where the tensor core is not named."""
TF32_CORES = {"Ampere": "ampere-tf32", "Ada Lovelace": "ampere-tf32", "RTX Blackwell": "hopper-tf32"}


def _engines() -> Iterator[Engine]:
    mma16 = {
        "Volta": ("m8n8k4",), "Turing": ("m16n8k8",), "Ampere": ("m16n8k16",), "Ada Lovelace": ("m16n8k16",),
        "RTX Blackwell": ("m16n8k16",),
    }  # fmt: skip
    for architecture, (shape,) in mma16.items():
        yield Engine(architecture, "float16", f"mma {shape}.f32.f16.f16.f32", "float16")
        if architecture not in ("Volta", "Turing"):
            yield Engine(architecture, "bfloat16", f"mma {shape}.f32.bf16.bf16.f32", "bfloat16")
            for policy in (TF32_CORES[architecture], ANY_CUT):
                yield Engine(architecture, "tf32", "mma m16n8k8.f32.tf32.tf32.f32", policy)
    yield Engine("Hopper", "float16", "wgmma m64n8k16.f32.f16.f16", "float16")
    yield Engine("Hopper", "bfloat16", "wgmma m64n8k16.f32.bf16.bf16", "bfloat16")
    for policy in ("hopper-tf32", ANY_CUT):
        yield Engine("Hopper", "tf32", "wgmma m64n8k8.f32.tf32.tf32", policy)
    yield Engine("Blackwell", "float16", "tcgen05 m64n8k16.kind::f16.f32.f16.f16", "float16")
    yield Engine("Blackwell", "bfloat16", "tcgen05 m64n8k16.kind::f16.f32.bf16.bf16", "bfloat16")
    for policy in ("hopper-tf32", ANY_CUT):
        yield Engine("Blackwell", "tf32", "tcgen05 m64n8k8.kind::tf32.f32.tf32.tf32", policy)
    yield Engine("CDNA1", "float16", "mfma f32_16x16x16f16", "float16")
    yield Engine("CDNA1", "bfloat16", "mfma f32_16x16x8bf16", "bfloat16")
    yield Engine("CDNA2", "float16", "mfma f32_16x16x16f16", "float16", flushes=True)
    yield Engine("CDNA2", "float16", "mfma f32_16x16x16f16", "float16", faulty=True)
    yield Engine("CDNA2", "bfloat16", "mfma f32_16x16x16bf16_1k", "bfloat16")
    yield Engine("CDNA2", "bfloat16", "mfma f32_16x16x8bf16", "bfloat16")
    yield Engine("CDNA3", "float16", "mfma f32_16x16x16_f16", "float16")
    yield Engine("CDNA3", "bfloat16", "mfma f32_16x16x16_bf16", "bfloat16")
    yield Engine("CDNA3", "tf32", "mfma f32_16x16x8_xf32", ANY_CUT)
    yield Engine("CDNA3", "float8_e4m3fnuz", "mfma f32_16x16x32_fp8_fp8", "bfloat16")
    for dtype, short in (("float8_e4m3fn", "e4m3"), ("float8_e5m2", "e5m2")):
        yield Engine("Ada Lovelace", dtype, f"mma m16n8k32.f32.{short}.{short}.f32", "ada-fp8")
        yield Engine("Hopper", dtype, f"wgmma m64n8k32.f32.{short}.{short}", "hopper-fp8-fast")
        yield Engine("Hopper", dtype, f"wgmma m64n8k32.f32.{short}.{short}", "hopper-fp8", promoted=128)
        yield Engine("Blackwell", dtype, f"tcgen05 m64n8k32.kind::f8f6f4.f32.{short}.{short}", "bfloat16")
        yield Engine("RTX Blackwell", dtype, f"mma m16n8k32.kind::f8f6f4.f32.{short}.{short}.f32", "bfloat16")
        yield Engine("Hopper", dtype, f"wgmma m64n8k32.f32.{short}.{short}", "hopper-fp8", faulty=True)
    yield Engine("Hopper", "float8_e4m3fn", "wgmma m64n8k32.f32.e4m3.e4m3", "bfloat16", faulty=True)
    for architecture, shape in (("Volta", "m8n8k4"), ("Turing", "m16n8k8"), ("Ampere", "m16n8k16")):
        yield Engine(architecture, "float16", f"mma {shape}.f16.f16.f16.f16", "float16", faulty=True)
    yield Engine("Ampere", "tf32", "mma m16n8k8.f32.tf32.tf32.f32", "float32", faulty=True)


ENGINES = tuple(_engines())


@dataclass(frozen=True)
class Step:
    """A product of the model: its size, and the kind of its factors."""

    name: str
    terms: int
    columns: int
    kind: str


STEPS = (
    Step("attention.scores", 128, 32, "activations"),
    Step("attention.context", 2048, 16, "probabilities"),
    Step("router.logits", 4096, 8, "weights"),
    Step("expert.gate", 4096, 16, "weights"),
    Step("expert.output", 14336, 8, "outliers"),
)


# ---- the factors


def factors(step: Step, engine: Engine, seed: int = 0) -> tuple[Any, Any]:
    """x [ROWS, terms] and w [columns, terms] in the dtype of the engine's factors.

    Those of TF32 are float32: all that TF32 holds, or any float32 for the engine that must fail.
    """
    rng = np.random.default_rng([seed, step.terms, step.columns])
    x, w = rng.standard_normal((ROWS, step.terms)), rng.standard_normal((step.columns, step.terms))
    if step.kind == "probabilities":
        x = np.exp(2 * x)
        x /= x.sum(1, keepdims=True)
        w[::2] = np.abs(w[::2])  # with terms of one sign, all that is cut off adds up
    elif step.kind == "outliers":
        x = rng.standard_t(3, x.shape)
    eight = engine.dtype in LARGEST
    if not eight and step.kind in ("weights", "outliers"):
        w /= math.sqrt(step.terms)
    if eight and step.kind == "probabilities":
        x *= 256  # as kernels do: FP8 holds nothing below 2^-9
    most = LARGEST.get(engine.dtype, 6e4)
    x, w = np.clip(x, -most, most), np.clip(w, -most, most)
    if engine.dtype == "tf32":
        held = FLOAT32 if engine.faulty else TF32
        x, w = nearest(x, held), nearest(w, held)
    return x.astype(DTYPES[engine.dtype]), w.astype(DTYPES[engine.dtype])


# ---- the engines


@cache
def operation(architecture: str, instruction: str) -> Any:
    """MMA-Sim's model of an instruction, which takes matrices of any size."""
    import mmasim.amd.sim as amd
    import mmasim.nv_ptx.sim as nv

    kind, _, name = instruction.partition(" ")
    make: Callable[[str, str], Any] = {
        "mma": nv.MMA, "wgmma": nv.WGMMA, "tcgen05": nv.TCGen05MMA, "mfma": amd.MFMA,
    }[kind]  # fmt: skip
    return make(architecture, name)


def multiplied(engine: Engine, x: Any, w: Any) -> Any:
    """x [l, n] times the transpose of w [m, n], float32 [l, m].

    The model of an instruction takes terms in its own groups, whatever their number. So one call makes the same bits as
    one call for each tile.
    """
    import torch

    op = operation(engine.architecture, engine.instruction)

    def tensor(array: Any) -> Any:
        wide = torch.from_numpy(array.astype(np.float32))
        return wide.to({"tf32": torch.float32}.get(engine.dtype) or getattr(torch, engine.dtype))

    a, b = tensor(x), tensor(w).T
    chain = engine.promoted or x.shape[1]
    total = np.zeros((len(x), len(w)), np.float32)
    for start in range(0, x.shape[1], chain):
        part = slice(start, start + chain)
        total += op(a[:, part], b[part], torch.zeros(total.shape, dtype=op.c_type)).float().numpy()
    return total


def judged(engine: Engine, found: Any, x: Any, w: Any) -> Any:
    """The judgement of one result by the engine's policy."""
    if engine.policy in TENSOR_CORES:
        return judge_tensor_core_linear(found, x, w, core=engine.policy)
    if engine.dtype in LARGEST:  # bfloat16 holds every FP8 value
        x, w = x.astype(ml_dtypes.bfloat16), w.astype(ml_dtypes.bfloat16)
    if engine.flushes:
        least = ml_dtypes.finfo(x.dtype).smallest_normal
        x, w = (np.where(np.abs(each) < least, 0, each).astype(each.dtype) for each in (x, w))
    return judge_linear(found, x, w, policy=engine.policy, explain=False)


def measured(engine: Engine, step: Step) -> dict[str, Any]:
    """The judgements of one engine's product, in float32 and in the dtype of the factors."""
    x, w = factors(step, engine)
    sums = multiplied(engine, x, w)
    narrow = {"float16": "float16", "tf32": ""}.get(engine.dtype, "bfloat16")
    found = {"float32": sums} | ({narrow: sums.astype(DTYPES[narrow])} if narrow else {})
    if engine.instruction.endswith("f16.f16.f16.f16"):
        del found["float32"]
    row = {}
    for stored, values in found.items():
        each = judged(engine, values, x, w)
        row[stored] = {
            "verdict": each.verdict, "values": each.values, "headroom": each.headroom, "excess": each.deviations,
            "limit": each.limit, "size": each.size, "named": list(each.explanations), "reason": each.reason,
        }  # fmt: skip
    return row


# ---- bits for tests


def recorded(engine: Engine) -> dict[str, Any]:
    """Factors and sums of a small product, in base64: random bits with exponents near each other, zeros, subnormals."""
    rng = np.random.default_rng(11)
    dtype = DTYPES[engine.dtype]
    least = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    shape = (4, 80), (4, 80)
    x, w = (rng.standard_normal(each) * np.exp2(rng.integers(-6, 7, each)) for each in shape)
    x[:, ::7], w[:, 3::11] = 0, 0
    if least > 1e-10:
        x[:, 1::9] = least * rng.integers(1, 8, x[:, 1::9].shape)
        w[:, 1::9] = np.abs(w[:, 1::9])
    most = LARGEST.get(engine.dtype, 6e4)
    x, w = np.clip(x, -most, most), np.clip(w, -most, most)
    if engine.dtype == "tf32":
        x, w = nearest(x, TF32), nearest(w, TF32)
    x, w = x.astype(dtype), w.astype(dtype)
    arrays = {"x": x, "w": w, "sums": multiplied(engine, x, w)}
    return {
        "architecture": engine.architecture, "dtype": engine.dtype, "instruction": engine.instruction,
        "policy": engine.policy, **{name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()},
    }  # fmt: skip


def save(done: dict[str, Any]) -> None:
    """Write what is measured so far. A measurement that is stopped leaves a whole file."""
    with replacing(FILE) as temporary:
        temporary.write_text(json.dumps(done, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="measure only what the file of results lacks")
    parser.add_argument("--record", type=Path, help="write the bits of small products of honest engines here")
    options = parser.parse_args()
    if options.record:
        lines = [json.dumps(recorded(each)) for each in ENGINES if not (each.faulty or each.promoted)]
        options.record.write_text("[\n" + ",\n".join(lines) + "\n]\n")
        return
    done = json.loads(FILE.read_text()) if options.resume and FILE.exists() else {"rows": ROWS, "engines": {}}
    for engine in ENGINES:
        key = f"{engine.name}; {engine.policy}{', subnormal factors as zero' if engine.flushes else ''}"
        entry = done["engines"].setdefault(key, {
            "architecture": engine.architecture, "dtype": engine.dtype, "instruction": engine.instruction,
            "policy": engine.policy, "promoted": engine.promoted, "flushes": engine.flushes, "faulty": engine.faulty,
            "steps": {},
        })  # fmt: skip
        for step in STEPS:
            if step.name in entry["steps"]:
                continue
            entry["steps"][step.name] = {"terms": step.terms, **measured(engine, step)}
            save(done)
            for stored, row in entry["steps"][step.name].items():
                if stored != "terms":
                    print(
                        f"{key:80} {step.name:18} {stored:9} {row['verdict']:5} {row['headroom']:8.3g} "
                        f"{row['excess']:8.3g} {row['size']:6.2f} {'; '.join(row['named'])}", flush=True,
                    )  # fmt: skip


if __name__ == "__main__":
    main()
