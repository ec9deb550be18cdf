# SPDX-License-Identifier: Apache-2.0
"""A package: whole, the same bytes each time, valid for other tools, and refused where its inputs are not."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from refmoe.api import evidence
from refmoe.engines.results import read_results, write_results
from refmoe.errors import InputError
from refmoe.evidence import layout
from refmoe.evidence.certificates import NONE
from refmoe.evidence.own import Own
from refmoe.evidence.statement import private_key, public_key
from refmoe.evidence.verify import verify_package
from refmoe.evidence.write import write_package
from refmoe.files.reading import read_bytes
from refmoe.suite.matrix.file import MATRIX_FILE, read_matrix
from tests.command_line import Refmoe
from tests.engines.running import GOLDEN
from tests.evidence.conftest import CASES, WRONG, Made, keys
from tests.evidence.tamperings import edit


def of(package: Path, name: str) -> Any:
    return json.loads((package / name).read_text())


def test_nothing_is_wrong_with_a_package_that_nobody_touched(made: Made, own: Own) -> None:
    """And all certificates of its cases are proven again, since the cases are small."""
    pytest.importorskip("flint")
    found = verify_package(made.package, own, made.public)
    assert (found.faults, found.unchecked, found.notes) == ([], [], [])
    assert found.trusted
    assert (found.certified.proven, found.certified.read) == (CASES, {})


def test_nothing_is_wrong_with_a_package_without_a_signature(made: Made, own: Own, tmp_path: Path) -> None:
    """And equal inputs give equal bytes, for all files that both have."""
    write_package(tmp_path / "again", replace(made.wanted, key=None))
    found = verify_package(tmp_path / "again", own, certificates=NONE)
    assert (found.faults, found.unchecked, found.signed_by) == ([], [], "")
    names = layout.files_of(made.package)
    assert [*layout.files_of(tmp_path / "again")] == [n for n in names if n not in (layout.ENVELOPE, layout.KEY)]
    for name in layout.files_of(tmp_path / "again"):
        assert (tmp_path / "again" / name).read_bytes() == (made.package / name).read_bytes(), name


def test_the_digests_are_those_of_sha256sum(made: Made) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    done = subprocess.run(["sha256sum", "-c", "--strict", "--quiet", layout.DIGESTS], cwd=made.package, check=False)
    assert done.returncode == 0
    listed = {line.split()[1] for line in (made.package / layout.DIGESTS).read_text().splitlines()}
    assert listed == {*layout.files_of(made.package)} - {*layout.SEALS}


def test_the_bill_of_materials_is_valid_by_its_own_library(made: Made) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    text = (made.package / layout.MATERIALS).read_text()
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    document = json.loads(text)
    document["components"][0]["type"] = "none"
    assert validator.validate_str(json.dumps(document)) is not None, "the validator can fail"
    models = {each["name"] for each in json.loads(text)["components"] if each["type"] == "machine-learning-model"}
    assert models == {*CASES}


def test_the_statement_is_valid_by_its_own_library(made: Made) -> None:
    json_format = pytest.importorskip("google.protobuf.json_format")
    pb = pytest.importorskip("in_toto_attestation.v1.statement_pb2")
    result = pytest.importorskip("in_toto_attestation.predicates.test_result.v0.test_result_pb2")
    library = pytest.importorskip("in_toto_attestation.v1.statement")
    document = of(made.package, layout.STATEMENT)
    library.Statement.copy_from_pb(json_format.ParseDict(document, pb.Statement())).validate()
    found = json_format.ParseDict(document["predicate"], result.TestResult())
    assert (found.result, [*found.passed_tests], [*found.failed_tests]) == (
        "FAILED", ["one-pair float32"], ["top-1 float32"],
    )  # fmt: skip
    subjects = {each["name"]: each["digest"]["sha256"] for each in document["subject"]}
    for name in (layout.DIGESTS, layout.RESULTS, *(f"traces/{case}-float32.safetensors" for case in CASES)):
        assert subjects[name] == sha256((made.package / name).read_bytes()).hexdigest()
    del document["subject"]
    with pytest.raises(ValueError, match="subject"):
        library.Statement.copy_from_pb(json_format.ParseDict(document, pb.Statement())).validate()


def test_the_signature_is_valid_by_openssl(made: Made, tmp_path: Path) -> None:
    """The envelope is written out by hand from the specification of DSSE."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    envelope = of(made.package, layout.ENVELOPE)
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    signed = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
    (tmp_path / "signed").write_bytes(signed)
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(made.public), "-rawin"]
    files = ["-in", str(tmp_path / "signed"), "-sigfile", str(tmp_path / "sig")]
    assert subprocess.run([*command, *files], capture_output=True, check=False).returncode == 0
    (tmp_path / "signed").write_bytes(signed + b" ")
    assert subprocess.run([*command, *files], capture_output=True, check=False).returncode != 0


def test_no_bug_is_called_absent_that_no_conformant_case_kills(made: Made) -> None:
    """The matrix says which case kills which bug. The case on which the engine is wrong shows the absence of none."""
    matrix, power = read_matrix(GOLDEN / MATRIX_FILE), of(made.package, layout.POWER)["float32"]
    assert power["absent"], "the test sees something"
    for bug, cases in power["absent"].items():
        assert WRONG not in cases
        assert {*cases} <= {*matrix.killers(bug, "float32")}
    assert not {*power["absent"]} & {*power["not_excluded"]}


def test_every_clause_is_traced_and_its_cases_have_the_verdicts_of_the_run(made: Made) -> None:
    rows = {row["clause"]: row for row in of(made.package, layout.CLAUSES)}
    assert {"NORM-1", "ROUTE-2", "MODEL-1"} <= {*rows}
    results = read_results(made.package / layout.RESULTS)
    verdicts = {each.case: each.verdict for each in results.outcomes}
    for row in rows.values():
        assert {*row["cases"]} <= {*CASES}
        assert sum(row["verdicts"]["float32"].values()) == len(row["cases"])
        assert {*row["verdicts"]["float32"]} == {verdicts[case] for case in row["cases"]}


def test_the_report_says_what_each_file_holds(made: Made) -> None:
    files = {name.partition("/")[0] + "/" * ("/" in name) for name in layout.files_of(made.package)}
    assert {*layout.CONTENTS} == files | {f"{layout.POLICIES}/"}, "this package has no policies of its own"
    report = (made.package / layout.REPORT).read_text()
    assert all(f"| `{name}` |" in report for name in layout.CONTENTS)


def test_the_page_of_clauses_has_the_evidence_of_each(made: Made) -> None:
    """A row for each clause, with every test, bug and case that the documents have, and the verdicts of its cases."""
    lines = (made.package / layout.TRACED).read_text().splitlines()
    tests = of(made.package, layout.TESTS)["clauses"]
    for row in of(made.package, layout.CLAUSES):
        (line,) = [each for each in lines if each.startswith(f"| {row['clause']} |")]
        cells = line.replace("\\|", "").split("|")
        assert all(f"`{name}`" in cells[4] for name in tests.get(row["clause"], ()))
        assert all(bug in cells[5] for bug in row["bugs"])
        assert all(f"{bug} (absent in float32" in cells[5] for bug in row["bugs_absent"]["float32"])
        assert all(case in cells[6] for case in row["cases"])
        assert all(f"{count} {verdict}" in cells[7] for verdict, count in row["verdicts"]["float32"].items())


# ---- inputs that do not fit


def test_traces_of_another_run_are_refused(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.wanted.traces, tmp_path / "traces")
    one, other = ((tmp_path / "traces" / f"{case}-float32.safetensors") for case in CASES)
    one.rename(tmp_path / "kept")
    with pytest.raises(InputError, match=str(one)):
        write_package(tmp_path / "a", replace(made.wanted, traces=tmp_path / "traces"))
    shutil.copy(other, one)
    with pytest.raises(InputError, match="header"):
        write_package(tmp_path / "b", replace(made.wanted, traces=tmp_path / "traces"))


def test_a_verdict_that_its_trace_contradicts_is_refused(made: Made, tmp_path: Path) -> None:
    shutil.copy(made.wanted.results, tmp_path / "results.json")
    edit(tmp_path, "results.json", lambda found: found["outcomes"][1].update(verdict="conformant"))
    with pytest.raises(InputError, match=r"top-1 in float32: 'verdict'"):
        write_package(tmp_path / "package", replace(made.wanted, results=tmp_path / "results.json"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fresh": 3}, "another suite"),
        ({"notes": ("the run has not come to its end: only the outcomes so far are here",)}, "--resume"),
        ({"cases": dict.fromkeys(CASES, "0" * 64)}, "another suite"),
        ({"outcomes": ()}, "no outcome"),
    ],
)
def test_results_that_are_no_whole_run_of_the_suite_are_refused(
    change: dict[str, Any], said: str, made: Made, tmp_path: Path
) -> None:
    write_results(tmp_path / "results.json", replace(read_results(made.wanted.results), **change))
    with pytest.raises(InputError, match=said):
        write_package(tmp_path / "package", replace(made.wanted, results=tmp_path / "results.json"))
    assert not (tmp_path / "package").exists()


def test_a_key_of_another_kind_is_refused(made: Made, tmp_path: Path) -> None:
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    pem = rsa.generate_private_key(rsa.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "ec.pem").write_bytes(pem)
    (tmp_path / "none.pem").write_text("no key")
    _, public = keys(tmp_path, "mine")
    for name in ("ec.pem", "none.pem", public.name):
        with pytest.raises(InputError, match=name):
            write_package(tmp_path / "package", replace(made.wanted, key=tmp_path / name))


def test_a_key_file_that_is_not_there_is_said_so(made: Made, tmp_path: Path) -> None:
    """For signing and for checking, in the sentence of every other missing file."""
    with pytest.raises(InputError) as unread:
        read_bytes(tmp_path / "none.pem", "a key")
    reason = str(unread.value).partition(": ")[2].partition(",")[0]
    for read in (private_key, public_key):
        with pytest.raises(InputError, match=reason):
            read(tmp_path / "none.pem")


def test_what_cannot_be_checked_is_said_before_this_refmoe_is_read(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it takes seconds, which nobody waits for a sentence about a name."""
    monkeypatch.setattr(evidence, "this_refmoe", lambda _: pytest.fail("this refmoe was read"))
    for folder, key in ((tmp_path / "none", None), (made.package, tmp_path / "none.pub")):
        with pytest.raises(InputError, match="none"):
            evidence.verify_evidence(folder, key=key)


# ---- the command


def test_the_command_writes_and_verifies(made: Made, refmoe: Refmoe, tmp_path: Path) -> None:
    wanted = made.wanted
    words = ("--engine", wanted.results, "--traces", wanted.traces, "--date", wanted.date, "--key", wanted.key)
    status, out, err = refmoe("evidence", tmp_path / "package", *words, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["result"] == "FAILED"
    status, out, _ = refmoe("evidence", "verify", tmp_path / "package", "--key", made.public, "--json")
    assert (status, json.loads(out)["verified"], json.loads(out)["trusted"]) == (0, True, True)
    (tmp_path / "package" / layout.REPORT).write_text("fine\n")
    status, out, _ = refmoe("evidence", "verify", tmp_path / "package")
    assert status == 1
    assert layout.REPORT in out
