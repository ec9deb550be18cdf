# SPDX-License-Identifier: Apache-2.0
"""Where ops compute: the CPU, or a GPU through CuPy. Commands get their ops from a place and need no other detail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from refmoe.arithmetic.arrays import Tap
from refmoe.arithmetic.exact.ops import ExactOps
from refmoe.arithmetic.native.ops import NativeOps
from refmoe.cuda.device import free_memory, require_exact, require_gpu
from refmoe.errors import InputError
from refmoe.spec.config import Config
from refmoe.spec.model import Model, Parameters, Steps
from refmoe.steps.enclosure_ops import EnclosureOps
from refmoe.steps.grouped import GROUPED_STEPS
from refmoe.steps.native import NATIVE_STEPS

if TYPE_CHECKING:
    from refmoe.cuda.decode import Decoder
    from refmoe.cuda.memory import Need

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Place:
    """A device by name. It can be sent to another process. Modules for GPUs are imported when they are first needed."""

    name: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.name == "cuda"

    def require(self) -> None:
        """Raises InputError, with the reason, where this machine does not have the device."""
        if self.on_gpu:
            require_gpu()

    def exact(self, tap: Tap | None = None) -> ExactOps:
        """Exact ops: the same bits in every place. The tap receives arrays of the host."""
        if not self.on_gpu:
            return ExactOps(tap)
        from refmoe.cuda.cupy_ops import exact_cupy_ops, from_device

        return exact_cupy_ops(from_device(tap, require_gpu()))

    def native(self, dtype: Any, tap: Tap | None = None, blas: str = "numpy") -> Any:
        """Ops at float32 or float64. The tap receives arrays of the host.

        blas: the library of matrix products on the CPU, "numpy" or "mkl". Raises InputError where it is missing.
        """
        if blas == "mkl":
            if self.on_gpu:
                raise InputError(f"--blas mkl multiplies on the CPU, but --device is {self.name}")
            from refmoe.arithmetic.native.mkl_ops import MklOps

            return MklOps(dtype, tap)
        if not self.on_gpu:
            return NativeOps(dtype, tap)
        from refmoe.cuda.cupy_ops import cupy_ops, from_device

        return cupy_ops(dtype, from_device(tap, require_gpu()))

    def arithmetic(self, dtype: str, tap: Tap | None = None) -> Any:
        """Ops by the name of the arithmetic: ``exact``, ``float64`` or ``float32``."""
        return self.exact(tap) if dtype == "exact" else self.native(dtype, tap)

    def enclosures(self) -> Callable[..., EnclosureOps]:
        """A function that makes the verifier's ops from a policy and a tap."""
        if not self.on_gpu:
            return EnclosureOps
        from refmoe.cuda.cupy_ops import kept_bytes
        from refmoe.cuda.enclosure import EnclosureCupyOps

        cupy = require_gpu()
        require_exact()
        return partial(EnclosureCupyOps, xp=cupy, device_bytes=kept_bytes(self.free_memory()))

    def steps(self, dtype: str) -> Steps:
        """The steps for the ops of `arithmetic(dtype)`."""
        if dtype == "exact":
            return GROUPED_STEPS
        if not self.on_gpu:
            return NATIVE_STEPS
        from refmoe.steps.cuda import CUPY_STEPS

        steps: Steps = CUPY_STEPS
        return steps

    def parameters(self, config: Config, parameters: Parameters) -> Parameters:
        """The parameters, with synthetic weights computed in this place."""
        if not self.on_gpu:
            return parameters
        from refmoe.cuda.synthetic import on_device

        return on_device(config, parameters, require_gpu())

    def decoder(self, model: Model, capacity: int) -> Decoder:
        """One sequence at float32 on a GPU, with memory for `capacity` tokens. `model` must have this place's steps."""
        from refmoe.cuda import cupy_ops
        from refmoe.cuda.decode import DecodeOps, Decoder, can_capture, captured

        cupy = require_gpu()
        ops = DecodeOps(cupy, cupy_ops.compiled, capacity)
        return Decoder(ops, model, capacity, partial(captured, cupy) if can_capture(ops, model) else None)

    def executor(self, wanted: str | None) -> str | None:
        """The executor of work on several cases; on a GPU one process, unless more were asked for."""
        return wanted or "processes:1" if self.on_gpu else wanted

    def free_memory(self) -> int:
        """The free bytes of the GPU."""
        return free_memory(require_gpu())

    def require_memory(self, need: Need) -> None:
        """Raises InputError, with the missing amount, where a GPU has less free memory than needed."""
        if self.on_gpu:
            from refmoe.cuda.memory import missing

            sentence = missing(need, self.free_memory())
            if sentence:
                raise InputError(f"--device {self.name}: {sentence}")


CPU = Place()
