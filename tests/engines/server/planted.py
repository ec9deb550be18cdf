# SPDX-License-Identifier: Apache-2.0
"""Real servers with a known bug behind them: `transformers serve` with a patch in its code, llama-server with a file.

    python -m tests.engines.server.planted serve --port 8000 ...      # transformers, which plants by the model's name

A model whose folder is named as a bug is served with that bug. So one process serves all of them, one after another.
The patches are those of `tests.bugs.patched` and `tests.verifier.faults`, written as the bugs come about in an engine,
and not as refmoe's own mutants have them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refmoe.bugs.catalogue import MUTANTS
from refmoe.bugs.mutant import CONFIG, PARAMETERS
from refmoe.engines.server.asking import Address, Client
from refmoe.engines.server.judging import Model
from refmoe.engines.server.served import served_case
from refmoe.engines.server.serving import CHECKPOINT, DECISION, filled, started, write_files
from refmoe.engines.server.verdict import Asking, Verdict, examine
from refmoe.profiles.load import policy
from refmoe.suite.matrix.outcomes import runnable

HEALTHY = "healthy"
DTYPE = "float32"
LIMIT = 300.0
"""Seconds for the start of a server and for each request, on a busy machine."""


# ---- transformers


def patches() -> dict[str, Callable[[Any, Any], None]]:
    """Per known bug its patch of transformers, where the table of servers has the bug."""
    from tests.bugs import patched_attention, patched_experts, patched_positions, patched_router, patched_weights
    from tests.bugs.patched import PATCHED
    from tests.bugs.patched_names import BOUND, NAMES
    from tests.verifier.faults import FAULTS

    _ = patched_attention, patched_experts, patched_positions, patched_router, patched_weights  # they register patches
    found = {mutant: FAULTS[name].apply for name, mutant in NAMES.items() if name not in BOUND}
    found |= {name: each.apply for name, each in PATCHED.items() if each.elsewhere}
    return {name: found[name] for name in runnable() if name in found}


def write_models(folder: Path) -> None:
    """Write the model for servers into a folder, and a link to it for each bug."""
    case = served_case()
    write_files(folder, case.config, case.checkpoint().parameters, DTYPE, gguf=False)
    for name in (HEALTHY, *patches()):
        (folder / name).symlink_to(CHECKPOINT)


@contextmanager
def transformers(folder: Path, port: int) -> Iterator[Address]:
    """`transformers serve` with the models of `write_models`."""
    address = Address(f"http://127.0.0.1:{port}")
    command = [
        sys.executable, "-m", "tests.engines.server.planted", "serve", "--host", address.host, "--port", str(port),
        "--dtype", DTYPE, "--device", "cpu", "--decision-config", str(folder / DECISION),
    ]  # fmt: skip
    with started(command, address, LIMIT):
        yield address


def judged_by_name(address: Address, folder: Path, bug: str) -> Verdict:
    """The verdict on the model of this name.   folder: as `write_models` has filled it"""
    case = served_case()
    model = Model("case served", case.config, case.checkpoint().parameters, policy("hf-float32"))
    name = str(folder / bug)
    asking = Asking(Client(address, LIMIT), wanted="transformers", model_name=name, diagnose=False)
    return examine(asking, model, lambda _: model.policy)


def serve() -> None:
    """``python -m tests.engines.server.planted``: transformers' own command, which loads a model with its bug."""
    import pytest
    import transformers
    from transformers.cli.transformers import main

    load, planted = transformers.MixtralForCausalLM.from_pretrained, pytest.MonkeyPatch()

    def loaded(name: str, *words: Any, **options: Any) -> Any:
        planted.undo()  # the model before is asked no more
        # patches replace the code of the two that are written in Python
        model = load(name, *words, **{**options, "attn_implementation": "eager", "experts_implementation": "eager"})
        patch = patches().get(Path(name).name)
        if patch is not None:
            patch(planted, model)
        return model

    transformers.MixtralForCausalLM.from_pretrained = staticmethod(loaded)
    sys.argv[0] = "transformers"
    main()


# ---- llama-server


def wrong_files() -> list[str]:
    """The known bugs that are a wrong file: another config, or other parameters, and the right code.

    Bugs of quantised weights are left out. A product of a code and its scale is not always exact in float32.
    """
    found = [MUTANTS[name] for name in runnable()]
    files = [each for each in found if each.changes in (CONFIG, PARAMETERS) and not each.steps]
    return [each.id for each in files if "QUANT" not in each.needs]


def judged_file(bug: str, folder: Path, port: int) -> Verdict:
    """The verdict on llama-server with the file of a converter that has a bug.   folder: gets the file"""
    case = served_case()
    model = Model("case served", case.config, case.checkpoint().parameters, policy("llama.cpp-float32"))
    served = model if bug == HEALTHY else MUTANTS[bug].model(model.config, model.parameters)
    write_files(folder, served.config, served.parameters, DTYPE)
    address = Address(f"http://127.0.0.1:{port}")
    command = [sys.executable, "-m", "refmoe.engines.server.llama_server", "{gguf}", str(port)]
    with started(filled(command, folder), address, LIMIT):
        asking = Asking(Client(address, LIMIT), wanted="llama.cpp", diagnose=False)
        return examine(asking, model, lambda _: model.policy)


if __name__ == "__main__":
    serve()
