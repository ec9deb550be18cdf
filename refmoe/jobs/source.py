# SPDX-License-Identifier: Apache-2.0
"""The origin of a model, a record small enough to send to another process, which then loads the weights itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from refmoe.checkpoints.layout import Checkpoint
from refmoe.checkpoints.load import load_checkpoint
from refmoe.checkpoints.synthetic import synthetic_checkpoint
from refmoe.errors import InputError
from refmoe.files.parsing import strict_json
from refmoe.spec.config import PRESETS, Config


@dataclass(frozen=True)
class Folder:
    """A checkpoint on disk. Every worker must be able to read it."""

    path: Path
    layout: str | None = None

    def load(self) -> Checkpoint:
        return load_checkpoint(self.path, self.layout)

    def identity(self) -> dict[str, Any]:
        """The folder, and the names, sizes and times of its files. No weight is read."""
        stats = {path.name: path.stat() for path in self.load().files}
        return {
            "folder": str(self.path.resolve()),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        }


@dataclass(frozen=True)
class Formula:
    """A model whose weights come from the weight formula."""

    config: Config
    seed: int
    exponents: tuple[tuple[str, int], ...] = ()
    edits: str = "[]"
    """The tables of `weight_edits`, as JSON text, since a source must be hashable."""

    def load(self) -> Checkpoint:
        return synthetic_checkpoint(self.config, self.seed, dict(self.exponents), strict_json(self.edits))

    def identity(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config), "seed": self.seed, "exponents": dict(self.exponents),
            "edits": strict_json(self.edits),
        }  # fmt: skip


Source = Folder | Formula


@lru_cache(maxsize=2)
def loaded(source: Source) -> Checkpoint:
    """The model of a source, opened once per process."""
    return source.load()


def find_source(checkpoint: Path, layout: str | None, seed: int | None) -> Source:
    """The source that ``--checkpoint`` and ``--seed`` name. Raises InputError when they contradict each other.

    checkpoint: a folder, or where there is none of this name a published size, ``mixtral-8x7b``
    """
    size = PRESETS.get(str(checkpoint))
    if size is not None and layout is None and not checkpoint.exists():
        if seed is None:
            raise InputError(
                f"--checkpoint {checkpoint}: is a size and no folder, so --seed SEED was expected for its weights"
            )
        return Formula(size, seed)
    if seed is not None:
        raise InputError(f"--seed {seed} goes with --checkpoint {' or '.join(PRESETS)}, but {checkpoint} was given")
    return Folder(checkpoint, layout)
