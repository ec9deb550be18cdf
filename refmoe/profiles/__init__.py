# SPDX-License-Identifier: Apache-2.0
"""Numeric policies: the roundings that an engine may do, as data."""
