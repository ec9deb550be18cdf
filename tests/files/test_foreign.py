# SPDX-License-Identifier: Apache-2.0
"""A file of another format is named where safetensors, a trace or arrays are expected."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from refmoe.api.dumps import read_values
from refmoe.errors import InputError
from refmoe.files.foreign import other_format
from refmoe.files.npy_file import read_npz
from refmoe.files.safetensors_file import open_safetensors
from refmoe.traces.trace import read_trace

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def torch_file(path: Path, legacy: bool) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"logits": torch.tensor(ARRAY)}, path, _use_new_zipfile_serialization=not legacy)


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, logits=ARRAY)


def npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, ARRAY)


def zipped(path: Path, names: tuple[str, ...] = ("readme.txt",)) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "text")


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"), io.BytesIO())


def onnx_file(path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path.write_bytes(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])).SerializeToString())


def hdf5(path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file["logits"] = ARRAY


def gguf_file(path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", ARRAY)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


FORMATS: dict[str, tuple[Callable[[Path], None], str]] = {
    "torch": (lambda path: torch_file(path, legacy=False), "a PyTorch file"),
    "torch before 1.6": (lambda path: torch_file(path, legacy=True), "a PyTorch file"),
    "pickle": (content(pickle.dumps({"logits": [1.0]}, protocol=4)), "a pickle"),
    "npz": (npz, "an .npz file"),
    "npy": (npy, "a .npy file"),
    "gguf": (gguf_file, "a GGUF file"),
    "gguf, its first bytes": (content(b"GGUF\x03\0\0\0" + bytes(16)), "a GGUF file"),
    "hdf5": (hdf5, "an HDF5 file"),
    "hdf5, its first bytes": (content(b"\x89HDF\r\n\x1a\n" + bytes(40)), "an HDF5 file"),
    "onnx": (onnx_file, "an ONNX file"),
    "onnx, as pytorch writes it": (content(b"\x08\x08\x12\x07pytorch\x1a\x052.9.0\x3a\x00"), "an ONNX file"),
    "zip": (zipped, "a zip archive"),
    "zip, cut": (content(b"PK\x03\x04" + bytes(40)), "a zip archive that is not whole"),
    "keras": (lambda path: zipped(path, ("config.json", "model.weights.h5")), "a Keras file"),
    "tar": (tarred, "a tar archive"),
    "gzip": (content(gzip.compress(b"text")), "a gzip archive"),
    "bzip2": (content(bz2.compress(b"text")), "a bzip2 archive"),
    "xz": (content(lzma.compress(b"text")), "an xz archive"),
    "git lfs": (content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "a pointer of Git LFS"),
    "a web page": (content(b"<!DOCTYPE html>\n<html></html>"), "a web page"),
}
"""Each format written by its own library where that is here, else its first bytes; and its name."""


@pytest.mark.parametrize("name", FORMATS)
def test_another_format_is_named(tmp_path: Path, name: str) -> None:
    write, words = FORMATS[name]
    path = tmp_path / "model.safetensors"
    write(path)
    for read in (open_safetensors, read_trace, read_values):
        with pytest.raises(InputError, match=f"model.safetensors: is {words}") as caught:
            read(path)
        assert "safetensors file was expected" in str(caught.value)
    if name != "npz":
        with pytest.raises(InputError, match=words):
            read_npz(path)


@pytest.mark.parametrize("length", [0, 1, 3, 7, 8, 40, 300])
@pytest.mark.parametrize("byte", [0, 8, 32, 255])
def test_bytes_of_no_format_are_not_named(tmp_path: Path, byte: int, length: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes([byte]) * length)
    assert other_format(path) is None


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_a_file_of_pytorch_is_named_where_a_trace_of_another_suffix_is_read(tmp_path: Path) -> None:
    torch_file(tmp_path / "dump", legacy=False)
    with pytest.raises(InputError, match="dump: is a PyTorch file"):
        read_values(tmp_path / "dump")
