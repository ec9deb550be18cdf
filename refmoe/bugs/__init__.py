"""Mutants: the field's known bugs as variations of the specification, and what proves that each is caught."""
