# SPDX-License-Identifier: Apache-2.0
"""All bugs of public kernels and routers. Importing a module registers its bugs."""

from __future__ import annotations

from refmoe.bugs.kernels import mixtures  # isort: skip
from refmoe.bugs.kernels import plans  # isort: skip
from refmoe.bugs.kernels import attentions  # isort: skip
from refmoe.bugs.kernels import routers  # isort: skip
from refmoe.bugs.kernels.bug import KERNEL_BUGS

__all__ = ["KERNEL_BUGS", "attentions", "mixtures", "plans", "routers"]
