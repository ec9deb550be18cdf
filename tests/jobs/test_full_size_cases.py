# SPDX-License-Identifier: Apache-2.0
"""Cases of full size: recomputed only when named, else reported as skipped; resumed after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from refmoe import suite as golden
from refmoe.jobs import job as scale
from refmoe.suite import activations, case
from refmoe.suite.manifest import content_file
from tests.command_line import Refmoe
from tests.golden_cases import write_case

REPOSITORY = Path(__file__).parents[2] / "golden"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small case, and one that counts as large."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(activations, "EVERYWHERE", None)
    write_case(tmp_path / "golden", 1)
    (tmp_path / "golden" / "case.toml").unlink()
    write_case(tmp_path / "golden" / "small", 1)
    large = write_case(tmp_path / "golden" / "large", 2, 'store = "fingerprint"')
    text = (large / "case.toml").read_text().replace("layers = 1", "layers = 3").replace("vocab = 11", "vocab = 999")
    (large / "case.toml").write_text(text)
    monkeypatch.setattr(case, "FULL_SIZE", 5000)
    return tmp_path / "golden"


def test_it_is_no_part_of_a_round_over_all_cases(refmoe: Refmoe, folder: Path) -> None:
    assert [path.name for path in golden.find_cases(folder)] == ["small"]
    assert [path.name for path in golden.find_full_size_cases(folder)] == ["large"]
    assert golden.find_cases(folder / "large") == [folder / "large"]
    assert refmoe("suite", "emit", "large", "--golden", folder)[0] == 0
    assert refmoe("suite", "emit", "--golden", folder)[0] == 0
    status, text, _ = refmoe("suite", "check", "--golden", folder)
    assert status == 0
    assert "skip  large\n" in text
    assert "ok    small\n" in text
    assert "large: of full size, so only its files were compared" in text
    assert text.endswith("1 case recomputed, 0 differ\n")
    assert json.loads(refmoe("suite", "check", "--golden", folder, "--json")[1])["not_recomputed"] == ["large"]
    status, text, _ = refmoe("suite", "check", "large", "--golden", folder)
    assert (status, text) == (0, "ok    large\n1 case recomputed, 0 differ\n")


def test_its_files_are_compared_all_the_same(refmoe: Refmoe, folder: Path) -> None:
    refmoe("suite", "emit", "large", "--golden", folder)
    refmoe("suite", "emit", "--golden", folder)
    content = folder / "large" / content_file(golden.read_manifest(folder / "large"))
    content.write_text(content.read_text().replace("0x1", "0x0", 1))
    status, text, _ = refmoe("suite", "check", "--golden", folder)
    assert status == 1
    assert "FAIL  large\n" in text
    assert "SHA-256 differs" in text


def test_layer_by_layer_gives_the_fingerprints_of_call_by_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = golden.read_case(folder / "large")
    found = golden.compute_fingerprints(large)
    monkeypatch.setattr(case, "FULL_SIZE", 1 << 40)
    assert golden.compute_fingerprints(large) == found


def test_a_killed_emission_goes_on_and_leaves_nothing_behind(
    refmoe: Refmoe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = scale.Script.layer, []

    def layer(self: Any, i: int, states: Any) -> Any:
        seen.append(i)
        if i == 1 and seen.count(1) == 1:
            raise KeyboardInterrupt
        return original(self, i, states)

    monkeypatch.setattr(scale.Script, "layer", layer)
    with pytest.raises(KeyboardInterrupt):
        golden.emit(golden.read_case(folder / "large"))
    assert sorted(path.name for path in Path("large.parts").iterdir()) == [
        "embedding.safetensors", "job.json", "layers.0.safetensors",
    ]  # fmt: skip
    assert not (folder / "large" / "manifest.json").exists()
    assert refmoe("suite", "emit", "large", "--golden", folder)[0] == 0
    assert seen == [0, 1, 1, 2]
    assert not Path("large.parts").exists()
    assert golden.check(folder / "large") == []


def test_a_case_of_the_first_layers_has_their_taps_alone(folder: Path) -> None:
    path = folder / "large" / "case.toml"
    path.write_text(path.read_text().replace('store = "fingerprint"', 'store = "fingerprint"\nlayers = [0, 2]'))
    found = golden.compute_fingerprints(golden.read_case(folder / "large"))
    taps = {key.partition("/")[2] for key in found}
    assert {tap.split(".")[1] for tap in taps if tap.startswith("layers.")} == {"0", "1"}
    assert taps & {"embedding", "final_norm", "logits"} == {"embedding"}


@pytest.mark.parametrize("layers", ["[0, 4]", "[1, 2]", "[0, 0]", "[0]", "2", '"0:2"', "[0, 1, 2]"])
def test_layers_that_are_none_are_refused(refmoe: Refmoe, folder: Path, layers: str) -> None:
    path = folder / "large" / "case.toml"
    path.write_text(path.read_text().replace('store = "fingerprint"', f'store = "fingerprint"\nlayers = {layers}'))
    status, _, said = refmoe("suite", "emit", "large", "--golden", folder)
    assert status == 2
    assert "'layers' is" in said


def test_no_interval_proof_is_begun_that_would_take_days(refmoe: Refmoe, folder: Path) -> None:
    refmoe("suite", "emit", "large", "--golden", folder)
    status, _, said = refmoe("suite", "certify", "large", "--golden", folder)
    assert status == 2
    assert "is of full size, and ball arithmetic at that size takes days" in said


@pytest.mark.parametrize("name", ["mixtral-8x7b", "mixtral-8x22b-2-layers"])
def test_the_published_sizes_are_there_whole(name: str) -> None:
    """Only their files are checked. `refmoe suite check NAME` recomputes one, in minutes."""
    from refmoe.spec.config import PRESETS

    found = golden.read_case(REPOSITORY / name)
    assert found.config == PRESETS["-".join(name.split("-")[:2])]
    assert found.full_size
    assert golden.verify_case_files(REPOSITORY / name) == []
    tensors = golden.read_manifest(REPOSITORY / name)["tensors"]
    whole = len(found.computed) == found.config.layers
    assert len(tensors) == len(found.runs()) * (21 * len(found.computed) + (3 if whole else 1))


@pytest.mark.slow
def test_two_layers_of_8x22b_are_recomputed() -> None:
    assert golden.check(REPOSITORY / "mixtral-8x22b-2-layers") == []
