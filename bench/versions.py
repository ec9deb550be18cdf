# SPDX-License-Identifier: Apache-2.0
"""The wheel outside a clone, in several versions of Python and NumPy: every output must have the same bytes.

    python -m bench.versions --python ~/.pyenv/versions/3.13.0/bin/python --numpy 2.0.2 --numpy newest

The wheel is built from the tracked files. Each version gets an environment of its own, and an empty working folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "versions.json"
COMMANDS = {
    "suite check one-pair near-tie walking-skeleton --json": 0,
    "emit --case one-pair --out exact.safetensors": 0,
    "emit --case walking-skeleton --policy bfloat16 --out engine.safetensors": 0,
    "verify engine.safetensors --json": 0,
    "verify engine.safetensors --policy float32 --json": 1,
    "materialise near-tie model": 0,
}
"""Command lines, and the exit status that each must have."""
FILES = ("exact.safetensors", "engine.safetensors", "model/model.safetensors", "model/config.json")
FACTS = """
import json, platform, sys, sysconfig, numpy, refmoe
lock = not sysconfig.get_config_var("Py_GIL_DISABLED")
print(json.dumps([platform.python_version(), numpy.__version__, lock, refmoe.__file__.startswith(sys.prefix)]))
"""


def built(folder: Path, python: str) -> Path:
    """The wheel of the tracked files."""
    source = folder / "source"
    source.mkdir()
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    packing = ["tar", "--null", "--files-from=-", "--create"]
    pack = subprocess.run(packing, cwd=ROOT, input=names, capture_output=True, check=True)
    subprocess.run(["tar", "--extract"], cwd=source, input=pack.stdout, check=True)
    subprocess.run([python, "-m", "venv", folder / "builder"], check=True)
    builder = folder / "builder" / "bin" / "python"
    subprocess.run([builder, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source], check=True)
    return next(folder.glob("*.whl"))


def tried(folder: Path, wheel: Path, python: str, numpy: str) -> dict[str, Any]:
    """Run the commands in one version of Python and NumPy.   numpy: a version, or ``newest``"""
    venv, work = folder / "venv", folder / "empty"
    subprocess.run([python, "-m", "venv", venv], check=True)
    own = venv / "bin" / "python"
    wanted = "numpy" if numpy == "newest" else f"numpy=={numpy}"
    installed = subprocess.run(
        [own, "-m", "pip", "install", "-q", "--only-binary=:all:", wheel, wanted],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if installed.returncode:
        version = "import platform; print(platform.python_version())"
        told = subprocess.run([own, "-c", version], capture_output=True, text=True, check=False)
        return {
            "python": told.stdout.strip(),
            "numpy": numpy,
            "not_tried": installed.stderr.strip().splitlines()[-1],
        }
    work.mkdir()
    hidden = ("PYTHONPATH", "REFMOE_GOLDEN")
    surroundings = {name: value for name, value in os.environ.items() if name not in hidden}

    def run(*words: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([own, *words], cwd=work, env=surroundings, capture_output=True, check=False)

    version, numpys, lock, outside = json.loads(run("-c", FACTS).stdout)
    assert outside, "refmoe was imported from elsewhere than the wheel"
    digests = {}
    for words, status in COMMANDS.items():
        done = run("-m", "refmoe", *words.split())
        if done.returncode != status:
            raise SystemExit(
                f"{version}, NumPy {numpys}: {words}: status {done.returncode}: {done.stderr.decode()[-400:]}"
            )
        digests[words] = hashlib.sha256(done.stdout + done.stderr).hexdigest()
    digests |= {name: hashlib.sha256((work / name).read_bytes()).hexdigest() for name in FILES}
    return {"python": version, "numpy": numpys, "global_lock": lock, "digests": digests}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", required=True, help="a Python; repeatable")
    parser.add_argument("--numpy", action="append", required=True, help="a version of NumPy, or newest; repeatable")
    parser.add_argument("--not-tried", action="append", default=[], help="a version that is not to be had, and why")
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        wheel = built(Path(name), given.python[0])
        for python in given.python:
            for numpy in given.numpy:
                with tempfile.TemporaryDirectory() as place:
                    found.append(tried(Path(place), wheel, python, numpy))
                print(found[-1].get("python"), found[-1].get("numpy"), found[-1].get("not_tried", "tried"), flush=True)
    ran = [each for each in found if "digests" in each]
    missing = [f"{each['python']}, NumPy {each['numpy']}: {each['not_tried']}" for each in found if "not_tried" in each]
    different = [key for key in ran[0]["digests"] if len({each["digests"][key] for each in ran}) > 1]
    facts = {
        "commands": [*COMMANDS], "files": [*FILES], "versions": [{k: v for k,
        v in each.items() if k != "digests"} for each in ran],
        "digests": ran[0]["digests"], "different": different, "not_tried": missing + given.not_tried,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{len(ran)} versions, different: {different or 'nothing'}")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
