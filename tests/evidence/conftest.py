# SPDX-License-Identifier: Apache-2.0
"""One run of an engine with one wrong answer, its package, signed, and this refmoe."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from refmoe.engines.conform import Suite, conform
from refmoe.engines.harness import Harness
from refmoe.engines.judge import Judge
from refmoe.engines.results import write_results
from refmoe.evidence import write
from refmoe.evidence.own import Own
from refmoe.evidence.write import Wanted, write_package
from tests.engines.running import GOLDEN, LIMIT, case_named, hostile
from tests.refmoe_once import read_once

CASES, WRONG = ("one-pair", "top-1"), "top-1"
DATE = "2026-11-29"


@dataclass(frozen=True)
class Made:
    """A package and what it was made of."""

    package: Path
    wanted: Wanted
    public: Path
    """The public key of the author."""
    other: Path
    """The private key of somebody else."""


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A new private and public key, in PEM."""
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    key = ed25519.Ed25519PrivateKey.generate()
    pem, kinds = serialization.Encoding.PEM, (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, *kinds))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="package", autouse=True)
def own() -> Iterator[Own]:
    """This refmoe, read once."""
    with read_once():
        yield write.this_refmoe(GOLDEN)


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The package of an engine whose answer to one case is wrong, signed by its author."""
    for module in ("cyclonedx", "in_toto_attestation", "cryptography"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "traces").mkdir()
    suite = Suite(
        cases=[case_named(name) for name in CASES], smoke=[], dtypes=("float32",), judge=Judge(diagnosing=False),
        keep=folder / "traces",
    )  # fmt: skip
    results = conform(Harness(hostile("rounds_to_bfloat16", WRONG), LIMIT), {"command": "test"}, suite)
    write_results(folder / "results.json", results)
    private, public = keys(folder, "author")
    other, _ = keys(folder, "somebody")
    wanted = Wanted(
        results=folder / "results.json", traces=folder / "traces", golden=GOLDEN, build="a build", date=DATE,
        artifacts=(public,), key=private,
    )  # fmt: skip
    write_package(folder / "package", wanted)
    return Made(folder / "package", wanted, public, other)


@pytest.fixture
def package(made: Made, tmp_path: Path) -> Path:
    """A copy of the package."""
    return Path(shutil.copytree(made.package, tmp_path / "package"))
