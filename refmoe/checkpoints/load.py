# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint in the layout that its folder holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

from refmoe.checkpoints import hf, mistral
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


def load_checkpoint(folder: Path, layout: str | None = None) -> Checkpoint:
    """The checkpoint in a folder. Weights are mapped, not read; NaN and Inf are found when a weight is first used.

    layout: ``"hf"``, ``"mistral"``, or None to choose by the files.
    Raises InputError, one sentence, for anything that does not fit.
    """
    found = LAYOUTS[layout or layout_of(folder)](folder)
    protect_while_alive(found, (*found.files, *(folder / name for name in READERS)))
    return found


def layout_of(folder: Path) -> str:
    """The layout of a checkpoint's folder, ``"hf"`` or ``"mistral"``.

    Published repositories hold both: config.json with safetensors in Hugging Face's names is preferred to params.json.
    Raises InputError when the folder has neither.
    """
    need_folder(folder, "a checkpoint's folder")
    has_hf = exists(folder / "config.json")
    has_mistral = exists(folder / "params.json")
    if not has_hf and not has_mistral:
        raise InputError(f"{folder}: neither config.json nor params.json is there, so this is not a checkpoint")
    only_consolidated = has_mistral and not any(folder.glob("model*.safetensors*"))
    return "mistral" if not has_hf or only_consolidated else "hf"


def read_configuration(path: Path, layout: str | None = None) -> ConfigurationFile:
    """A configuration without its weights.   path: of a checkpoint's folder, or of its config.json or params.json

    layout: as in `load_checkpoint`.   Raises InputError for anything that does not fit.
    """
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

    The digest is over the bytes of the configuration's file, and then of the safetensors files in name order: of all
    files that the values of taps depend on. Raises InputError when a file can no longer be read.
    """
    if checkpoint.configuration is None:
        return None
    digest = hashlib.sha256()
    for path in (checkpoint.configuration, *sorted(checkpoint.files)):
        with open_file(path, "a file of the checkpoint") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
