"""refmoe: the executable specification of Mixtral, and the oracle for everybody who implements it."""

__version__ = "0.1.0"
