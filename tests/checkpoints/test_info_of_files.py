# SPDX-License-Identifier: Apache-2.0
"""``refmoe info`` on one file says of a model what it says of the model's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refmoe.checkpoints.gguf_file import FILE_TYPES, write_gguf
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.checkpoints.write import write_checkpoint
from refmoe.spec.config import Config
from tests.command_line import Refmoe
from tests.models import SMALL

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="gguf not installed: pip install -e '.[llama-cpp]'")

MODELS = {
    "no field is a default": SMALL,
    "a context": replace(SMALL, context=77),
    "a vocabulary of fewer pieces than a tokenizer has": replace(SMALL, vocab=2),
    "a vocabulary of more": replace(SMALL, vocab=300),
}
OF_A_FILE = ("layout", "files", "stored", "formats", "bits_per_weight")
"""The facts that tell how a model is stored. All others are of the model."""


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a checkpoint in bfloat16."""
    config: Config = request.param
    path = tmp_path / "model"
    write_checkpoint(path, config, synthetic_checkpoint(config, 3).parameters)
    return path


@pytest.fixture
def facts(refmoe: Refmoe) -> Callable[[Path], dict[str, Any]]:
    """The facts that `info` prints as JSON."""

    def printed(path: Path) -> dict[str, Any]:
        status, out, err = refmoe("info", path, "--json")
        assert status == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return printed


def of_the_model(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without those of storage. A GGUF file holds eps in float32."""
    kept = {name: value for name, value in facts.items() if name not in OF_A_FILE}
    return kept | {"config": facts["config"] | {"norm_eps": float(np.float32(facts["config"]["norm_eps"]))}}


def lines(text: str) -> Iterator[str]:
    """The lines that tell of a model, without its name and how it is stored."""
    return (" ".join(line.split()) for line in text.splitlines()[1:] if not line.startswith(OF_A_FILE))


@pytest.mark.parametrize("dtype", FILE_TYPES)
@needs_gguf
def test_a_gguf_file(
    dtype: str, folder: Path, tmp_path: Path, refmoe: Refmoe, facts: Callable[[Path], dict[str, Any]]
) -> None:
    loaded, file = load_checkpoint(folder), tmp_path / "model.gguf"
    write_gguf(file, loaded.config, loaded.parameters, dtype)
    assert of_the_model(facts(file)) == of_the_model(facts(folder))
    assert facts(file)["layout"] == "gguf"
    assert facts(file)["stored"] == sorted({"F32", {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]})
    assert [*lines(refmoe("info", file)[1])] == [*lines(refmoe("info", folder)[1])]


@needs_gguf
def test_a_gguf_file_without_an_output_matrix(folder: Path, tmp_path: Path, facts: Callable[[Path], Any]) -> None:
    """Its output matrix is the embedding, as in a folder that says so."""
    loaded, file = load_checkpoint(folder), tmp_path / "tied.gguf"
    tied = replace(loaded.parameters, output=loaded.parameters.embedding)
    write_gguf(file, loaded.config, tied)
    again = tmp_path / "tied"
    write_checkpoint(again, loaded.config, tied)
    assert of_the_model(facts(file)) == of_the_model(facts(again))
    assert facts(file)["tied"]
    assert (
        facts(file)["total_parameters"] == facts(folder)["total_parameters"] - loaded.config.vocab * loaded.config.dim
    )


def test_a_configuration_alone(folder: Path, tmp_path: Path, facts: Callable[[Path], dict[str, Any]]) -> None:
    """The file in its folder, the same in a folder of its own, and that folder."""
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((folder / "config.json").read_bytes())
    expected = of_the_model(facts(folder))
    for path in (folder / "config.json", alone / "config.json", alone):
        found = facts(path)
        assert of_the_model(found) == expected
        assert found["files"] == ["config.json"]
        assert "stored" not in found
