# SPDX-License-Identifier: Apache-2.0
"""Runs of models larger than memory: layer by layer, block by block, over several processes, resumed after a stop."""
