# SPDX-License-Identifier: Apache-2.0
"""How many different results do the goldens have on different machines? One digest per setting, exact and float64.

Every setting runs in its own process and hashes all taps of all golden cases: once with exact ops, once with plain
NumPy float64. Settings are OpenBLAS kernels, thread counts, and NumPy's SIMD dispatch at two levels. The option
--python adds another Python (another version, NumPy or BLAS), which must be able to import refmoe.

    python bench/invariance.py
    python bench/invariance.py --python /path/to/venv/bin/python --json bench/results/invariance.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = ("Prescott", "Nehalem", "Sandybridge", "Haswell", "Zen", "SkylakeX")
FEATURES = {
    "no AVX-512": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
    "no AVX2": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR",
}
"""Names of NumPy 2.0 to 2.3. NumPy 2.4 has groups of features, and takes the names of groups."""
GROUPS = {"no AVX-512": "X86_V4 AVX512_ICL AVX512_SPR", "no AVX2": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"}


def digests(golden: Path) -> dict[str, str]:
    """By arithmetic, the SHA-256 over the names and bytes of all taps of all golden cases."""
    import numpy as np

    from refmoe.arithmetic.exact.ops import ExactOps
    from refmoe.arithmetic.native.ops import NativeOps
    from refmoe.spec.model import Model
    from refmoe.suite import find_cases, read_case
    from refmoe.traces.script import execute
    from refmoe.traces.trace import Recorder

    found = {"exact": hashlib.sha256(), "float64": hashlib.sha256()}
    for folder in find_cases(golden):
        case = read_case(folder)
        model = Model(case.config, case.checkpoint().parameters)
        for name, digest in found.items():
            recorder = Recorder()
            ops = ExactOps(recorder) if name == "exact" else NativeOps(np.float64, recorder)
            execute(ops, model, case.runs(), recorder)
            for key in sorted(recorder.arrays):
                digest.update(key.encode())
                digest.update(recorder.arrays[key].tobytes())
    return {name: digest.hexdigest() for name, digest in found.items()} | {"setting": describe()}


def describe() -> str:
    """The Python, NumPy and BLAS of this process."""
    import platform

    import numpy as np

    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"Python {platform.python_version()}, NumPy {np.__version__}, {blas.get('name')} {blas.get('version')}"


def settings(pythons: list[str]) -> list[tuple[str, str, dict[str, str]]]:
    """Name, interpreter and environment of every run."""
    here = sys.executable
    listed = [("default", here, {})]
    for kernel in KERNELS:
        for threads in ("1", "2"):
            name = f"OpenBLAS {kernel}, {threads} thread{'s' * (threads != '1')}"
            listed.append((name, here, {"OPENBLAS_CORETYPE": kernel, "OPENBLAS_NUM_THREADS": threads}))
    names = GROUPS if tuple(map(int, _numpy_version(here).split(".")[:2])) >= (2, 4) else FEATURES
    listed += [(f"NumPy with {name}", here, {"NPY_DISABLE_CPU_FEATURES": value}) for name, value in names.items()]
    return listed + [("another Python", python, {}) for python in pythons]


def _numpy_version(python: str) -> str:
    return subprocess.run([python, "-c", "import numpy; print(numpy.__version__)"], capture_output=True, text=True,
                          check=True).stdout.strip()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="another interpreter that can import refmoe")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    parser.add_argument("--golden", type=Path, default=ROOT / "golden", help="the cases to hash (default: all)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(digests(options.golden)))
        return
    rows = []
    for name, python, extra in settings(options.python):
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | extra
        # NumPy warns on standard error about a name that it or the processor does not have
        command = [python, __file__, "--child", "--golden", str(options.golden)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode < 0:
            print(f"{name:32} left out: NumPy dies in this setting by signal {-done.returncode}", flush=True)
            continue
        if done.returncode:
            sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout)
        rows.append({"name": name} | found)
        print(f"{name:32} exact {found['exact'][:12]}  float64 {found['float64'][:12]}  {found['setting']}", flush=True)
    counts = {kind: len({row[kind] for row in rows}) for kind in ("exact", "float64")}
    print(f"{len(rows)} settings: exact gives {counts['exact']} digest, plain float64 gives {counts['float64']}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"settings": rows, "digests": counts}, indent=1) + "\n")
    sys.exit(counts["exact"] != 1)


if __name__ == "__main__":
    main()
