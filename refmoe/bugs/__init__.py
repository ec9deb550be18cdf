# SPDX-License-Identifier: Apache-2.0
"""The known bugs of real engines as mutants of the specification, and the legal variants that must never be flagged."""
