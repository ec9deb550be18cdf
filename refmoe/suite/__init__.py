# SPDX-License-Identifier: Apache-2.0
"""Golden cases: compute them, write them, check them."""

from refmoe.suite.activations import case_source, compute, compute_fingerprints, compute_ideal
from refmoe.suite.case import (
    CASE_FILE,
    FAMILIES,
    PRODUCTION,
    SMALL,
    STORES,
    Case,
    find_cases,
    find_full_size_cases,
    read_case,
)
from refmoe.suite.checking import (
    Difference,
    check,
    first_difference,
    verify_case_files,
    verify_documents,
    verify_files,
)
from refmoe.suite.emission import emit, is_emitted, remove_leftovers
from refmoe.suite.manifest import (
    MANIFEST_FILE,
    file_digest,
    leftovers,
    read_folder_manifest,
    read_manifest,
    tensor_digest,
    trace_path,
    write_folder_manifest,
    write_manifest,
)

__all__ = [
    "CASE_FILE",
    "FAMILIES",
    "MANIFEST_FILE",
    "PRODUCTION",
    "SMALL",
    "STORES",
    "Case",
    "Difference",
    "case_source",
    "check",
    "compute",
    "compute_fingerprints",
    "compute_ideal",
    "emit",
    "file_digest",
    "find_cases",
    "find_full_size_cases",
    "first_difference",
    "is_emitted",
    "leftovers",
    "read_case",
    "read_folder_manifest",
    "read_manifest",
    "remove_leftovers",
    "tensor_digest",
    "trace_path",
    "verify_case_files",
    "verify_documents",
    "verify_files",
    "write_folder_manifest",
    "write_manifest",
]  # fmt: skip
