# SPDX-License-Identifier: Apache-2.0
"""The vector files conform to their schema and equal the output of their generators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mistral_common")
jsonschema = pytest.importorskip("jsonschema")  # mistral-common brings it

from tests.vectors.files import FOLDER, dumps, load  # noqa: E402
from tests.vectors.generate import FILES  # noqa: E402


@pytest.fixture(scope="module")
def schema() -> Any:
    return jsonschema.Draft202012Validator(json.loads((FOLDER / "vectors.schema.json").read_text()))


def without_versions(content: dict[str, Any]) -> dict[str, Any]:
    """The content without library versions, as another version of a library may give equal vectors."""
    return {key: value for key, value in content.items() if key != "generator"}


@pytest.mark.parametrize("name", FILES)
def test_the_generator_gives_the_file_again(name: str) -> None:
    built = json.loads(dumps(FILES[name]()))
    stored = load(name)
    assert without_versions(built) == without_versions(stored)
    assert dumps(stored) == (FOLDER / name).read_text(encoding="ascii")


@pytest.mark.parametrize("name", FILES)
def test_a_file_fits_the_schema(name: str, schema: Any) -> None:
    assert [error.message for error in schema.iter_errors(load(name))] == []


@pytest.mark.parametrize("name", FILES)
def test_the_schema_refuses_a_vector_with_a_field_too_few_or_too_many(name: str, schema: Any) -> None:
    """Every field of the file and of the first vector of each kind is needed, and no other field is allowed."""
    content = load(name)
    first = {vector["kind"]: vector for vector in reversed(content["vectors"])}
    for vector in first.values():
        assert schema.is_valid(content | {"vectors": [vector]})
        for field in vector:
            without = {key: value for key, value in vector.items() if key != field}
            assert not schema.is_valid(content | {"vectors": [without]}), field
        assert not schema.is_valid(content | {"vectors": [vector | {"more": 1}]})
    for field in content:
        assert not schema.is_valid({key: value for key, value in content.items() if key != field}), field


def test_the_schema_refuses_an_unknown_format_version(schema: Any) -> None:
    assert not schema.is_valid(load("losses.json") | {"format_version": "2"})


@pytest.mark.parametrize("name", FILES)
def test_names_are_unique_and_every_clause_is_stated_in_the_code(name: str) -> None:
    vectors = load(name)["vectors"]
    assert len({vector["name"] for vector in vectors}) == len(vectors)
    package = Path(__file__).parent.parent.parent / "refmoe"
    code = "".join(
        path.read_text() for part in ("text", "routers/literature") for path in (package / part).glob("*.py")
    )
    stated = {clause for vector in vectors for clause in vector["clauses"]}
    assert stated
    assert {clause for clause in stated if f"{clause}:" not in code and f"{clause}  " not in code} == set()


def test_the_files_have_no_other_neighbours() -> None:
    """A file without a test does not belong in the folder."""
    expected = {*FILES, "vectors.schema.json", "FORMAT.md"}
    assert {path.name for path in FOLDER.iterdir()} == expected
