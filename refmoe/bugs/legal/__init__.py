"""Legal variants: what engines do differently and rightly. None may ever be flagged, at any dtype.

Beside the catalogue of bugs they are the other half of the proof: a verifier that fails everything kills all mutants.
A variant whose intermediate values are not those of a tap leaves that tap out, as such an engine does.
"""

from refmoe.bugs.legal import attention, experts, precision, serving
from refmoe.bugs.legal.variant import LEGAL, Variant

__all__ = ["LEGAL", "Variant", "attention", "experts", "precision", "serving"]
