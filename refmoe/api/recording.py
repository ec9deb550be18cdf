# SPDX-License-Identifier: Apache-2.0
"""Traces of transformers or of an adapter, from a checkpoint or a case; and checkpoints of cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from refmoe.api.facts import named_case
from refmoe.api.progress import Bars, silent
from refmoe.checkpoints.ggml_quantise import KINDS
from refmoe.checkpoints.gguf_file import TYPES, write_gguf_model
from refmoe.checkpoints.load import checkpoint_digest, load_checkpoint
from refmoe.checkpoints.quantise import NAMES, write_quantised
from refmoe.checkpoints.size import total_parameters
from refmoe.checkpoints.write import DTYPE_NAMES, write_checkpoint
from refmoe.engines.adapter import Skipped, adapter_class
from refmoe.engines.capture import transformers as engine
from refmoe.engines.options import made, options_of
from refmoe.engines.run_case import lacks
from refmoe.errors import InputError
from refmoe.files.scratch import Scratch
from refmoe.files.sentences import one_line
from refmoe.traces.script import AnyCall, plan
from refmoe.traces.trace import Header, Recorder, Run, write_trace

DTYPES, ATTENTIONS = engine.DTYPES, ("eager", "sdpa")
WRITTEN_DTYPES = tuple(DTYPE_NAMES)
DTYPES_OF_TYPES = {kind: dtype for dtype, kind in TYPES.items()}
RECIPE_NAMES = NAMES
GGUF_KINDS = (*DTYPES_OF_TYPES, *KINDS)
"""ggml's names of the types and mixtures that a GGUF file is written in."""


@dataclass(frozen=True)
class Recording:
    """The engine and its model."""

    out: Path
    checkpoint: Path | None = None
    layout: str | None = None
    case: str | None = None
    """The case whose model and calls are run instead of a checkpoint."""
    golden: Path | None = None
    taps: str = "*"
    dtype: str = "float32"
    """One of `DTYPES`."""
    attention: str = "eager"
    """One of `ATTENTIONS`."""
    adapter: str | None = None
    """The adapter that runs the engine; None: transformers."""
    options: tuple[str, ...] = ()
    """Of the adapter, each ``key=value``."""


def record(asked: Recording, calls: Callable[[], Sequence[AnyCall]], bars: Bars = silent) -> dict[str, int]:
    """Load a checkpoint into an engine, run calls, and write the trace.

    calls: gives those of a checkpoint; a case has its own
    Returns the number of runs and of taps. Raises InputError when the model cannot be run.
    """
    if (asked.checkpoint is None) == (asked.case is None):
        raise InputError("exactly one of --checkpoint DIR and --case NAME was expected")
    if asked.options and asked.adapter is None:
        raise InputError(f"--option {asked.options[0]} is about an adapter, but --adapter was not given")
    if asked.attention != "eager" and asked.adapter is not None:
        raise InputError(f"--attention {asked.attention} is about transformers, but --adapter was given")
    with ExitStack() as stack:
        if asked.checkpoint is None:
            case = named_case(str(asked.case), asked.golden)
            folder, runs, digest = stack.enter_context(Scratch("capture")).path, case.runs(), None
            write_checkpoint(folder, case.config, case.checkpoint().parameters, "float32")
        else:
            loaded = load_checkpoint(asked.checkpoint, asked.layout)
            if loaded.layout != "hf" and asked.adapter is None:
                raise InputError(f"{asked.checkpoint}: transformers reads the Hugging Face layout only")
            runs = plan(calls(), loaded.config.vocab)
            folder, digest = asked.checkpoint, checkpoint_digest(loaded)
        if asked.adapter is not None:
            recorder, header = _by_adapter(asked, folder, runs)
            header = replace(header, case=asked.case, checkpoint=digest)
        else:
            model = engine.load_model(folder, asked.dtype, asked.attention)
            with bars("capture", len(runs) * model.config.num_hidden_layers) as advance:
                recorder = Recorder(asked.taps, advance)
                engine.capture(model, runs, recorder)
            header = engine.header(model, runs, asked.case, digest)
    if not recorder.arrays:
        raise InputError(f"--taps {asked.taps!r} matches no tap")
    write_trace(asked.out, header, recorder.arrays)
    return {"runs": len(runs), "taps": len(recorder.arrays)}


def _by_adapter(asked: Recording, folder: Path, runs: tuple[Run, ...]) -> tuple[Recorder, Header]:
    """The values of an engine behind an adapter, and its header. Raises InputError when it does not run."""
    name = str(asked.adapter)
    try:
        adapter = made(name, adapter_class(name), options_of(asked.options))
        if asked.dtype not in adapter.dtypes:
            known = ", ".join(adapter.dtypes)
            raise InputError(f"dtype {asked.dtype}: adapter '{name}' does not have it, but one of {known} was expected")
        missing = lacks(runs, adapter.abilities)
        if missing is not None:
            raise InputError(f"adapter '{name}': this script {missing}")
        adapter.load(folder, asked.dtype)
        arrays = adapter.run(runs, frozenset(adapter.taps))
    except InputError:
        raise
    except Skipped as skipped:
        raise InputError(f"adapter '{name}': {skipped.reason}") from None
    except Exception as error:  # the engine's own, of any type
        raise InputError(f"adapter '{name}': {type(error).__name__}: {one_line(error)}") from error
    recorder = Recorder(asked.taps)
    for key, array in arrays.items():
        recorder.run, _, tap = key.partition("/")
        recorder(tap, array)
    policy = adapter.policies.get(asked.dtype, asked.dtype)
    return recorder, Header(runs=runs, policy=policy, producer={"name": adapter.name, "version": adapter.version})


@dataclass(frozen=True)
class Written:
    """How the model of a case is written."""

    dtype: str = "bfloat16"
    """One of `WRITTEN_DTYPES`."""
    layout: str = "hf"
    recipe: str | None = None
    """One of `RECIPE_NAMES`: how matrices are quantised, in Hugging Face's layout."""
    gguf: str | None = None
    """One of `GGUF_KINDS`: the dtype or format of the matrices of a GGUF file, which is written instead."""


def materialise(name: str, folder: Path, golden: Path | None = None, form: Written | None = None) -> int:
    """Write the model of a case as a checkpoint. Returns the number of parameters. Raises InputError."""
    case, form = named_case(name, golden), form or Written()
    parameters = case.checkpoint().parameters
    if form.gguf is not None:
        write_gguf_model(folder, case.config, parameters, DTYPES_OF_TYPES.get(form.gguf, form.gguf))
    elif form.recipe is not None:
        write_quantised(folder, case.config, parameters, form.recipe, form.dtype)
    else:
        write_checkpoint(folder, case.config, parameters, form.dtype, form.layout)
    return total_parameters(case.config)
