# SPDX-License-Identifier: Apache-2.0
"""The bill of materials: the engine, refmoe and its packages, and the models that were run, in CycloneDX 1.6."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from refmoe.errors import require
from refmoe.evidence.declared import PACKAGES, Declared
from refmoe.evidence.layout import CHECKPOINTS, SUMMARY, to_text

LIBRARY = "cyclonedx-python-lib"


def materials(declared: Declared, documents: Mapping[str, Any]) -> str:
    """The text of the file. Raises InputError where CycloneDX's library is not installed.

    documents: those of the package, by name
    """
    require("cyclonedx", "evidence", "the bill of materials")
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from packageurl import PackageURL

    def digest(found: str) -> HashType:
        return HashType(alg=HashAlgorithm.SHA_256, content=found.removeprefix("sha256:"))

    def properties(found: Mapping[str, str]) -> Iterator[Property]:
        return (Property(name=f"refmoe:{name}", value=value) for name, value in found.items() if value)

    summary = documents[SUMMARY]
    engine = Component(
        name=summary["engine"]["name"],
        version=summary["engine"]["version"],
        type=ComponentType.APPLICATION,
        bom_ref="engine",
        properties=properties({"build": declared.build, "result": summary["result"], **summary["engine"]["options"]}),
    )
    parts = [
        Component(name=name, type=ComponentType.FILE, bom_ref=f"artifact/{name}", hashes=[digest(found)])
        for name, found in declared.artifacts.items()
    ]
    refmoe = Component(
        name="refmoe",
        version=declared.refmoe["version"],
        type=ComponentType.APPLICATION,
        bom_ref="refmoe",
        purl=PackageURL("pypi", None, "refmoe", declared.refmoe["version"]),
        properties=properties(declared.refmoe),
    )
    packages = [
        Component(
            name=name,
            version=declared.environment[name],
            type=ComponentType.LIBRARY,
            bom_ref=f"package/{name}",
            purl=PackageURL("pypi", None, name, declared.environment[name]),
        )
        for name in PACKAGES
        if name in declared.environment
    ]
    models = [
        Component(
            name=name,
            type=ComponentType.MACHINE_LEARNING_MODEL,
            bom_ref=f"model/{name}",
            hashes=[digest(found["digest"])],
            properties=properties(
                {"case.toml": summary["cases"][name]["case.toml"], "fresh": str(summary.get("fresh", ""))}
            ),
        )
        for name, found in documents[CHECKPOINTS].items()
    ]
    bom = Bom(
        serial_number=uuid5(NAMESPACE_URL, to_text([declared.to_json(), summary])),
        components=[*parts, refmoe, *packages, *models],
    )
    bom.metadata.component = engine
    bom.metadata.timestamp = datetime.fromisoformat(declared.date).replace(tzinfo=UTC)
    bom.register_dependency(engine, [*parts, *models])
    bom.register_dependency(refmoe, packages)
    text: str = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)
    return text + "\n"
