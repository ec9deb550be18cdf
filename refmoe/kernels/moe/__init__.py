# SPDX-License-Identifier: Apache-2.0
"""The contract of fused mixtures of experts."""
