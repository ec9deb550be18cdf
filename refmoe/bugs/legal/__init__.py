# SPDX-License-Identifier: Apache-2.0
"""Legal variants: correct engines that differ from the ideal run. None may be flagged at any dtype.

They complete the proof of the catalogue of bugs, since a verifier that fails everything would also catch every bug.
A variant leaves out a tap if the engine never computes the value of that tap.
"""

from refmoe.bugs.legal import attention, experts, precision, serving
from refmoe.bugs.legal.variant import LEGAL, Variant

__all__ = ["LEGAL", "Variant", "attention", "experts", "precision", "serving"]
