# SPDX-License-Identifier: Apache-2.0
"""Assertions on products by a tensor core that is named, for sums that no policy of a dtype describes.

Of FP8 products, some tensor cores keep 13 bits: they cut off far more than float32 sums lose. Of TF32 products, they
cut off every few terms. One test is added to those of other products: whether sums are promoted as declared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from refmoe.api.arrays import libraries_of
from refmoe.api.policies import as_policy
from refmoe.arithmetic.enclosure.array import Enclosure
from refmoe.arithmetic.enclosure.tensor_core import product
from refmoe.arithmetic.formats import OF_DTYPE, Format, nearest, representable, ulp
from refmoe.arithmetic.tensor_core import E4M3, E5M2, TENSOR_CORES, TensorCore
from refmoe.errors import InputError
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.testing.arguments import fit, flat, real
from refmoe.testing.call import Output
from refmoe.testing.judgement import Judgement, judge, require
from refmoe.testing.options import Options, checked, chosen_rows
from refmoe.testing.products import STEP, Linear, linear_changes
from refmoe.verifier.diagnosis.fit import LEFT
from refmoe.verifier.findings import FAIL
from refmoe.verifier.tally import LEAN, SNR

FORMATS = {format.name: format for format in (E4M3, E5M2)}
SIMULATED = 1 << 24
"""The most terms whose sums are simulated bit for bit, which takes about a second."""
UNPROMOTED = "the sums stay in the tensor core, and are never promoted to float32"


class CoreOptions(Options, total=False):
    """The options of `assert_tensor_core_linear`. `policy` has no meaning there."""

    core: str | TensorCore
    """The tensor core: a name of `TENSOR_CORES`, or its description. Needed."""


@dataclass(frozen=True)
class CoreLinear(Linear):
    """Rows times the transpose of a matrix, by a tensor core."""

    core: TensorCore = TENSOR_CORES["hopper-fp8"]

    @property
    def factors(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """[T, K] and [K, N] in float64."""
        return self.x.astype(np.float64), self.w.T.astype(np.float64)

    def some(self, at: Any) -> CoreLinear:
        return replace(self, x=self.x[at])

    def enclose(self, ops: EnclosureOps) -> Enclosure:
        return product(*self.factors, self.core)


def assert_tensor_core_linear(found: Any, x: Any, w: Any, **options: Unpack[CoreOptions]) -> Judgement:
    """Assert that a tensor core multiplied rows by a matrix, within the rounding of that tensor core.

    found: [..., N] in float32, bfloat16 or float16
    x: [..., K]   w: [N, K], as `torch.nn.Linear` has it: values of the core's format, in that dtype or a wider one
    options: those of `CoreOptions`
    Returns the figures. Raises AssertionError when a value is wrong, and InputError for arrays that do not fit.

    >>> import ml_dtypes, numpy as np, refmoe
    >>> x, w = (np.ones(shape, ml_dtypes.float8_e4m3fn) for shape in ((2, 64), (3, 64)))
    >>> found = np.full((2, 3), 64, np.float32)
    >>> refmoe.testing.assert_tensor_core_linear(found, x, w, core="hopper-fp8").verdict
    'pass'
    """
    __tracebackhide__ = True
    return require(judge_tensor_core_linear(found, x, w, **options))


def judge_tensor_core_linear(found: Any, x: Any, w: Any, **options: Unpack[CoreOptions]) -> Judgement:
    """The judgement of `assert_tensor_core_linear`, which also takes its arguments."""
    given = checked(options, CoreOptions, "assert_tensor_core_linear")
    core = _core(given.get("core"))
    left, core = factors(x, "x", core)
    right, other = factors(w, "w", core)
    if other != core:
        raise InputError(f"w: the dtype is {other.inputs}, but {core.inputs} was expected, as x has it")
    arrays = {"x": flat(left), "w": right, "found": flat(real(found, "found"))}
    fit(arrays, {"x": "T K", "w": "N K", "found": "T N"})
    rows = chosen_rows(given, len(arrays["x"]))
    values = arrays["found"][rows]
    call = CoreLinear(x=arrays["x"][rows], w=arrays["w"], core=core)
    format = OF_DTYPE[values.dtype]
    output = Output(
        what="tensor core linear",
        step=STEP,
        found=values,
        call=call,
        reads=(call.x,),
        where=lambda at: f"row {rows[at[0]]}, column {at[1]}",
        changes=lambda: linear_changes(call, values),
        leans=True,
        cost=call.w.size,
    )
    policy = replace(as_policy("float32"), name=_named(core), cuts={STEP: format})
    stays = _stays_in_the_core(call, values, format)
    judgement = judge(output, policy, {**given, "explain": given.get("explain", True) and not stays})
    if not stays:
        return judgement
    return replace(
        judgement,
        verdict=FAIL,
        reason=judgement.reason if judgement.verdict == FAIL else f"the errors are those of other sums: {UNPROMOTED}",
        explanations=(UNPROMOTED,),
        message=f"{judgement.message or f'{output.what}: not legal under {policy.name}'}\n\nExplained by: {UNPROMOTED}",
    )


def factors(value: Any, name: str, core: TensorCore) -> tuple[NDArray[Any], TensorCore]:
    """An array of factors, and the core for its format: both FP8 formats go with a core for one of them.

    Raises InputError for values that the core cannot have read.
    """
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    if dtype in FORMATS:
        if core.inputs.name not in FORMATS:
            raise InputError(f"{name}: the dtype is {dtype}, but values of {core.inputs} were expected")
        wide = value.float() if "torch" in libraries_of(value) else np.asarray(value).astype(np.float32)
        return real(wide, name), replace(core, inputs=FORMATS[dtype])
    array = real(value, name)
    if not representable(array, core.inputs).all():
        raise InputError(
            f"{name}: has values that {core.inputs} does not hold, but those that the core read were expected"
        )
    return array, core


def _core(given: Any) -> TensorCore:
    if isinstance(given, TensorCore):
        return given
    if given in TENSOR_CORES:
        return TENSOR_CORES[given]
    raise InputError(f"core: is {given!r}, but one of {', '.join(TENSOR_CORES)} was expected")


def _named(core: TensorCore) -> str:
    return next((name for name, each in TENSOR_CORES.items() if each == core), repr(core))


def _stays_in_the_core(call: CoreLinear, found: NDArray[Any], format: Format) -> bool:
    """Whether the errors are those of sums that are never promoted, where they must be.

    Sums with and without promotion are computed bit for bit, in the order of the index, and stored. The values must
    follow those without promotion: by the verifier's matched filter, where 0 is honest and 1 is the mistake, and with
    the residual that an explanation may leave. A kernel with another order is not recognised, and not accused.
    """
    terms, core = call.x.shape[1], call.core
    rows = min(len(found), SIMULATED // max(terms * found.shape[1], 1))
    if core.promoted is None or terms <= core.promoted or not rows:
        return False
    some, y = call.some(slice(rows)), found[:rows].astype(np.float64)
    legal = product(*some.factors, core)
    honest, other = core.run(*some.factors), replace(core, promoted=None).run(*some.factors)
    usual = float(((honest - legal.mid) ** 2 / legal.variance).mean())  # the variance is an upper size
    if representable(y, format).all():
        honest, other = nearest(honest, format), nearest(other, format)
        storage = ulp(legal.mid, format) ** 2 / 12
    else:
        storage = np.zeros(y.shape)
    weight = 1 / (usual * legal.variance + storage)
    effect, error, rest = other - honest, y - honest, y - other
    reach = float((effect**2 * weight).sum())
    if not (np.isfinite(y).all() and reach > SNR**2):
        return False
    leans = float((error * effect * weight).sum()) > LEAN * reach
    return leans and float((rest**2 * weight).sum()) <= LEFT**2 * float((error**2 * weight).sum())
