# SPDX-License-Identifier: Apache-2.0
"""The diagnosis of a failed verification: a known bug, two at once, or a structure such as permuted heads."""

from refmoe.verifier.diagnosis.diagnose import diagnose, explained, search
from refmoe.verifier.diagnosis.evidence import gather
from refmoe.verifier.diagnosis.observed import Keeper
from refmoe.verifier.findings import Explanation

__all__ = ["Explanation", "Keeper", "diagnose", "explained", "gather", "search"]
