# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint in the layout that its folder holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

from refmoe.checkpoints import hf, mistral
from refmoe.checkpoints.layout import Checkpoint
from refmoe.errors import InputError
from refmoe.files.reading import exists, need_folder, open_file
from refmoe.files.writable import protect_while_alive

LAYOUTS = {"hf": hf.load, "mistral": mistral.load}


def load_checkpoint(folder: Path, layout: str | None = None) -> Checkpoint:
    """The checkpoint in a folder. Weights are mapped, not read; NaN and Inf are found when a weight is first used.

    layout: ``"hf"``, ``"mistral"``, or None to choose by the files. Published repositories hold both layouts:
        config.json with safetensors in Hugging Face's names is preferred to params.json.
    Raises InputError, one sentence, for anything that does not fit.
    """
    need_folder(folder, "a checkpoint's folder")
    if layout is None:
        has_hf = exists(folder / "config.json")
        has_mistral = exists(folder / "params.json")
        if not has_hf and not has_mistral:
            raise InputError(f"{folder}: neither config.json nor params.json is there, so this is not a checkpoint")
        only_consolidated = has_mistral and not any(folder.glob("model*.safetensors*"))
        layout = "mistral" if not has_hf or only_consolidated else "hf"
    found = LAYOUTS[layout](folder)
    protect_while_alive(found, (*found.files, folder / "config.json", folder / "params.json"))
    return found


def checkpoint_digest(files: tuple[Path, ...]) -> str:
    """``sha256:`` and the digest over the files' bytes in name order, by which a trace names its checkpoint."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with open_file(path, "a safetensors file") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
