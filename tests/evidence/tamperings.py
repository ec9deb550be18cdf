# SPDX-License-Identifier: Apache-2.0
"""Kinds of tampering with a package. Each names the file that it changes, and the check that finds it.

A tamperer may leave the list of digests as it was. Or he writes it anew, and the statement too, so that only what is
derived again tells. `seals_again` does that. What nobody can derive is found by the signature alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from refmoe.errors import InputError
from refmoe.evidence import layout
from refmoe.evidence.given import read_given
from refmoe.evidence.pages import pages
from refmoe.evidence.statement import private_key
from refmoe.evidence.write import seal
from refmoe.suite.manifest import (
    content_file,
    content_name,
    file_digest,
    read_manifest,
    tensor_digest,
    trace_path,
    write_manifest,
)
from refmoe.traces.trace import read_trace, trace_bytes

Act = Callable[[Path], None]
CASE, WRONG = "one-pair", "top-1"
MANIFEST = f"cases/{CASE}/manifest.json"
TRACE, OTHER = (f"traces/{case}-float32.safetensors" for case in (CASE, WRONG))


@dataclass(frozen=True)
class Tampering:
    """A kind of tampering."""

    name: str
    act: Act
    """Changes a package."""
    file: str
    """The file that is changed."""
    found_by: str
    """The check that finds it after the seals were made anew. `SIGNED`: only the signature does."""
    named: str
    """The file that this check names: the one changed, or one that contradicts it."""


SIGNED = "signature"
TAMPERINGS: list[Tampering] = []
SEALS: list[Tampering] = []
"""Those with the seals themselves, which `seals_again` would undo."""


def tampering(
    file: str, found_by: str, into: list[Tampering] = TAMPERINGS, *, named: str = ""
) -> Callable[[Act], Act]:  # fmt: skip
    """Add a kind to the table.   named: as in `Tampering`; empty: the file that is changed"""

    def add(act: Act) -> Act:
        into.append(Tampering(act.__name__, act, file, found_by, named or file))
        return act

    return add


def seals_again(folder: Path, key: Path | None = None) -> None:
    """Make the digests and the statement anew, as a tamperer would, and sign with a key of his own or not at all."""
    for name in (layout.ENVELOPE, layout.KEY):
        (folder / name).unlink(missing_ok=True)
    try:
        seal(read_given(folder), None if key is None else private_key(key))
    except InputError:  # the inputs do not fit together any more
        layout.write_file(folder / layout.DIGESTS, layout.sealed_text(folder))


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON document.   change: changes the value, and may return another"""
    value = json.loads((folder / name).read_text())
    changed = change(value)
    (folder / name).write_text(layout.to_text(value if changed is None else changed))


def put(*path: str | int, value: Any) -> Callable[[Any], None]:
    """A change: the value at a path becomes another."""

    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        assert document[path[-1]] != value, "nothing would change"
        document[path[-1]] = value

    return change


def flip(path: Path, at: int = -1) -> None:
    """Change the lowest bit of a byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def text(folder: Path, name: str, old: str, new: str) -> None:
    """Replace a text that is there."""
    found = (folder / name).read_text()
    assert old in found
    (folder / name).write_text(found.replace(old, new, 1))


def change_golden(folder: Path, key: str) -> None:
    """Change the last bit of a golden value, and all digests in the manifest."""
    case = folder / "cases" / CASE
    manifest, trace = read_manifest(case), read_trace(trace_path(case))
    arrays = {name: tensor.map().copy() for name, tensor in trace.tensors.items()}
    first = arrays[key].reshape(-1)[:1]
    first[:] = np.nextafter(first, np.inf)
    data = trace_bytes(trace.header, arrays)
    old, new = content_file(manifest), content_name("trace", data)
    (case / old).unlink()
    (case / new).write_bytes(data)
    files = {new if name == old else name: digest for name, digest in manifest["files"].items()}
    files[new] = file_digest(case / new)
    tensors = manifest["tensors"] | {key: tensor_digest(arrays[key])}
    write_manifest(case, manifest | {"files": files, "tensors": tensors})


def rewrite_pages(folder: Path) -> None:
    """Write the pages anew from the documents as they are now."""
    given = read_given(folder)
    documents = {name: layout.document(folder, name) for name in layout.DOCUMENTS}
    for name, page in pages(given.declared, given.results, documents).items():
        layout.write_file(folder / name, page)


# ---- goldens and cases


@tampering(f"cases/{CASE}", "goldens")
def a_bit_of_a_golden(folder: Path) -> None:
    flip(trace_path(folder / "cases" / CASE))


@tampering(MANIFEST, "goldens", named=f"cases/{CASE}/trace-")
def a_golden_value_with_all_its_digests(folder: Path) -> None:
    change_golden(folder, "prefill/logits")


@tampering(MANIFEST, "suite")
def a_smaller_certificate(folder: Path) -> None:
    manifest = read_manifest(folder / "cases" / CASE)
    manifest["certificate"]["bounds"]["prefill/logits"] /= 2
    write_manifest(folder / "cases" / CASE, manifest)


@tampering(MANIFEST, "certificates")
def a_bound_that_no_proof_gives(folder: Path) -> None:
    """The suite tells it too, but not where the case is somebody's own."""
    manifest = read_manifest(folder / "cases" / CASE)
    manifest["certificate"]["bounds"]["prefill/layers.0.residual"] *= 0.999
    write_manifest(folder / "cases" / CASE, manifest)


@tampering(MANIFEST, "goldens")
def a_bit_of_a_manifest(folder: Path) -> None:
    flip(folder / MANIFEST, 200)


@tampering(f"cases/{CASE}/case.toml", "goldens")
def other_words_in_a_case(folder: Path) -> None:
    text(folder, f"cases/{CASE}/case.toml", "why = ", "# Easy.\nwhy = ")


@tampering(f"cases/{CASE}/case.toml", "goldens")
def other_weights_of_a_case(folder: Path) -> None:
    found = (folder / "cases" / CASE / "case.toml").read_text()
    line = next(line for line in found.splitlines() if line.startswith("seed = "))
    text(folder, f"cases/{CASE}/case.toml", line, "seed = 12345")


# ---- results and traces


@tampering(layout.RESULTS, "verdicts")
def a_better_verdict(folder: Path) -> None:
    edit(folder, layout.RESULTS, put("outcomes", 1, "verdict", value="conformant"))


@tampering(layout.RESULTS, "verdicts")
def a_better_verdict_with_its_reason_and_pages(folder: Path) -> None:
    def change(results: Any) -> None:
        good = results["outcomes"][0]
        results["outcomes"][1] = good | {"case": WRONG}

    edit(folder, layout.RESULTS, change)
    edit(folder, layout.SUMMARY, put("result", value="PASSED"))
    edit(folder, layout.SUMMARY, put("dtypes", "float32", "verdicts", value={"conformant": 2}))
    rewrite_pages(folder)


@tampering(layout.RESULTS, "verdicts")
def a_failure_as_skipped(folder: Path) -> None:
    edit(folder, layout.RESULTS, put("outcomes", 1, "verdict", value="skipped"))


@tampering(layout.RESULTS, "verdicts")
def a_smaller_error(folder: Path) -> None:
    edit(folder, layout.RESULTS, put("outcomes", 0, "worst_errors", "logits", value=0.0001))


@tampering(layout.RESULTS, "verdicts")
def another_first_wrong_step(folder: Path) -> None:
    edit(folder, layout.RESULTS, put("outcomes", 1, "first_wrong", "tap", value="layers.0.residual"))


@tampering(layout.RESULTS, "verdicts")
def other_words_of_a_reason(folder: Path) -> None:
    edit(folder, layout.RESULTS, put("outcomes", 0, "reason", value="9999 of 9999 values tested, none is impossible"))


@tampering(layout.RESULTS, "documents", named=layout.SUMMARY)
def another_significance(folder: Path) -> None:
    edit(folder, layout.RESULTS, put("significance", value=1e-9))


@tampering(layout.RESULTS, "inputs", named=OTHER)
def a_wider_policy_in_name(folder: Path) -> None:
    edit(folder, layout.RESULTS, put("outcomes", 1, "policy", value="float32+accumulation=bfloat16"))


@tampering(layout.RESULTS, "inputs", named=TRACE)
def another_version_of_the_engine(folder: Path) -> None:
    edit(folder, layout.RESULTS, put("engine", "version", value="2.0"))


@tampering(layout.RESULTS, "documents", named=layout.SUMMARY)
def a_removed_outcome(folder: Path) -> None:
    edit(folder, layout.RESULTS, lambda results: results["outcomes"].pop(1) and None)


@tampering(layout.RESULTS, "documents", named=layout.SUMMARY)
def a_removed_case(folder: Path) -> None:
    def change(results: Any) -> None:
        del results["cases"][WRONG]
        results["outcomes"].pop(1)

    edit(folder, layout.RESULTS, change)
    for path in [folder / OTHER, *(folder / "cases" / WRONG).iterdir()]:
        path.unlink()
    (folder / "cases" / WRONG).rmdir()


@tampering(layout.RESULTS, "documents", named=layout.SUMMARY)
def another_machine(folder: Path) -> None:
    edit(folder, layout.RESULTS, put("platform", "machine", value="riscv64"))


@tampering(TRACE, "inputs")
def exchanged_traces(folder: Path) -> None:
    one, other = (folder / TRACE).read_bytes(), (folder / OTHER).read_bytes()
    (folder / TRACE).write_bytes(other)
    (folder / OTHER).write_bytes(one)


@tampering(OTHER, "inputs")
def a_golden_in_the_place_of_a_trace(folder: Path) -> None:
    (folder / OTHER).write_bytes(trace_path(folder / "cases" / WRONG).read_bytes())


@tampering(OTHER, "verdicts")
def right_values_in_a_trace(folder: Path) -> None:
    """The goldens, rounded, under the header of the engine."""
    header, golden = read_trace(folder / OTHER).header, load_file(trace_path(folder / "cases" / WRONG))
    kept = load_file(folder / OTHER)
    arrays = {key: golden[key].astype(kept[key].dtype) for key in kept}
    (folder / OTHER).write_bytes(trace_bytes(header, arrays))


@tampering(TRACE, "verdicts")
def a_bit_of_a_trace(folder: Path) -> None:
    """A high bit of the last value."""
    data = bytearray((folder / TRACE).read_bytes())
    data[-1] ^= 0x40
    (folder / TRACE).write_bytes(data)


@tampering(TRACE, "verdicts")
def a_missing_trace(folder: Path) -> None:
    (folder / TRACE).unlink()


# ---- documents


@tampering(layout.RULES, "documents")
def a_field_of_a_policy(folder: Path) -> None:
    edit(folder, layout.RULES, put("float32", "fields", "accumulation", value="bfloat16"))


@tampering(layout.RULES, "documents")
def a_wider_budget(folder: Path) -> None:
    edit(folder, layout.RULES, put("float32", "fields", "exp", value="800 + 2 |x|"))


@tampering("policies/float32.toml", "inputs")
def a_policy_of_a_name_that_is_taken(folder: Path) -> None:
    layout.write_file(folder / "policies" / "float32.toml", '[float32]\nbase = "bfloat16"\nabout = "a"\nsource = "b"\n')


@tampering(layout.EPSILON, "documents")
def a_smaller_epsilon(folder: Path) -> None:
    edit(folder, layout.EPSILON, put("dtypes", "float32", "end_to_end", "total", value=1e-12))
    rewrite_pages(folder)


@tampering(layout.EPSILON, "documents")
def a_weaker_argument(folder: Path) -> None:
    edit(folder, layout.EPSILON, lambda document: document["argument"].pop() and None)


@tampering(layout.POWER, "documents")
def more_power(folder: Path) -> None:
    edit(folder, layout.POWER, put("float32", "seen", value=119))


@tampering(layout.POWER, "documents")
def a_bug_that_was_not_excluded(folder: Path) -> None:
    edit(folder, layout.POWER, lambda document: document["float32"]["not_excluded"].pop() and None)


@tampering(layout.CLAUSES, "documents")
def a_clause_left_out(folder: Path) -> None:
    edit(folder, layout.CLAUSES, lambda rows: rows.pop(3) and None)


@tampering(layout.TESTS, "documents")
def a_test_that_is_not_there(folder: Path) -> None:
    edit(folder, layout.TESTS, lambda document: document["clauses"]["NORM-1"].append("tests/none.py::none"))


@tampering(layout.CHECKPOINTS, "documents")
def the_digest_of_a_checkpoint(folder: Path) -> None:
    edit(folder, layout.CHECKPOINTS, put(CASE, "digest", value=f"sha256:{'0' * 64}"))


@tampering(layout.SUMMARY, "documents")
def a_better_result(folder: Path) -> None:
    edit(folder, layout.SUMMARY, put("result", value="PASSED"))


@tampering(layout.SUMMARY, "documents")
def cases_that_were_not_run(folder: Path) -> None:
    edit(folder, layout.SUMMARY, put("not_run", value=[]))


@tampering(layout.MATERIALS, "materials")
def a_digest_in_the_bill_of_materials(folder: Path) -> None:
    edit(folder, layout.MATERIALS, put("components", -1, "hashes", 0, "content", value="0" * 64))


@tampering(layout.LIMITS, "pages")
def a_limit_left_out(folder: Path) -> None:
    text(folder, layout.LIMITS, "| that refmoe itself has no defect |", "| that refmoe itself has a defect |")


@tampering(layout.REPORT, "pages")
def a_figure_on_a_page(folder: Path) -> None:
    text(folder, layout.REPORT, "1e-06 per case", "1e-09 per case")


@tampering(layout.READINGS, "pages")
def a_claim_of_compliance(folder: Path) -> None:
    text(folder, layout.READINGS, "They make no claim of compliance.", "They show compliance.")


@tampering("extra.txt", "files")
def an_extra_file(folder: Path) -> None:
    (folder / "extra.txt").write_text("approved\n")


@tampering(layout.POWER, "files")
def a_missing_document(folder: Path) -> None:
    (folder / layout.POWER).unlink()


@tampering(layout.EPSILON, "files")
def a_link_in_the_place_of_a_file(folder: Path) -> None:
    (folder / layout.EPSILON).rename(folder.parent / "elsewhere.json")
    (folder / layout.EPSILON).symlink_to(folder.parent / "elsewhere.json")


# ---- what nobody can derive


def _declared(*path: str, value: Any) -> Act:
    """Change a declared fact, with the pages that repeat it. The bill of materials is left, and would tell."""

    def act(folder: Path) -> None:
        from refmoe.evidence.materials import materials

        edit(folder, layout.DECLARED, put(*path, value=value))
        rewrite_pages(folder)
        documents = {name: layout.document(folder, name) for name in layout.DOCUMENTS}
        layout.write_file(folder / layout.MATERIALS, materials(read_given(folder).declared, documents))

    return act


for _name, _path, _value in (
    ("the_date", ("date",), "2020-01-01"),
    ("the_build", ("build",), "another build"),
    ("the_digest_of_a_file_of_the_engine", ("artifacts", "author.pub"), "0" * 64),
    ("the_version_of_a_package", ("environment", "numpy"), "1.0"),
):
    TAMPERINGS.append(Tampering(_name, _declared(*_path, value=_value), layout.DECLARED, SIGNED, layout.KEY))


# ---- the seals


@tampering(layout.DIGESTS, "digests", SEALS)
def the_order_of_the_digests(folder: Path) -> None:
    lines = (folder / layout.DIGESTS).read_text().splitlines(keepends=True)
    (folder / layout.DIGESTS).write_text("".join([lines[1], lines[0], *lines[2:]]))


@tampering(layout.REPORT, "digests", SEALS)
def a_line_of_the_digests(folder: Path) -> None:
    lines = (folder / layout.DIGESTS).read_text().splitlines(keepends=True)
    (folder / layout.DIGESTS).write_text("".join(line for line in lines if layout.REPORT not in line))


@tampering(layout.STATEMENT, "statement", SEALS)
def the_result_of_the_statement(folder: Path) -> None:
    edit(folder, layout.STATEMENT, put("predicate", "result", value="PASSED"))


@tampering(layout.STATEMENT, "statement", SEALS)
def a_subject_of_the_statement(folder: Path) -> None:
    edit(folder, layout.STATEMENT, put("subject", 1, "digest", "sha256", value="0" * 64))


@tampering(layout.STATEMENT, "statement", SEALS)
def a_failed_test_that_is_not_named(folder: Path) -> None:
    edit(folder, layout.STATEMENT, lambda document: document["predicate"].pop("failedTests") and None)


@tampering(layout.ENVELOPE, "signature", SEALS)
def the_payload_of_the_envelope(folder: Path) -> None:
    edit(folder, layout.ENVELOPE, put("payload", value="e30="))


@tampering(layout.ENVELOPE, "signature", SEALS)
def a_bit_of_the_signature(folder: Path) -> None:
    def change(envelope: Any) -> None:
        sig = envelope["signatures"][0]["sig"]
        envelope["signatures"][0]["sig"] = ("B" if sig[0] == "A" else "A") + sig[1:]

    edit(folder, layout.ENVELOPE, change)


@tampering(layout.ENVELOPE, "signature", SEALS)
def the_type_of_the_envelope(folder: Path) -> None:
    edit(folder, layout.ENVELOPE, put("payloadType", value="text/plain"))


@tampering(layout.KEY, "signature", SEALS)
def a_missing_key(folder: Path) -> None:
    (folder / layout.KEY).unlink()


@tampering(layout.ENVELOPE, "signature", SEALS)
def a_removed_signature(folder: Path) -> None:
    for name in (layout.ENVELOPE, layout.KEY):
        (folder / name).unlink()
