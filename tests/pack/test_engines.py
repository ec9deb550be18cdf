# SPDX-License-Identifier: Apache-2.0
"""The small engines of three languages reach a verdict by a pack alone, and a planted bug is found at its step."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.pack.conftest import Known
from tests.pack.packs import EXAMPLES, LANGUAGES, built

BUGS = {
    "c": [
        ("h / (H / K) * d", "h % K * d", "attention.scores"),
        ("sqrtf(sum / (float)D + eps)", "(sqrtf(sum / (float)D) + 1e-3f)", "attention_norm"),
    ],
    "mjs": [
        ("Math.floor(h / (H / K)) * d", "(h % K) * d", "attention.scores"),
        ("distance < this.window", "distance <= this.window", "attention.probs"),
    ],
    "rs": [
        ("h / (H / K) * d", "h % K * d", "attention.scores"),
        ("g / (1.0 + (-g).exp()) * u", "u / (1.0 + (-u).exp()) * g", "expert.hidden"),
    ],
}
"""Per language texts of the engine, their replacements, and the first step that they make wrong."""


def engine(language: str, folder: Path, edit: tuple[str, str] | None = None) -> list[str]:
    """The command of an engine, built in a folder.   edit: a text and its replacement"""
    folder.mkdir()
    for path in EXAMPLES.glob("*"):
        shutil.copy(path, folder / path.name)
    source = folder / f"engine.{language}"
    if edit is not None:
        text = source.read_text()
        assert text.count(edit[0]) == 1
        source.write_text(text.replace(*edit))
    return built(source, folder / "engine")


def said(command: list[str], pack: Path) -> tuple[int, list[str]]:
    done = subprocess.run([*command, str(pack)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_is_conformant(language: str, smoke: Path, known: Known, tmp_path: Path) -> None:
    command = engine(language, tmp_path / "engine")
    for pack in (smoke, known.folder.parents[1]):
        status, lines = said(command, pack)
        assert status == 0, lines
        assert lines[-1] == f"{len(lines) - 1} cases, 0 not conformant"
        judged = [int(line.split()[-3]) for line in lines[:-1]]
        assert min(judged) > 1000
    tokens = sum(len(run.tokens) for run in known.case.runs())
    choices = tokens * known.case.config.layers
    assert judged == [sum(sum(tap.judged[:1]) for tap in known.taps.values()) + choices]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_planted_bug_is_found_at_its_step(language: str, known: Known, tmp_path: Path) -> None:
    for number, (right, wrong, step) in enumerate(BUGS[language]):
        status, lines = said(engine(language, tmp_path / str(number), (right, wrong)), known.folder.parents[1])
        assert status == 1
        assert lines[0].startswith("  first wrong: ")
        assert f"/layers.0.{step}: value " in lines[0]
        assert lines[-1] == "1 cases, 1 not conformant"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_folder_that_is_no_pack_is_status_2(language: str, tmp_path: Path) -> None:
    done = subprocess.run([*engine(language, tmp_path / "engine"), str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == 2
