# SPDX-License-Identifier: Apache-2.0
"""The statement about the test in in-toto's format, its envelope (DSSE), and the signature with a key of the user's.

The first subject of the statement is the list of digests of all other files. So a signature of the statement covers
the whole package. The key is an Ed25519 key in PEM, as ``openssl genpkey -algorithm ed25519`` writes it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from refmoe.errors import InputError, require
from refmoe.evidence.declared import Declared
from refmoe.evidence.documents import FAILED, PASSED, WARNED, result_of, result_of_verdict
from refmoe.evidence.given import Given
from refmoe.evidence.layout import ENVELOPE, KEY, RESULTS, RULES, STATEMENT, document, to_text, trace_file
from refmoe.files.reading import exists, read_bytes
from refmoe.suite.fresh import label
from refmoe.suite.manifest import DIGESTS, digest, file_digest

PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
LARGEST_KEY = 1 << 16


def statement(given: Given, digests: str) -> str:
    """The text of the statement.   digests: the text of the list of digests

    Raises InputError where in-toto's library is not installed.
    """
    require("in_toto_attestation", "evidence", "the statement about the test")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.test_result.v0 import test_result_pb2
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement

    def resource(name: str, found: str) -> Any:
        return ResourceDescriptor(name=name, digest={"sha256": found}).pb

    names: dict[str, list[str]] = {PASSED: [], WARNED: [], FAILED: []}
    for each in given.results.outcomes:
        name = label(each.case, given.results.fresh)
        names[result_of_verdict(each.verdict, each.failed)].append(f"{name} {each.dtype}")
    traces = [
        resource(trace_file(each.case, each.dtype), file_digest(path))
        for each in given.results.outcomes
        if (path := given.trace(each)) is not None
    ]
    subjects = [
        resource(DIGESTS, digest(digests.encode())),
        resource(RESULTS, file_digest(given.folder / RESULTS)),
        *(resource(name, found) for name, found in given.declared.artifacts.items()),
        *traces,
    ]
    predicate = test_result_pb2.TestResult(
        result=result_of(given),
        configuration=[*_configuration(given.declared, resource), resource(RULES, file_digest(given.folder / RULES))],
        passed_tests=names[PASSED],
        warned_tests=names[WARNED],
        failed_tests=names[FAILED],
    )
    made = Statement(subjects, PREDICATE, json_format.MessageToDict(predicate))
    made.validate()
    return to_text(json_format.MessageToDict(made.pb))


def _configuration(declared: Declared, resource: Any) -> list[Any]:
    found = [resource(f"refmoe {declared.refmoe['version']}", declared.refmoe["source"])]
    return found + ([resource("suite", declared.refmoe["suite"])] if declared.refmoe["suite"] else [])


# ---- the envelope


def to_sign(payload: bytes) -> bytes:
    """The bytes that a signature covers, as DSSE defines them."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


@dataclass(frozen=True)
class Signed:
    """The files that a signature adds to a package."""

    envelope: str
    key: bytes
    """The public key in PEM."""


def private_key(path: Path) -> Any:
    """A private key. Raises InputError for a file that holds no Ed25519 key in PEM, or one with a password."""

    def load(data: bytes) -> Any:
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            return load_pem_private_key(data, None)
        except TypeError:
            raise InputError(f"{path}: needs a password, but a private key without one was expected") from None

    return _ed25519(path, "private", load)


def public_key(path: Path) -> Any:
    """A public key. Raises InputError for a file that holds no Ed25519 key in PEM."""

    def load(data: bytes) -> Any:
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        return load_pem_public_key(data)

    return _ed25519(path, "public", load)


def _ed25519(path: Path, side: str, load: Callable[[bytes], Any]) -> Any:
    """The key in a file.   side: ``private`` or ``public``   load: reads PEM"""
    ed25519 = require("cryptography.hazmat.primitives.asymmetric.ed25519", "evidence", "a signature")
    data = read_bytes(path, f"a {side} key", LARGEST_KEY)
    try:
        found = load(data)
    except InputError:
        raise
    except Exception:  # cryptography has no common base of its errors
        raise InputError(f"{path}: is no {side} key, but an Ed25519 key in PEM was expected") from None
    if not isinstance(found, getattr(ed25519, f"Ed25519{side.title()}Key")):
        raise InputError(f"{path}: is a key of another kind, but an Ed25519 key was expected")
    return found


def _pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def key_id(key: Any) -> str:
    """The name of a public key: the SHA-256 of its raw 32 bytes."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()


def signed(text: str, key: Any) -> Signed:
    """The envelope of a statement, signed.   text: of the statement   key: a private key"""
    public = key.public_key()
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(text.encode()).decode(),
        "signatures": [
            {"keyid": key_id(public), "sig": base64.b64encode(key.sign(to_sign(text.encode()))).decode()}
        ],
    }  # fmt: skip
    return Signed(to_text(envelope), _pem(public))


def is_signed(folder: Path) -> bool:
    """Whether a package has a signature, or one of its two files."""
    return any(exists(folder / name) for name in (ENVELOPE, KEY))


def signature_faults(folder: Path, trusted: Path | None) -> list[str]:
    """The faults of a package's signature, a sentence each.

    trusted: a file with the public key that must have signed; None: the package's own key is taken
    """
    from cryptography.exceptions import InvalidSignature

    own = public_key(folder / KEY)
    found = []
    if trusted is not None and key_id(public_key(trusted)) != key_id(own):
        found.append(f"{KEY}: is not the key of {trusted}, so the package was signed by somebody else")
    envelope = document(folder, ENVELOPE)
    try:
        payload = base64.b64decode(envelope["payload"], validate=True)
        (signature,) = envelope["signatures"]
        keyid, sig = signature["keyid"], base64.b64decode(signature["sig"], validate=True)
        kind, names = envelope["payloadType"], {*envelope}
    except (KeyError, TypeError, ValueError, binascii.Error):
        return [*found, f"{ENVELOPE}: is no envelope with one signature, as DSSE defines it"]
    if names != {"payload", "payloadType", "signatures"} or kind != PAYLOAD_TYPE or {*signature} != {"keyid", "sig"}:
        found.append(f"{ENVELOPE}: has other fields, or another type, than an envelope of an in-toto statement")
    if payload != read_bytes(folder / STATEMENT, "a statement"):
        found.append(f"{ENVELOPE}: its payload is not {STATEMENT}")
    if keyid != key_id(own):
        found.append(f"{ENVELOPE}: names another key than {KEY}")
    try:
        own.verify(sig, to_sign(payload))
    except InvalidSignature:
        found.append(f"{ENVELOPE}: the signature is not one of its payload by {KEY}")
    return found
