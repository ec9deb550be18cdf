# SPDX-License-Identifier: Apache-2.0
"""Known bugs of engines with quantised matrices: wrong readings of weights, wrong codes of inputs, coarse sums.

They are mutants as those of `refmoe.bugs.catalogue`. But each needs matrices in a format of its own, so that no golden
case shows it as it is. `catalogue.bugs_of` gives those that a model can show.
"""
