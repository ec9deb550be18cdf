# SPDX-License-Identifier: Apache-2.0
"""The container: its file is sound, its steps work, and it is built where there is a builder."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.ci.tools import complaints, program
from tests.tour import ROOT

DOCKERFILE = ROOT / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """The instructions of the file, each with its arguments. None of them goes over a line."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    assert not any(line.endswith("\\") for line in lines)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_hadolint_has_nothing_against_it() -> None:
    assert complaints([program("hadolint"), str(DOCKERFILE)]) == ""


def test_it_runs_as_an_ordinary_user_and_is_the_command() -> None:
    last = dict(instructions())
    assert (last["USER"], last["ENTRYPOINT"], last["CMD"]) == ("10001", '["refmoe"]', '["--help"]')


def test_the_builder_sees_all_that_is_copied() -> None:
    """The patterns of .dockerignore: the last that fits decides."""
    patterns = (ROOT / ".dockerignore").read_text().split()
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from"):
            for name in rest.split()[:-1]:
                assert (ROOT / name).exists()
                fitting = [each for each in patterns if fnmatch(name, each.removeprefix("!"))]
                assert fitting[-1].startswith("!"), name


@pytest.mark.slow
def test_its_steps_make_the_command(tmp_path: Path) -> None:
    """Each stage in a folder of its own that stands for the root, with a new Python for each."""
    stages: dict[str, Path] = {}
    stage = tmp_path
    for word, rest in instructions():
        if word == "FROM":
            stage = tmp_path / f"stage{len(stages)}"
            stages[rest.partition(" AS ")[2] or "last"] = stage
            subprocess.run([sys.executable, "-m", "venv", str(stage / "venv")], check=True)
        elif word == "COPY":
            source = ROOT
            if rest.startswith("--from="):
                name, _, rest = rest.removeprefix("--from=").partition(" ")
                source = stages[name]
            *names, target = rest.split()
            for name in names:
                _copy(source / name.lstrip("/"), stage / target.lstrip("/"), target.endswith("/"))
        elif word == "RUN" and "useradd" not in rest:  # that changes the machine
            _run(re.sub(r"(?<![\w.])/(?=src|wheels)", f"{stage}/", rest), stage)
    (stage / "work").mkdir()
    done = subprocess.run(
        [stages["last"] / "venv" / "bin" / "refmoe", "cases"], cwd=stage / "work", capture_output=True, text=True,
        check=False, env={},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 40


def _copy(source: Path, target: Path, into: bool) -> None:
    target = target / source.name if into else target
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def _run(command: str, stage: Path) -> None:
    import os

    programs = os.pathsep.join([str(stage / "venv" / "bin"), os.environ["PATH"]])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": programs}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_it_is_built_and_runs_without_a_network() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no builder of containers is here: no Docker daemon answers")
    subprocess.run([docker, "build", "--quiet", "--tag", "refmoe-test", str(ROOT)], check=True)
    done = subprocess.run(
        [docker, "run", "--rm", "--network", "none", "refmoe-test", "suite", "check", "one-pair"], check=False
    )
    assert done.returncode == 0
