"""Numeric policies: what an engine may round, where, to which dtype. Data, and the steps with their cut points."""
