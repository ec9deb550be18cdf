# SPDX-License-Identifier: Apache-2.0
"""The action of the repository: it is valid, no input is code, and its scripts do what it promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.ci import tools
from tests.ci.tools import complaints, program, shell_faults
from tests.engines.server.fake import sends, serving
from tests.engines.server.test_command import SCRIPT, free_port
from tests.report.sarif_checks import github_faults, schema_faults
from tests.tour import ROOT, environment_in

yaml = pytest.importorskip("yaml")

ACTION = ROOT / "action.yml"
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
PLANTED = ("np.repeat(each, share, axis=1)", "np.tile(each, (1, share, 1))")
"""A bug: the key/value heads are tiled instead of each repeated."""


def action() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(ACTION.read_text(encoding="utf-8"))
    return found


def scripts() -> dict[str, dict[str, Any]]:
    """The steps that run a script, by their ids; the last one is ``verdict``."""
    return {step.get("id", "verdict"): step for step in action()["runs"]["steps"] if "run" in step}


# ---- valid


def test_it_is_an_action() -> None:
    assert tools.schema_faults("vendor.github-actions", ACTION) == ""


def test_the_schema_is_one_that_can_refuse(tmp_path: Path) -> None:
    wrong = ACTION.read_text().replace("using: composite", "using: composition")
    (tmp_path / "action.yml").write_text(wrong)
    assert tools.schema_faults("vendor.github-actions", tmp_path / "action.yml") != ""


def test_actionlint_knows_its_inputs_and_outputs(tmp_path: Path) -> None:
    """A workflow that uses every input and every output; actionlint reads the action for their names."""
    (tmp_path / ".git").mkdir()
    workflow = tmp_path / ".github" / "workflows" / "all.yml"
    workflow.parent.mkdir(parents=True)
    shutil.copy(ACTION, tmp_path / "action.yml")
    inputs = "".join(f"          {name}: x\n" for name in action()["inputs"])
    outputs = " ".join(f"${{{{ steps.refmoe.outputs.{name} }}}}" for name in action()["outputs"])
    text = (
        "on: push\njobs:\n  one:\n    runs-on: ubuntu-latest\n    steps:\n      - id: refmoe\n        uses: ./\n"
        f"        with:\n{inputs}      - run: echo '{outputs}'\n"
    )
    workflow.write_text(text)
    lint = program("actionlint")
    assert complaints([lint, str(workflow)]) == ""
    workflow.write_text(text.replace("outputs.verdict", "outputs.verdicts").replace("dtypes: x", "dtype: x"))
    said = complaints([lint, str(workflow)])
    assert "verdicts" in said
    assert "dtype" in said


@pytest.mark.parametrize("name", ["install", "conform", "verdict"])
def test_shellcheck_has_nothing_against_its_scripts(name: str, tmp_path: Path) -> None:
    assert shell_faults(scripts()[name]["run"], tmp_path) == ""


def test_no_script_has_an_expression_in_its_text() -> None:
    """GitHub puts the value of an expression into the text of a script, where it would be code."""
    assert {name: EXPRESSION.findall(step["run"]) for name, step in scripts().items()} == {
        "install": [], "conform": [], "verdict": []
    }  # fmt: skip


def test_every_input_reaches_a_script() -> None:
    given = "".join(json.dumps(step) for step in action()["runs"]["steps"])
    assert {name for name in action()["inputs"] if f"inputs.{name} " not in given} == set()


# ---- the scripts, as GitHub runs them


def filled(text: str, values: dict[str, str]) -> str:
    """A text whose expressions have their values. As on GitHub, one without a value is empty."""
    return EXPRESSION.sub(lambda found: values.get(found[1], ""), text)


@dataclass(frozen=True)
class Ended:
    """A job with the action, after its end."""

    status: int
    """Of the action: that of the first step that fails."""
    outputs: dict[str, str]
    summary: str
    said: str


@dataclass
class Runner:
    """What a runner of GitHub does with the steps of a composite action that are scripts."""

    folder: Path
    program: Path | None
    """The command in place of one that the first step installs; None: it is installed."""

    def run(self, **inputs: str) -> Ended:
        """Run the action.   inputs: their names with underscores"""
        given = {name: str(each.get("default", "")) for name, each in action()["inputs"].items()}
        given |= {name.replace("_", "-"): value for name, value in inputs.items()}
        values = {f"inputs.{name}": value for name, value in given.items()}
        values |= {"github.action_path": str(ROOT), "runner.temp": str(self.folder / "temp")}
        values |= {"github.action_repository": "example/refmoe", "github.action_ref": "v0"}
        (self.folder / "temp").mkdir(exist_ok=True)
        summary = self.folder / "summary"
        summary.write_text("before\n")
        said, status = "", 0
        for name, step in scripts().items():
            if name == "install" and self.program is not None:
                values["steps.install.outputs.program"] = str(self.program)
                continue
            output = self.folder / "output"
            output.write_text("")
            variables = {key: filled(text, values) for key, text in step["env"].items()}
            (self.folder / "step.sh").write_text(step["run"])
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(self.folder / "step.sh")],
                cwd=self.folder / "work", capture_output=True, text=True, check=False,
                env={**os.environ, **variables, "GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)},
            )  # fmt: skip
            said += done.stdout + done.stderr
            pairs = [line.partition("=") for line in output.read_text().splitlines()]
            values |= {f"steps.{name}.outputs.{key}": value for key, _, value in pairs}
            status = done.returncode
            if status:
                break
        outputs = {name: filled(each["value"], values) for name, each in action()["outputs"].items()}
        return Ended(status, outputs, summary.read_text(), said)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """A runner whose working folder is a repository with an engine, and with the same engine with a bug."""
    work = tmp_path / "work"
    (work / ".git").mkdir(parents=True)
    engine = (ROOT / "examples" / "mixtral.py").read_text()
    assert PLANTED[0] in engine
    (work / "right.py").write_text(engine)
    (work / "wrong.py").write_text(engine.replace(*PLANTED))
    environment_in(tmp_path)
    return Runner(tmp_path, tmp_path / ".programs" / "refmoe")


def content(ended: Ended, name: str) -> Any:
    return json.loads(Path(ended.outputs[name]).read_text())


def test_an_engine_that_is_right(runner: Runner) -> None:
    ended = runner.run(adapter="right.py", cases="one-pair\n\n  walking-skeleton \r\n", dtypes="float32", sarif="write")
    assert ended.status == 0, ended.said
    assert (ended.outputs["status"], ended.outputs["verdict"]) == ("0", "conformant")
    assert sorted(content(ended, "results")["cases"]) == ["one-pair", "walking-skeleton"]
    assert content(ended, "badge")["color"] == "brightgreen"
    assert content(ended, "sarif")["runs"][0]["results"] == []
    assert ended.summary.startswith("before\n"), "a summary is added to those of other steps"
    assert "walking" not in ended.summary
    assert Path(ended.outputs["junit"]).read_text().count("<testcase") == 2


def test_an_engine_that_is_wrong(runner: Runner) -> None:
    """The alert lies at the line with the text of `sources`, and links to this version of the action."""
    ended = runner.run(
        adapter="wrong.py", cases="walking-skeleton", sarif="write",
        sources="attention.scores=wrong.py:np.tile\nright.py:7\n",
    )  # fmt: skip
    assert (ended.status, ended.outputs["verdict"]) == (1, "not conformant"), ended.said
    text = Path(ended.outputs["sarif"]).read_text()
    assert schema_faults(json.loads(text)) == github_faults(text) == []
    run = content(ended, "sarif")["runs"][0]
    (alert,) = run["results"]
    place = alert["locations"][0]["physicalLocation"]
    lines = (runner.folder / "work" / "wrong.py").read_text().splitlines()
    assert place["artifactLocation"]["uri"] == "wrong.py"
    assert "np.tile" in lines[place["region"]["startLine"] - 1]
    assert alert["ruleId"] == "attention.scores"
    rule = run["tool"]["driver"]["rules"][alert["ruleIndex"]]
    assert rule["helpUri"] == "https://github.com/example/refmoe/blob/v0/refmoe/spec/attention.py"
    assert (ROOT / rule["helpUri"].partition("/v0/")[2]).is_file()
    assert "attn-gqa-tile" in alert["message"]["text"]
    assert "attn-gqa-tile" in ended.summary


@pytest.mark.parametrize(
    ("fail_on", "inputs", "status", "verdict"),
    [
        ("any", {"adapter": "wrong.py", "cases": "walking-skeleton"}, 1, "not conformant"),
        ("wrong", {"adapter": "wrong.py", "cases": "walking-skeleton"}, 1, "not conformant"),
        ("never", {"adapter": "wrong.py", "cases": "walking-skeleton"}, 0, "not conformant"),
        ("any", {"command": "exec {python} skips.py", "cases": "one-pair"}, 3, "cannot judge"),
        ("wrong", {"command": "exec {python} skips.py", "cases": "one-pair"}, 0, "cannot judge"),
        ("never", {"command": "exec {python} skips.py", "cases": "one-pair"}, 0, "cannot judge"),
        ("any", {"adapter": "right.py", "cases": "nonesuch"}, 2, "unusable"),
        ("never", {"adapter": "right.py", "cases": "nonesuch"}, 2, "unusable"),
        ("perhaps", {"adapter": "right.py", "cases": "one-pair"}, 2, "conformant"),
    ],
)
def test_the_verdicts_on_which_it_fails(
    runner: Runner, fail_on: str, inputs: dict[str, str], status: int, verdict: str
) -> None:
    shutil.copy(ROOT / "refmoe" / "engines" / "scaffold" / "harness.py", runner.folder / "work" / "skips.py")
    given = {name: value.format(python=sys.executable) for name, value in inputs.items()}
    ended = runner.run(**given, **{"fail-on": fail_on})
    assert (ended.status, ended.outputs["verdict"]) == (status, verdict), ended.said


def test_known_failures_do_not_fail(runner: Runner) -> None:
    known = runner.folder / "work" / "known.toml"
    known.write_text(
        'format_version = "1"\n[[known]]\nengine = "mixtral.py"\ncase = "walking-skeleton"\ndtype = "float32"\n'
        'reason = "heads are tiled"\n'
    )
    ended = runner.run(adapter="wrong.py", cases="walking-skeleton", known="known.toml", sarif="write")
    assert (ended.status, ended.outputs["verdict"]) == (0, "conformant"), ended.said
    assert content(ended, "badge")["color"] not in ("brightgreen", "green")
    (alert,) = content(ended, "sarif")["runs"][0]["results"]
    assert [each["justification"] for each in alert["suppressions"]] == ["heads are tiled"]


def test_a_server_that_answers_with_something_else(runner: Runner) -> None:
    with serving(lambda *_: {}, sends(b"<html>")) as url:
        ended = runner.run(server=url, server_kind="openai", dtypes="float32")
    assert (ended.status, ended.outputs["verdict"]) == (1, "not conformant"), ended.said
    assert [each["verdict"] for each in content(ended, "results")["outcomes"]] == ["broken answer"]


@pytest.mark.slow
def test_a_server_that_the_action_starts(runner: Runner) -> None:
    """The command is a line of bash, in which `{checkpoint}` stands for the model that refmoe has written."""
    (runner.folder / "work" / "server.py").write_text(SCRIPT)
    port = free_port()
    command = f"exec {sys.executable} server.py {port} {{checkpoint}}"
    ended = runner.run(server=f"http://127.0.0.1:{port}", dtypes="float32", command=command)
    assert (ended.status, ended.outputs["verdict"]) == (0, "conformant"), ended.said
    assert content(ended, "results")["engine"]["name"] == "server"


HOSTILE = (
    '"; touch owned; "', "$(touch owned)", "`touch owned`", "x' ; touch owned ; '", "--golden", "${IFS}x", "*", "\\",
    "a\tb", "# no", "é\u202e",
)  # fmt: skip


INPUTS = ("adapter", "server", "options", "cases", "families", "dtypes", "policies", "known", "sources")


@pytest.mark.parametrize("name", INPUTS)
def test_no_input_is_code(runner: Runner, name: str) -> None:
    """All inputs but `command`, which is code. Each line is one value, whatever its characters are."""
    inputs = {"adapter": "right.py", "cases": "one-pair", "sarif": "write", name: "\n".join(HOSTILE)}
    ended = runner.run(**inputs)
    assert (ended.status, ended.outputs["verdict"]) == (2, "unusable"), ended.said
    assert "Traceback" not in ended.said
    assert not (runner.folder / "work" / "owned").exists()


def test_files_of_an_earlier_run_are_not_shown_again(runner: Runner) -> None:
    runner.run(adapter="wrong.py", cases="walking-skeleton", sarif="write")
    ended = runner.run(adapter="right.py", cases="nonesuch", sarif="write")
    assert ended.outputs["sarif"] == ""
    assert not Path(ended.outputs["badge"]).exists()


@pytest.mark.slow
def test_it_installs_refmoe(runner: Runner) -> None:
    runner.program = None
    ended = runner.run(adapter="right.py", cases="one-pair")
    assert (ended.status, ended.outputs["verdict"]) == (0, "conformant"), ended.said
