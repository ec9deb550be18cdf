# SPDX-License-Identifier: Apache-2.0
"""All laws of mixtures of experts, in the order of reports. Importing a module registers its laws."""

from __future__ import annotations

from refmoe.kernels.moe import values  # isort: skip
from refmoe.kernels.moe import isolation  # isort: skip
from refmoe.kernels.moe import memory  # isort: skip
from refmoe.kernels.moe.law import LAWS

__all__ = ["LAWS", "isolation", "memory", "values"]
