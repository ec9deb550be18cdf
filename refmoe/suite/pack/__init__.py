# SPDX-License-Identifier: Apache-2.0
"""A pack: golden cases as data alone, with the legal interval of every value, for tests without Python."""
