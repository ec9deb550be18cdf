"""The diagnosis of a failed verification: a known bug, two at once, or a structure such as permuted heads."""

from refmoe.verify.diagnosis.diagnose import diagnose, explained
from refmoe.verify.findings import Explanation

__all__ = ["Explanation", "diagnose", "explained"]
