# SPDX-License-Identifier: Apache-2.0
"""Facts that follow from a configuration, a checkpoint or a case: sizes, memory, and the reason for the case."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refmoe.checkpoints.gguf_load import is_gguf, open_parts, read_config
from refmoe.checkpoints.load import has_weights, load_checkpoint, read_configuration
from refmoe.checkpoints.size import active_parameters, total_parameters
from refmoe.checkpoints.storage import storage_facts, stored_in, stored_in_gguf
from refmoe.cuda.memory import cache_bytes, gibibytes, missing, resident, widest
from refmoe.cuda.place import CPU, Place
from refmoe.files.reading import is_folder
from refmoe.spec.config import PRESETS, Config
from refmoe.suite import FAMILIES, PRODUCTION, Case, read_case
from refmoe.suite.golden_folder import case_folder, case_folders, golden_folder

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
"""Per dtype the bytes of a parameter."""


def config_facts(config: Config, tied: bool = False) -> dict[str, Any]:
    """The facts that follow from a configuration.   tied: whether the output matrix is the embedding"""
    return {
        "config": asdict(config),
        "total_parameters": total_parameters(config, tied),
        "active_parameters": active_parameters(config, tied),
        "weight_bytes": weight_bytes(config, tied),
        "cache_bytes_per_token_float32": cache_bytes(config),
    }


def weight_bytes(config: Config, tied: bool = False) -> dict[str, int]:
    """The bytes of all weights, per dtype.   tied: whether the output matrix is the embedding"""
    return {dtype: total_parameters(config, tied) * size for dtype, size in BYTES.items()}


def model_facts(
    model: str, layout: str | None = None, *, place: Place = CPU, tokens: int = 2048, max_new_tokens: int = 64
) -> dict[str, Any]:
    """The facts of a model.

    model: the folder of a checkpoint, its configuration's file, a GGUF file, a published size, or the name of a case
    place: on a GPU, the facts include the memory that float32 generation takes there
    tokens, max_new_tokens: the length of the prompt and of its continuation

    Raises InputError when there is no such model, or its tensors do not fit its configuration.
    """
    stored: dict[str, Any] = {}
    widths: tuple[str, ...] = ("bfloat16", "float32")
    tied, folder = False, Path(model)
    if model in PRESETS and not folder.exists():
        config = PRESETS[model]
    elif not folder.exists() and model in case_folders(golden_folder()):
        config, widths = read_case(case_folder(model, golden_folder())).config, ("float32",)
    elif is_folder(folder) and has_weights(folder):
        found = load_checkpoint(folder, layout)
        config, tied, widths = found.config, found.tied, (widest(found.dtypes),)
        stored = {"layout": found.layout, "files": [path.name for path in found.files]} | storage_facts(
            stored_in(found)
        )
        stored |= {"unknown_fields": found.unknown} if found.unknown else {}
    else:
        if is_gguf(folder):
            opened, files = open_parts(folder)
            read, tensors = read_config(opened), storage_facts(stored_in_gguf(opened))
        else:
            read, tensors = read_configuration(folder, layout), {}
            files = [read.path]
        config, tied = read.config, read.tied
        stored = {"layout": read.layout, "files": [path.name for path in files]} | tensors
        stored |= {"unknown_fields": read.unknown} if read.unknown else {}
    facts = config_facts(config, tied) | ({"tied": True} if tied else {})
    if place.on_gpu:
        facts["device"] = _on_device(config, tokens, max_new_tokens, widths, place.free_memory())
    return facts | stored


def _on_device(config: Config, tokens: int, max_new_tokens: int, dtypes: Sequence[str], free: int) -> dict[str, Any]:
    """The memory that float32 generation takes on a device, for weights stored in each of the dtypes."""
    needs = {dtype: resident(config, tokens, max_new_tokens, dtype, "float32") for dtype in dtypes}
    return {
        "free_bytes": free,
        "tokens": tokens,
        "max_new_tokens": max_new_tokens,
        "needed": {
            dtype: asdict(need) | {"total": need.total, "missing": missing(need, free)} for dtype, need in needs.items()
        },
    }


# ---- cases


def listed_cases(golden: Path | None = None, families: Collection[str] = ()) -> list[Case]:
    """The cases of some families, those of full size included. Raises InputError when there is no case at all.

    golden: the folder of cases; None: the package's own   families: some of `FAMILIES`; empty: all
    """
    found = [read_case(folder) for folder in case_folders(golden_folder(golden)).values()]
    return [case for case in found if not families or case.family in families]


def named_case(name: str, golden: Path | None = None) -> Case:
    """A case by its name. Raises InputError, with similar names, when there is none."""
    return read_case(case_folder(name, golden_folder(golden)))


def case_facts(case: Case) -> dict[str, Any]:
    """The facts of a case, as JSON: the reason for it, its model, its calls."""
    return {
        "name": case.name,
        "family": case.family,
        "shows": shows(case),
        "why": " ".join(case.why.split()),
        "clauses": list(case.clauses),
        "bugs": list(case.bugs),
        "conditions": list(case.conditions),
        "config": asdict(case.config),
        "parameters": total_parameters(case.config),
        "weight_bytes": weight_bytes(case.config),
        "seed": case.seed,
        "layers": None if case.layers is None else list(case.layers),
        "store": case.store,
        "calls": [{"op": "packed"} | call._asdict() for call in case.calls],
        "runs": len(case.runs()),
        "tokens": sum(len(run.tokens) for run in case.runs()),
    }


def shows(case: Case) -> str:
    """The first sentence of the reason for a case."""
    words = " ".join(case.why.split())
    return words.partition(". ")[0].removesuffix(".")


__all__ = [
    "BYTES", "FAMILIES", "PRODUCTION", "case_facts", "config_facts", "gibibytes", "listed_cases", "model_facts",
    "named_case", "weight_bytes",
]  # fmt: skip
