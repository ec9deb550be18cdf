# SPDX-License-Identifier: Apache-2.0
"""The published schemas accept and refuse the same files as the reader, as far as a schema can."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from refmoe import suite as golden
from refmoe.errors import InputError
from tests.golden_cases import TEXT, write_case

REPOSITORY = Path(__file__).parent.parent / "golden"
CASES = golden.find_cases(REPOSITORY, golden.FAMILIES)


def validator(name: str) -> Any:
    schema = json.loads((REPOSITORY / f"{name}.schema.json").read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("folder", CASES, ids=lambda path: path.name)
def test_every_case_is_what_the_schemas_say(folder: Path) -> None:
    validator("case").validate(tomllib.loads((folder / golden.CASE_FILE).read_text()))
    validator("manifest").validate(json.loads((folder / golden.MANIFEST_FILE).read_bytes()))


def test_the_manifest_of_the_folder_is_what_the_schema_says() -> None:
    validator("manifest").validate(json.loads((REPOSITORY / golden.MANIFEST_FILE).read_bytes()))


GOOD = {
    "as it is": ("why", "why"),
    "a fingerprint": ("[config]", 'store = "fingerprint"\n[config]'),
    "a start": ("[config]", "start = 3000\n[config]"),
    "a window": ("dim = 8", "dim = 8\nwindow = 2\nnorm_eps = 1e-6\nrope_theta = 10000"),
    "the largest seed": ("seed = 1", "seed = 18446744073709551615"),
    "exponents": ("seed = 1", "seed = 1\nexponents = {wq = -3, gate = 2}"),
    "edits": ("seed = 1", 'seed = 1\nedits = [{parameter = "*.gate", row = 1, copy = 0}]'),
    "keep": ('op = "decode"', 'op = "chunk"\nkeep = 2'),
    "a call that nobody reads": ('op = "prefill"', 'op = "prefill"\nread = false'),
    "packed": ("[[script]]", '[[script]]\nop = "packed"\nsegments = [[1], [2, 3]]\n\n[[script]]'),
}
BAD = {
    "another version": ('format_version = "1"', 'format_version = "2"'),
    "no version": ('format_version = "1"', ""),
    "no why": ('why = "Small."', ""),
    "why is a list": ('why = "Small."', "why = []"),
    "no conditions": ("conditions = []", ""),
    "a condition is a number": ("conditions = []", "conditions = [1]"),
    "a clause is a table": ("clauses = []", "clauses = [{}]"),
    "bugs are a string": ("bugs = []", 'bugs = "none"'),
    "an unknown field": ("clauses = []", "clauses = []\ncolour = 3"),
    "an unknown store": ("[config]", 'store = "picture"\n[config]'),
    "a store that is a list": ("[config]", 'store = ["trace"]\n[config]'),
    "a negative start": ("[config]", "start = -1\n[config]"),
    "a start that is true": ("[config]", "start = true\n[config]"),
    "no dimension": ("dim = 8\n", ""),
    "a dimension of zero": ("layers = 1", "layers = 0"),
    "a dimension that is no integer": ("layers = 1", "layers = 1.5"),
    "a dimension that is true": ("layers = 1", "layers = true"),
    "an odd head_dim": ("head_dim = 4", "head_dim = 3"),
    "an unknown dimension": ("heads = 2", "heads = 2\nears = 2"),
    "a window of nothing": ("heads = 2", "heads = 2\nwindow = 0"),
    "a negative eps": ("heads = 2", "heads = 2\nnorm_eps = -1.0"),
    "a theta of zero": ("heads = 2", "heads = 2\nrope_theta = 0.0"),
    "no seed": ("seed = 1", ""),
    "a negative seed": ("seed = 1", "seed = -1"),
    "a seed too large": ("seed = 1", "seed = 18446744073709551616"),
    "a seed that is a string": ("seed = 1", 'seed = "1"'),
    "an unknown field of weights": ("seed = 1", "seed = 1\ncolour = 3"),
    "exponents that are a list": ("seed = 1", "seed = 1\nexponents = []"),
    "a call that is read by a number": ('op = "prefill"', 'op = "prefill"\nread = 0'),
    "an unknown exponent": ("seed = 1", "seed = 1\nexponents = {wx = 3}"),
    "an exponent too large": ("seed = 1", "seed = 1\nexponents = {wq = 121}"),
    "an exponent that is true": ("seed = 1", "seed = 1\nexponents = {wq = true}"),
    "edits that are a table": ("seed = 1", "seed = 1\nedits = {}"),
    "an edit that is a number": ("seed = 1", "seed = 1\nedits = [1]"),
    "an edit of nothing": ("seed = 1", "seed = 1\nedits = [{value = 1.0}]"),
    "an edit without action": ("seed = 1", 'seed = 1\nedits = [{parameter = "*"}]'),
    "an edit with two actions": (
        "seed = 1",
        'seed = 1\nedits = [{parameter = "output", row = 1, value = 1.0, copy = 0}]',
    ),
    "an edit with an unknown field": ("seed = 1", 'seed = 1\nedits = [{parameter = "output", value = 1.0, rows = 3}]'),
    "an edit with three columns": (
        "seed = 1",
        'seed = 1\nedits = [{parameter = "output", value = 1.0, columns = [1, 2, 3]}]',
    ),
    "a copy to no row": ("seed = 1", 'seed = 1\nedits = [{parameter = "output", copy = 0}]'),
    "a negative magnitude": ("seed = 1", 'seed = 1\nedits = [{parameter = "output", magnitude = -1.0}]'),
    "entries of a row": ("seed = 1", 'seed = 1\nedits = [{parameter = "output", row = 1, entries = [[1, 1, 1.0]]}]'),
    "an entry of two": ("seed = 1", 'seed = 1\nedits = [{parameter = "output", entries = [[1, 1]]}]'),
    "an unknown call": ('op = "decode"', 'op = "train"'),
    "a call without sequence": ('op = "decode"\nsequence = 0', 'op = "decode"'),
    "a negative sequence": ("sequence = 0", "sequence = -1"),
    "a sequence that is true": ("sequence = 0", "sequence = true"),
    "no tokens": ("tokens = [4]", "tokens = []"),
    "tokens that are a number": ("tokens = [4]", "tokens = 4"),
    "a token that is a string": ("tokens = [4]", 'tokens = ["4"]'),
    "a token that is true": ("tokens = [4]", "tokens = [true]"),
    "a negative token": ("tokens = [4]", "tokens = [-4]"),
    "a call with more": ("tokens = [4]", "tokens = [4]\ncolour = 3"),
    "keeping nothing": ("tokens = [4]", "tokens = [4]\nkeep = 0"),
    "keeping a list": ("tokens = [4]", "tokens = [4]\nkeep = [1]"),
    "packed without segments": ("[[script]]", '[[script]]\nop = "packed"\n\n[[script]]'),
    "packed of nothing": ("[[script]]", '[[script]]\nop = "packed"\nsegments = []\n\n[[script]]'),
    "an empty segment": ("[[script]]", '[[script]]\nop = "packed"\nsegments = [[1], []]\n\n[[script]]'),
    "a flat segment": ("[[script]]", '[[script]]\nop = "packed"\nsegments = [1]\n\n[[script]]'),
    "packed with tokens": ("[[script]]", '[[script]]\nop = "packed"\nsegments = [[1]]\ntokens = [1]\n\n[[script]]'),
}
BEYOND = {
    "a token outside the vocabulary": ("tokens = [4]", "tokens = [11]"),
    "key/value heads that do not divide": ("kv_heads = 1", "kv_heads = 3"),
    "more chosen than there are": ("experts_per_token = 2", "experts_per_token = 4"),
    "a decode first": ('op = "prefill"', 'op = "decode"'),
    "keeping more than there is": ("tokens = [4]", "tokens = [4]\nkeep = 4"),
    "an edit of no parameter": ("seed = 1", 'seed = 1\nedits = [{parameter = "wx", value = 1.0}]'),
}
"""Faults that relate several fields, which only the reader refuses."""


def read_both(folder: Path, change: tuple[str, str]) -> tuple[bool, bool]:
    """Whether the schema and the reader accept the small case with this change."""
    text = TEXT.format(seed=1, more="")
    assert change[0] in text
    text = text.replace(change[0], change[1], 1)
    write_case(folder).joinpath("case.toml").write_text(text)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        pytest.fail(f"not TOML:\n{text}")
    return validator("case").is_valid(values), reads(lambda path: golden.read_case(path).checkpoint(), folder)


def reads(read: Callable[[Path], Any], folder: Path) -> bool:
    """Whether the reader accepts the folder's file. Any exception but InputError is a failure."""
    try:
        read(folder)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("name", GOOD)
def test_schema_and_reader_take_the_same(tmp_path: Path, name: str) -> None:
    assert read_both(tmp_path, GOOD[name]) == (True, True)


@pytest.mark.parametrize("name", BAD)
def test_schema_and_reader_refuse_the_same(tmp_path: Path, name: str) -> None:
    assert read_both(tmp_path, BAD[name]) == (False, False)


@pytest.mark.parametrize("name", BEYOND)
def test_the_reader_refuses_what_no_schema_can_say(tmp_path: Path, name: str) -> None:
    assert read_both(tmp_path, BEYOND[name]) == (True, False)


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": lambda m: m.update(format_version="2"),
    "no generator": lambda m: m.pop("generator"),
    "no version of the generator": lambda m: m["generator"].pop("version"),
    "a generator that is a string": lambda m: m.update(generator="refmoe"),
    "no case": lambda m: m.pop("case"),
    "a case that is a number": lambda m: m.update(case=1),
    "no files": lambda m: m.pop("files"),
    "no case.toml": lambda m: m["files"].pop("case.toml"),
    "no trace": lambda m: m.update(files={"case.toml": "0" * 64}),
    "two traces": lambda m: m["files"].update({"trace-0123456789abcdef.safetensors": "0" * 64}),
    "another file": lambda m: m.update(files={"case.toml": "0" * 64, "../../passwd": "0" * 64}),
    "a short digest": lambda m: m["files"].update({"case.toml": "0" * 63}),
    "a digest in capitals": lambda m: m["tensors"].update({"prefill/logits": "A" * 64}),
    "a digest that is a number": lambda m: m["tensors"].update({"prefill/logits": 0}),
    "no tensors": lambda m: m.pop("tensors"),
    "empty tensors": lambda m: m.update(tensors={}),
    "no certificate": lambda m: m.pop("certificate"),
    "a certificate that is a string": lambda m: m.update(certificate="yes"),
    "a certificate without bounds": lambda m: m["certificate"].pop("bounds"),
    "a bound that is a string": lambda m: m["certificate"]["bounds"].update({"prefill/logits": "0"}),
    "a negative bound": lambda m: m["certificate"]["relative"].update({"prefill/logits": -1.0}),
    "a worst tensor without name": lambda m: m["certificate"]["worst"].pop("tensor"),
    "no count of decisions": lambda m: m["certificate"]["decisions"].pop("all"),
    "an unproven decision that is a number": lambda m: m["certificate"]["decisions"].update(unproven=[1]),
    "an unknown field": lambda m: m.update(colour=3),
}


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one certified case."""
    from refmoe.api.goldens import certify_goldens

    golden_folder = tmp_path_factory.mktemp("golden")
    folder = write_case(golden_folder / "small")
    golden.emit(golden.read_case(folder))
    certify_goldens(golden_folder, write=True, executor="processes:1")
    golden.write_folder_manifest(golden_folder)
    return folder


@pytest.mark.parametrize("name", MANIFESTS)
def test_schema_and_reader_refuse_the_same_manifests(emitted: Path, tmp_path: Path, name: str) -> None:
    """Each with the digest that fits it."""
    manifest = golden.read_manifest(emitted)
    golden.write_manifest(tmp_path, manifest)
    assert validator("manifest").is_valid(json.loads((tmp_path / golden.MANIFEST_FILE).read_bytes()))
    assert reads(golden.read_manifest, tmp_path)
    MANIFESTS[name](manifest)
    golden.write_manifest(tmp_path, manifest)
    assert not validator("manifest").is_valid(json.loads((tmp_path / golden.MANIFEST_FILE).read_bytes()))
    assert not reads(golden.read_manifest, tmp_path)


FOLDER_MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no cases": lambda m: m.pop("cases"),
    "a case that is a number": lambda m: m.update(cases=[1]),
    "cases that are an object": lambda m: m.update(cases={}),
    "no files": lambda m: m.pop("files"),
    "a short digest": lambda m: m["files"].update({"FORMAT.md": "0"}),
    "an unknown field": lambda m: m.update(colour=3),
    "another version": lambda m: m.update(format_version=1),
}


@pytest.mark.parametrize("name", FOLDER_MANIFESTS)
def test_schema_and_reader_refuse_the_same_manifests_of_folders(emitted: Path, tmp_path: Path, name: str) -> None:
    manifest = golden.read_folder_manifest(emitted.parent)
    golden.write_manifest(tmp_path, manifest)
    assert validator("manifest").is_valid(json.loads((tmp_path / golden.MANIFEST_FILE).read_bytes()))
    FOLDER_MANIFESTS[name](manifest)
    golden.write_manifest(tmp_path, manifest)
    assert not validator("manifest").is_valid(json.loads((tmp_path / golden.MANIFEST_FILE).read_bytes()))
    assert not reads(golden.read_folder_manifest, tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("\xff", "not UTF-8"),
        ("{}", "'format_version'"),
        ("[]", "'format_version'"),
        ('{"format_version": "1"}', "'digest' is not the SHA-256"),
        ('{"format_version": "1", "digest": ""}', "'digest' is not the SHA-256"),
        (None, "no such file"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused_in_a_sentence(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / golden.MANIFEST_FILE).write_text(text, encoding="latin-1")
    for read in (golden.read_manifest, golden.read_folder_manifest):
        with pytest.raises(InputError, match=words):
            read(tmp_path)
