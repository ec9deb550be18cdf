# SPDX-License-Identifier: Apache-2.0
"""``refmoe conform --write-ci``: files of CI systems that are valid, run unchanged, and know today's failures."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from refmoe.api.conforming import Conformance, Repeatable
from refmoe.api.serving import Served
from refmoe.engines.known import read_known
from refmoe.engines.scaffold.ci import EXTRAS, REF, SYSTEMS, Pipeline, ci_text
from refmoe.errors import InputError
from tests.ci.test_action import PLANTED, action
from tests.ci.tools import complaints, program, schema_faults, shell_faults
from tests.command_line import Refmoe
from tests.engines.running import HONEST
from tests.tour import ROOT, environment_in

yaml = pytest.importorskip("yaml")

FROM = ("--refmoe-from", "someone/refmoe")
FILES = {"github": ".github/workflows/refmoe.yml", "gitlab": ".gitlab/refmoe.yml", "shell": "refmoe.sh"}
SCHEMAS = {"github": "vendor.github-workflows", "gitlab": "vendor.gitlab-ci"}
ODD = 'it\'s "${{ secrets.X }}": # é \u2028 \x7f $(touch owned) `touch owned`'
"""An argument with quotes of the shell and of YAML, an expression of GitHub, and characters that YAML does not take."""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a repository, in which an engine is wrong at one of two cases."""
    work = tmp_path / "work"
    (work / ".git").mkdir(parents=True)
    engine = (ROOT / "examples" / "mixtral.py").read_text()
    (work / "wrong.py").write_text(engine.replace(*PLANTED))
    monkeypatch.chdir(work)
    return work


def write(refmoe: Refmoe, *words: object, status: int = 1) -> str:
    done, out, err = refmoe("conform", "--no-diagnose", *words)
    assert done == status, out + err
    return out + err


ENGINE = ("--adapter", "wrong.py", "--case", "square", "--case", "walking-skeleton", "--dtype", "float32")


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def github_inputs(path: Path) -> dict[str, str]:
    """The inputs of the action, with the expressions of GitHub evaluated: all of them are texts in quotes."""
    (job,) = loaded(path)["jobs"].values()
    (step,) = [step for step in job["steps"] if step.get("id") == "refmoe"]
    return {name: value.replace("${{ '${{' }}", "${{") for name, value in step["with"].items()}


# ---- valid


EVERY = Conformance(
    adapter="wrong.py", options=("a=b",), cases=("square",), families=("production",), dtypes=("float32",),
    policies=("float32",), fresh=1, gguf="gguf:Q8_0", quantise="int8-channel",
)  # fmt: skip
"""A run with each option that another machine needs, whether or not they go together."""
SERVER = Served(
    url="http://127.0.0.1:8000", kind="openai", model="m", dtype="float32", policy="mlx-float32", case="square",
    command=("vllm", "serve", "{checkpoint}"), timeout=60,
)  # fmt: skip


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(("run", "count"), [(EVERY, 10), (SERVER, 7)])
def test_each_option_of_a_run_is_in_each_file(run: Repeatable, count: int, system: str) -> None:
    options = run.repeated()
    assert len(options) == count
    text = ci_text(system, Pipeline("someone/refmoe", options, (), Path("known.toml"), ()))
    assert all(value in text for values in options.values() for value in values)
    if system == "github":
        inputs = {*yaml.safe_load(text)["jobs"]["conformance"]["steps"][1]["with"]}
        assert inputs <= {*action()["inputs"]}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_file_is_valid_whatever_an_argument_is(system: str, work: Path, tmp_path: Path, refmoe: Refmoe) -> None:
    write(refmoe, "--case", "one-pair", "--dtype", "float32", "--write-ci", system, ".", *FROM, "--", *HONEST, ODD,
          status=0)  # fmt: skip
    path = work / FILES[system]
    assert path.is_file()
    if system in SCHEMAS:
        assert schema_faults(SCHEMAS[system], path) == ""
    else:
        assert shell_faults(path.read_text(), tmp_path, "sh") == ""


@pytest.mark.parametrize("system", SCHEMAS)
def test_the_schemas_are_some_that_can_refuse(system: str, tmp_path: Path) -> None:
    text = ci_text(system, pipeline()).replace("ubuntu-latest", "").replace("script:", "scripts:")
    (tmp_path / "wrong.yml").write_text(text)
    assert schema_faults(SCHEMAS[system], tmp_path / "wrong.yml") != ""


def test_actionlint_has_nothing_against_the_workflow(work: Path, refmoe: Refmoe) -> None:
    lint = program("actionlint")
    write(refmoe, *ENGINE, "--write-ci", "github", ".", *FROM, "--sarif", "a.sarif", "--source", "wrong.py")
    assert complaints([lint, str(work / FILES["github"])]) == ""


OLDEST = {"actions/checkout": 5, "actions/upload-artifact": 6, "github/codeql-action/upload-sarif": 4}
"""The first versions that run on Node.js 24. GitHub removed Node.js 20 from its runners in September 2026."""


def test_actions_of_others_run_on_the_runners_of_today(work: Path, refmoe: Refmoe) -> None:
    write(refmoe, *ENGINE, "--write-ci", "github", ".", *FROM)
    texts = [(work / FILES["github"]).read_text(), (ROOT / "action.yml").read_text()]
    used = [re.findall(r"uses: ([\w/-]+)@v(\d+)$", text, re.MULTILINE) for text in texts]
    assert {name for found in used for name, _ in found} == {*OLDEST, "someone/refmoe"}
    assert all(int(version) >= OLDEST.get(name, 0) for found in used for name, version in found)


# ---- the same run


def test_the_workflow_gives_the_action_this_run(work: Path, refmoe: Refmoe) -> None:
    write(
        refmoe, *ENGINE, "--sarif", "a.sarif", "--source", "attention.scores=wrong.py:np.tile", "--source", "wrong.py",
        "--timeout", 60, "--write-ci", "github", ".", *FROM,
    )  # fmt: skip
    inputs = github_inputs(work / FILES["github"])
    assert inputs == {
        "adapter": "wrong.py", "cases": "square\nwalking-skeleton", "dtypes": "float32", "timeout": "60",
        "known": "refmoe-known.toml", "sources": "attention.scores=wrong.py:np.tile\nwrong.py", "sarif": "upload",
    }  # fmt: skip
    assert inputs.keys() <= action()["inputs"].keys()
    workflow = loaded(work / FILES["github"])
    assert workflow["permissions"] == {"contents": "read", "security-events": "write"}


def test_a_command_is_the_same_words_behind_quotes(work: Path, refmoe: Refmoe) -> None:
    words = [*HONEST, ODD, "two\nlines"]
    write(
        refmoe, "--case", "one-pair", "--dtype", "float32", "--write-ci", "github", ".", *FROM, "--", *words, status=0
    )
    text = (work / FILES["github"]).read_text()
    assert "${{ secrets" not in text
    assert shlex.split(github_inputs(work / FILES["github"])["command"]) == words
    assert loaded(work / FILES["github"])["permissions"] == {"contents": "read"}


def test_todays_failures_are_known_to_gitlab_and_to_a_shell(work: Path, tmp_path: Path, refmoe: Refmoe) -> None:
    """Each command is run as it stands, without the installation; the wrong case is known, so it succeeds."""
    out = write(refmoe, *ENGINE, "--write-ci", "gitlab", ".", "--write-ci", "shell", ".", *FROM)
    assert all(f"written: {name}" in out for name in ("refmoe-known.toml", FILES["gitlab"], FILES["shell"]))
    (known,) = read_known(work / "refmoe-known.toml")
    assert (known.engine, known.case, known.dtype) == ("mixtral.py", "walking-skeleton", "float32")
    environment = environment_in(tmp_path)
    job = loaded(work / FILES["gitlab"])["refmoe"]
    install, command = job["script"]
    assert shlex.split(install) == [
        "python", "-m", "pip", "install", f"refmoe @ git+https://github.com/someone/refmoe@{REF}"
    ]  # fmt: skip
    for run in ([*shlex.split("sh -c"), command], [str(work / FILES["shell"])]):
        done = subprocess.run(run, cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "known to fail" in done.stdout
    assert {*job["artifacts"]["paths"]} == {path.name for path in work.iterdir() if path.name.startswith("refmoe-")} - {
        "refmoe-known.toml"
    }  # fmt: skip
    assert job["artifacts"]["reports"]["junit"] in job["artifacts"]["paths"]
    (work / "wrong.py").write_text((ROOT / "examples" / "mixtral.py").read_text())
    done = subprocess.run([work / FILES["shell"]], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 1, "the list is out of date"


def test_the_shell_installs_refmoe_where_it_is_missing(work: Path, tmp_path: Path, refmoe: Refmoe) -> None:
    """A `python3` that only writes its arguments stands for the one that would use the network."""
    write(refmoe, *ENGINE, "--write-ci", "shell", ".", *FROM)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > asked\nexit 9\n')
    (programs / "python3").chmod(0o755)
    path = os.pathsep.join([str(programs), "/usr/bin", "/bin"])
    done = subprocess.run([work / FILES["shell"]], env={"PATH": path}, capture_output=True, check=False)
    assert done.returncode == 9
    assert (work / "asked").read_text().splitlines()[-1] == f"refmoe @ git+https://github.com/someone/refmoe@{REF}"


# ---- where refmoe comes from


def pipeline(source: str = "someone/refmoe", **options: list[str]) -> Pipeline:
    return Pipeline(source=source, options=options, harness=["./x"] * (not options), known=Path("k.toml"), places=[])


@pytest.mark.parametrize(
    ("source", "uses"), [("a-b/c.d", f"a-b/c.d@{REF}"), ("a/b@1.10", "a/b@1.10"), ("a/b@x/y", "a/b@x/y")]
)
def test_refmoe_comes_from_the_repository_that_was_named(source: str, uses: str) -> None:
    text = ci_text("github", pipeline(source))
    assert f"uses: {uses}\n" in text
    for system in ("gitlab", "shell"):
        assert f"git+https://github.com/{uses}" in ci_text(system, pipeline(source))


def test_an_adapter_of_refmoe_brings_its_engine() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*EXTRAS.values()} <= {*extras}
    for adapter, extra in EXTRAS.items():
        assert f"refmoe[{extra}] @ git" in ci_text("gitlab", pipeline(adapter=[adapter]))
        assert f'extras: "{extra}"' in ci_text("github", pipeline(adapter=[adapter]))
    files = {"format": ["gguf:Q8_0"]}  # refmoe writes them by a package
    for adapter, extra in (("llama_cpp", "llama-cpp"), ("transformers", "engines,llama-cpp"), ("a.py", "llama-cpp")):
        assert f"refmoe[{extra}] @ git" in ci_text("gitlab", pipeline(adapter=[adapter], **files))


# ---- refused


@pytest.mark.parametrize("system", SYSTEMS)
def test_nothing_is_replaced(system: str, work: Path, refmoe: Refmoe) -> None:
    """Neither a file of this name nor a link, and the run does not begin."""
    path = work / FILES[system]
    path.parent.mkdir(parents=True, exist_ok=True)
    for make in (lambda: path.write_text("mine"), lambda: path.symlink_to("nowhere")):
        make()
        said = write(refmoe, "--adapter", "none.py", "--write-ci", system, ".", *FROM, status=2)
        assert f"{FILES[system]}: is there already" in said
        assert not (work / "refmoe-known.toml").exists()
        path.unlink()


def test_a_list_of_known_failures_is_taken_and_never_replaced(work: Path, refmoe: Refmoe) -> None:
    (work / "refmoe-known.toml").write_text('format_version = "1"\n')
    said = write(refmoe, *ENGINE, "--write-ci", "shell", ".", *FROM, status=2)
    assert "refmoe-known.toml: is there already" in said
    (work / "ci").mkdir()
    (work / "refmoe-known.toml").rename(work / "ci" / "list.toml")
    write(refmoe, *ENGINE, "--known", "ci/list.toml", "--write-ci", "shell", ".", *FROM)
    assert re.search(r"--known ci/list\.toml\b", (work / FILES["shell"]).read_text())
    assert not (work / "refmoe-known.toml").exists()


@pytest.mark.parametrize("system", ["github", "gitlab"])
def test_a_value_that_a_file_cannot_hold_is_one_sentence(system: str) -> None:
    odd = ["two\nlines"] if system == "github" else ["\udcff"]
    with pytest.raises(InputError, match="--write-ci"):
        ci_text(system, pipeline(adapter=odd))


def test_the_json_of_a_run_stays_one_object(work: Path, refmoe: Refmoe) -> None:
    status, out, _ = refmoe("conform", "--no-diagnose", *ENGINE, "--json", "--write-ci", "shell", ".", *FROM)
    assert (status, json.loads(out)["status"]) == (1, 1)
