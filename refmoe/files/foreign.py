# SPDX-License-Identifier: Apache-2.0
"""Files that another library reads, and files of another format than expected, which messages name."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from refmoe.errors import InputError
from refmoe.files.reading import open_file
from refmoe.files.sentences import one_line

GGUF = "a GGUF file"
TORCH = "a PyTorch file"
BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", TORCH),  # before PyTorch 1.6: its magic number, pickled
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x93NUMPY", "a .npy file of NumPy"),
    (b"GGUF", GGUF),
    (b"lmgg", "a GGML file of old llama.cpp"),
    (b"fmgg", "a GGML file of old llama.cpp"),
    (b"tjgg", "a GGML file of old llama.cpp"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"version https://git-lfs", "a pointer of Git LFS, which 'git lfs pull' replaces by the file"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"%PDF", "a PDF file"),
    (b"<!DOCTYPE", "a web page"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
)
"""The first bytes of formats, and the formats in words."""
TAR = 257, b"ustar"
"""The place of a tar archive's mark, and the mark."""
LONGEST = TAR[0] + len(TAR[1])


def other_format(path: Path) -> str | None:
    """The format of a file in words, such as ``a PyTorch file``; None where the first bytes tell none.

    Raises InputError when the file cannot be read.
    """
    with open_file(path, "a file") as file:
        head = file.read(LONGEST)
        found = next((words for beginning, words in BEGINNINGS if head.startswith(beginning)), None)
        if found is not None:
            return found
        if head[TAR[0] :] == TAR[1]:
            return "a tar archive"
        if head.startswith(b"PK\x03\x04"):
            return _kind_of_zip(file)
    return "an ONNX file" if _begins_as_onnx(head) else None


def by_name(path: Path) -> str:
    """The format of a file in parentheses, to end a sentence with; nothing where the first bytes tell none."""
    found = other_format(path)
    return f" (it is {found})" if found else ""


def _kind_of_zip(file: BufferedReader) -> str:
    """PyTorch and NumPy keep their arrays in zip archives, and the names of the members tell which."""
    try:
        names = zipfile.ZipFile(file).namelist()
    except Exception:  # cut short, or no archive at all: zipfile raises a dozen kinds of errors
        return "a zip archive that is not whole"
    if any(name.endswith("/data.pkl") for name in names):
        return TORCH
    if names and all(name.endswith(".npy") for name in names):
        return "an .npz file of NumPy"
    if any(name.endswith((".keras", "model.weights.h5")) for name in names):
        return "a Keras file"
    return "a zip archive"


def _begins_as_onnx(head: bytes) -> bool:
    """A protobuf message has no magic bytes. An ONNX model begins with field 1, its version, and then a text or graph.

    The fields 2 to 6 and 20 are texts, 7 is the graph, 8 the operators: `onnx.proto`, `ModelProto`.
    """
    length_delimited = (0x12, 0x1A, 0x22, 0x32, 0x3A, 0x42)
    return len(head) > 3 and head[0] == 0x08 and 1 <= head[1] < 64 and head[2] in length_delimited


@contextmanager
def foreign_parser(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever the parser of another library raises into one sentence, and show none of its warnings.

    expected: the format, as "a .npy file"
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception as error:  # no list of exceptions is long enough: tokenize.TokenError, OverflowError, ...
        reason = one_line(str(error).partition("\n")[0]) or type(error).__name__
        instead = "" if other_format(path) == expected else by_name(path)
        raise InputError(f"{path}: cannot be read as {expected}: {reason}{instead}") from None
