# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint in the layout that its folder holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

from refmoe.checkpoints import gguf_load, hf, mistral
from refmoe.checkpoints.layout import Checkpoint, ConfigurationFile
from refmoe.errors import InputError
from refmoe.files.foreign import other_format
from refmoe.files.reading import exists, is_folder, need_folder, open_file
from refmoe.files.writable import protect_while_alive

LAYOUTS = {"hf": hf.load, "mistral": mistral.load}
CONFIGURATIONS = {"hf": "config.json", "mistral": "params.json"}
"""Per layout the name of the file of the configuration."""
READERS = {"config.json": hf.read_config, "params.json": mistral.read_config}
"""By the name of that file, the function that reads it."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
"""The suffixes of files of weights."""


def load_checkpoint(path: Path, layout: str | None = None) -> Checkpoint:
    """The checkpoint in a folder or a GGUF file. Weights are mapped; NaN and Inf are found when one is first used.

    layout: of a folder, ``"hf"``, ``"mistral"``, or None to choose by the files.
    Raises InputError, one sentence, for anything that does not fit.
    """
    if gguf_load.is_gguf(path):
        if layout is not None:
            raise InputError(f"{path}: is a GGUF file, but a folder was expected beside layout {layout}")
        found: Checkpoint = gguf_load.load(path)
        protect_while_alive(found, found.files)
        return found
    found = LAYOUTS[layout or layout_of(path)](path)
    protect_while_alive(found, (*found.files, *(path / name for name in READERS)))
    return found


def layout_of(folder: Path) -> str:
    """The layout of a checkpoint's folder, ``"hf"`` or ``"mistral"``.

    Published repositories hold both: config.json with safetensors in Hugging Face's names is preferred to params.json.
    Raises InputError when the folder has neither.
    """
    need_folder(folder, "a checkpoint's folder or a GGUF file")
    has_hf = exists(folder / "config.json")
    has_mistral = exists(folder / "params.json")
    if not has_hf and not has_mistral:
        named = min((path.name for path in folder.glob("*.gguf")), default="")
        instead = f", but {folder / named} may be one" if named else ""
        found = "neither config.json nor params.json is there, so this is not a checkpoint"
        raise InputError(f"{folder}: {found}{instead}")
    only_consolidated = has_mistral and not any(folder.glob("model*.safetensors*"))
    return "mistral" if not has_hf or only_consolidated else "hf"


def read_configuration(path: Path, layout: str | None = None) -> ConfigurationFile:
    """A configuration without its weights.   path: of a checkpoint's folder, of its config.json or params.json, or a
    GGUF file

    layout: as in `load_checkpoint`.   Raises InputError for anything that does not fit.
    """
    if gguf_load.is_gguf(path):
        return gguf_load.read_config(gguf_load.open_parts(path)[0])
    if path.name in READERS and not is_folder(path):
        return READERS[path.name](path)
    if exists(path) and not is_folder(path):
        found = other_format(path) or "a file"
        raise InputError(f"{path}: is {found}, but a checkpoint's folder, config.json or params.json was expected")
    return read_configuration(path / CONFIGURATIONS[layout or layout_of(path)])


def has_weights(folder: Path) -> bool:
    """Whether a folder holds files of weights, in whatever format. Raises InputError when it cannot be listed."""
    need_folder(folder, "a checkpoint's folder")
    return any(found.suffix in WEIGHTS for found in folder.iterdir())


def checkpoint_digest(checkpoint: Checkpoint) -> str | None:
    """``sha256:`` and the digest by which a trace names its checkpoint; None for weights that are in no file.

    The digest is over the bytes of the configuration's file, and then of the files of weights in name order: of all
    files that the values of taps depend on, each once. Raises InputError when a file can no longer be read.
    """
    if checkpoint.configuration is None:
        return None
    digest = hashlib.sha256()
    for path in dict.fromkeys((checkpoint.configuration, *sorted(checkpoint.files))):
        with open_file(path, "a file of the checkpoint") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
