"""Numeric policies: the roundings that an engine may do, as data."""
