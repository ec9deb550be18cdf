# SPDX-License-Identifier: Apache-2.0
"""The contract of dispatch plans: histograms, offsets, permutations, and the blocks that grouped products read."""
