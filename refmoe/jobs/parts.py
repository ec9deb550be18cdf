# SPDX-License-Identifier: Apache-2.0
"""Finished parts of a long run on disk, so that a run which was stopped does not compute them again.

The folder holds `job.json`, the identity of the computation, and one safetensors file per part. Such a file has the
recorded taps, the fingerprints in its metadata, and under `state:<run>` the hidden states that the next part reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from refmoe.errors import InputError
from refmoe.files.atomic import replacing, sync
from refmoe.files.lock import locked
from refmoe.files.parsing import strict_json
from refmoe.files.reading import read_bytes
from refmoe.files.safetensors_file import StoredTensor, open_safetensors
from refmoe.files.sentences import one_line
from refmoe.files.writable import make_folder

JOB_FILE = "job.json"
STATE = "state:"


@contextmanager
def kept_parts(folder: Path) -> Iterator[None]:
    """Hold the folder of a job's parts: another process with the same job waits for the end of the body.

    At the end, a folder without a finished part is removed.   Raises InputError when the folder cannot be made.
    """
    with locked(folder):
        try:
            yield
        finally:
            if not any(folder.glob("*.safetensors")):
                shutil.rmtree(folder, ignore_errors=True)


class Parts:
    """The finished parts of one job, in the order in which they are computed."""

    def __init__(self, folder: Path, job: Mapping[str, Any], names: Sequence[str]) -> None:
        """Start a job in an empty folder, or continue the job whose parts the folder holds.

        job: its identity, a JSON object.   names: the names of all parts, in order.
        Raises InputError when the folder holds parts of another job.
        """
        self.folder, self.names = folder, list(names)
        # JSON turns tuples into lists, so the identity is compared in the form that JSON gives back
        self.job = strict_json(json.dumps(job))
        make_folder(folder)
        path = folder / JOB_FILE
        if path.exists():
            self._refuse_another(path)
        else:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(self.job, indent=1), encoding="utf-8")

    def _refuse_another(self, path: Path) -> None:
        try:
            found = strict_json(read_bytes(path, "the identity of a job"))
        except ValueError as error:
            sentence = str(error) if isinstance(error, InputError) else f"{path}: cannot be read: {one_line(error)}"
            raise InputError(f"{sentence}; delete {self.folder} to begin anew") from None
        found = found if isinstance(found, dict) else {}
        other = [name for name in self.job if found.get(name) != self.job[name]]
        if other:
            raise InputError(
                f"{self.folder}: holds the finished layers of another run, whose {', '.join(other)} differ"
                f"{'s' * (len(other) == 1)}; delete it, or give another --out"
            )

    @property
    def finished(self) -> int:
        """The number of parts on disk before the first missing one."""
        return next((i for i, name in enumerate(self.names) if not self._path(name).exists()), len(self.names))

    def save(
        self, name: str, arrays: Mapping[str, Any], states: Mapping[str, Any], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Write a part, whole or not at all. Raises InputError when it cannot be written."""
        tensors = {**arrays, **{STATE + run: value for run, value in states.items()}}
        data = save(
            {key: np.ascontiguousarray(value) for key, value in tensors.items()}, {"facts": json.dumps(facts or {})}
        )
        with replacing(self._path(name)) as temporary:
            temporary.write_bytes(data)

    def states(self, name: str) -> dict[str, Any]:
        """The hidden states in a finished part, by run: [T, D]."""
        tensors, _ = open_safetensors(self._path(name))
        return {key.removeprefix(STATE): np.array(x.map()) for key, x in tensors.items() if key.startswith(STATE)}

    def tensors(self) -> dict[str, StoredTensor]:
        """The taps of all finished parts."""
        found: dict[str, StoredTensor] = {}
        for name in self.names[: self.finished]:
            tensors, _ = open_safetensors(self._path(name))
            found |= {key: tensor for key, tensor in tensors.items() if not key.startswith(STATE)}
        return found

    def facts(self) -> dict[str, Any]:
        """The facts of all finished parts, merged."""
        found: dict[str, Any] = {}
        for name in self.names[: self.finished]:
            found |= strict_json(open_safetensors(self._path(name))[1]["facts"])
        return found

    def remove(self) -> None:
        """Delete the folder of parts. Call it after the trace has been written."""
        shutil.rmtree(self.folder)
        sync(self.folder.parent)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
