"""The smoke test: is it the harness that is broken, before anything is said about its engine?

The smallest case at the first dtype that is run, twice: what start has promised must be in the file, in shapes that fit
the model, and in the same dtypes both times. No value is looked at. An engine that refuses a case, reports an error or
dies proves nothing about its harness: then the next larger case is tried, and after a few of these the suite may find
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from refmoe.checkpoints.size import total_parameters
from refmoe.engines.attempt import attempted, lacks, materialised
from refmoe.engines.harness import Harness, HarnessUnusable, Refused
from refmoe.engines.process import CRASHED, HarnessError
from refmoe.errors import InputError
from refmoe.suite import Case
from refmoe.verify.intake import take_in

TRIED = 3
"""Cases, the smallest that need only what the harness has."""


def smoke_test(harness: Harness, cases: Sequence[Case], dtype: str, folder: Path) -> str:
    """What was run, in words. Raises HarnessUnusable that says what is wrong with the harness."""
    able = [case for case in cases if lacks(case.runs(), harness.description.abilities) is None]
    said = "nothing: no case needs only the abilities of the harness"
    for case in sorted(able, key=work)[:TRIED]:
        what = f"case {case.name} in {dtype}"
        try:
            with materialised(case, case.checkpoint().parameters, folder, harness.description.layout) as checkpoint:
                if _form(harness, case, checkpoint, dtype) != _form(harness, case, checkpoint, dtype):
                    raise HarnessUnusable(f"the harness is broken: {what}, run twice, gave other dtypes", harness.log)
            return f"{what}, twice"
        except Refused as refused:
            said = f"nothing: {what} was skipped: {refused.reason}"
        except HarnessError as error:
            if error.kind != CRASHED:
                raise HarnessUnusable(f"the harness is broken: {what}: {error.reason}", harness.log) from None
            said = f"nothing: {what} crashed: {error.reason}"
    return said


def _form(harness: Harness, case: Case, checkpoint: Path, dtype: str) -> dict[str, str]:
    """Per key of the file its dtype, once the shapes are those of the model."""
    with attempted(harness, case, checkpoint, dtype, dtype) as trace:
        try:
            take_in(trace, case.config, case.runs())
        except InputError as error:
            reason = str(error).removeprefix(f"{trace.path}: ")
            raise HarnessUnusable(
                f"the harness is broken: case {case.name} in {dtype}: its file: {reason}", harness.log
            ) from None
        return {key: tensor.dtype for key, tensor in trace.tensors.items()}


def work(case: Case) -> tuple[int, str]:
    """How much a case asks for, by which cases are ordered."""
    return total_parameters(case.config) * sum(len(run.tokens) for run in case.runs()), case.name
